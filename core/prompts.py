"""Prompt wording shared by training and inference."""

import re

# Our wording of the intent of the reference script's default for edits: push away from soft, damaged
# pictures and from a result that left the asked region as it was.
DEFAULT_EDIT_NEGATIVE_PROMPT = (
    "low quality, low resolution, blurry, out of focus, noise, compression artifacts, distorted shapes, "
    "the requested change is missing, the picture is returned as it was"
)
DEFAULT_NEGATIVE_PROMPT = ""

T5_TOKENS = 256
"""Length that UniPic2 pads the T5 prompt to, without a mask: the padding is part of the conditioning."""


POSITIONS = ("1d", "mrope")
"""How Qwen2.5-VL's tokens are numbered before MetaQuery's queries: plainly, as the published edit script does it, or
by rows and columns of the picture."""
IMAGE_TOKEN = "<|image_pad|>"
"""Stands in Qwen2.5-VL's prompts for a picture: one token here, as many as the picture needs in the model."""
_USER, _ANSWER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
_PICTURE = f"<|vision_start|>{IMAGE_TOKEN}<|vision_end|>"
_MARKUP = re.compile(r"<\|(?=[^|<>\s]+\|>)")


def metaquery_segments(prompt: str, has_picture: bool) -> list[str]:
    """Return the chat that stands before the queries, in pieces to be tokenised one by one.

    As published: no system turn; "Generate an image: ..." without a picture, the bare instruction with one.

    Args:
        prompt: text or instruction; markup of chats in it (`<|im_end|>`) is cut in two, so that it is read as text.
        has_picture: the language model sees a picture, before the instruction.
    """
    return _chat(prompt if has_picture else f"Generate an image: {prompt}", has_picture)


def question_segments(question: str, has_picture: bool) -> list[str]:
    """Return the chat that stands before an answer, in pieces as `metaquery_segments` does."""
    return _chat(question, has_picture)


def _chat(text: str, has_picture: bool) -> list[str]:
    cuts = [0, *(m.end() for m in _MARKUP.finditer(text)), len(text)]
    pieces = [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    pieces[0] = f"{_USER}{_PICTURE if has_picture else ''}{pieces[0]}"
    pieces[-1] += _ANSWER
    return pieces
