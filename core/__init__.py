"""What the pack and the trainer must agree on. Imports the standard library, torch and safetensors only."""
