"""The micro world: scenes whose correctness a program can check, and the micro model trained on them."""
