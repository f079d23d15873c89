"""Prompt wording shared by training and inference."""

# Our wording of the intent of the reference script's default for edits: push away from soft, damaged
# pictures and from a result that left the asked region as it was.
DEFAULT_EDIT_NEGATIVE_PROMPT = (
    "low quality, low resolution, blurry, out of focus, noise, compression artifacts, distorted shapes, "
    "the requested change is missing, the picture is returned as it was"
)
DEFAULT_NEGATIVE_PROMPT = ""

T5_TOKENS = 256
"""Length that UniPic2 pads the T5 prompt to, without a mask: the padding is part of the conditioning."""


def metaquery_t2i_turn(prompt: str) -> str:
    """Return the user turn that asks Qwen2.5-VL's queries for a picture (published MetaQuery script)."""
    return f"Generate an image: {prompt}"
