"""The micro world: scenes whose correctness a program can check, and the micro model trained on them."""

CODEC_STEPS = 3000
"""Optimizer steps of the micro VAE, unless `unipic2 micro make` is told otherwise."""

DECODER_STEPS = 1200
"""Further steps of its decoder alone."""

VLM_STEPS = 3000
"""Optimizer steps of Micro Qwen2.5-VL, unless `unipic2 micro metaquery` is told otherwise."""

HELD_OUT_COUNT, HELD_OUT_SEED = 256, 1234
"""Prompts, and as many edits, that models are scored on, and their seed; training never draws from it."""

QUESTIONS_PER_KIND = 100
"""Questions of each kind that Micro Qwen2.5-VL is scored on."""
