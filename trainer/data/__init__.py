"""Training data: pictures with prompts and edits, from the formats that people have."""
