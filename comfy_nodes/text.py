"""Prompts as UniPic2's published pipeline feeds them, on ComfyUI's tokenizers. No nodes here."""

import logging

from ..core.errors import InputError
from ..core.prompts import DEFAULT_EDIT_NEGATIVE_PROMPT, T5_TOKENS
from .micro_model import CLIP_KEY

SD3_KEYS = {"l", "g", "t5xxl"}
NAMES = {"l": "CLIP-L", "g": "CLIP-G", "t5xxl": "T5-XXL", CLIP_KEY: "the micro text encoder"}
_PARTS = {"l": "clip_l", "g": "clip_g", "t5xxl": "t5xxl"}  # of ComfyUI's SD3 CLIP, by its tokens' keys
TASKS = ("text-to-image", "edit")


def encode(clip, prompt: str, socket: str, task: str | None = None):
    """Return ComfyUI CONDITIONING for `prompt` (empty means unconditional); weights like `(word:1.2)` work.

    With `task`, one of `TASKS`, it is a negative prompt, and empty means the one that the task was published with.

    CLIP encoders read their first 77 tokens (the micro one fewer), T5-XXL exactly 256 (padding included), start and
    end tokens counted. What is beyond is dropped with a warning, as in the published pipeline, so that
    positive and negative always have the same length.

    Raises:
        InputError: `clip` is missing or neither an SD3 nor a micro text encoder.
    """
    if clip is None:
        raise InputError(
            "UniPic2 Text Encode, clip",
            found="nothing (the checkpoint has no text encoder)",
            remedy="Load the text encoders with Load CLIP (Triple).",
        )
    clip = clip.clone()
    clip.set_tokenizer_option("t5xxl_min_length", T5_TOKENS)
    tokens = clip.tokenize(prompt, return_word_ids=True)
    if set(tokens) not in (SD3_KEYS, {CLIP_KEY}):
        raise InputError(
            "UniPic2 Text Encode, clip",
            found=f"a text encoder of another model ({', '.join(tokens)})",
            expected="SD3's CLIP-L, CLIP-G and T5-XXL, or the text encoder of a micro model",
            remedy="Qwen2.5-VL belongs into UniPic2 MetaQuery Encode.",
        )
    for key, part in _PARTS.items():
        if task is None and CLIP_KEY not in tokens and getattr(clip.patcher.model, part, clip) is None:
            logging.warning("UniPic2 Text Encode: no %s is loaded; UniPic2 was trained with all three.", NAMES[key])
    if task == "edit" and not prompt and CLIP_KEY not in tokens:  # micro models edit against nothing
        tokens = clip.tokenize(DEFAULT_EDIT_NEGATIVE_PROMPT, return_word_ids=True)
    kept, dropped = {}, []
    for key, chunks in tokens.items():
        kept[key], count = _truncate_t5(chunks) if key == "t5xxl" else _truncate_clip(chunks)
        if count:
            dropped.append(f"{count} for {NAMES[key]}")
    if dropped:
        logging.warning("UniPic2 Text Encode, %s: too long, tokens dropped: %s", socket, ", ".join(dropped))
    return clip.encode_from_tokens_scheduled(kept)


def _truncate_clip(chunks):
    """Keep the first of the chunks `[(token, weight, word), ...]` that ComfyUI cuts a prompt into."""
    # Word 0 marks start, end and padding.
    dropped = sum(1 for chunk in chunks[1:] for _, _, word in chunk if word)
    return [_without_words(chunks[0])], dropped


def _truncate_t5(chunks):
    """Cut the only chunk to `T5_TOKENS`, its end token kept last."""
    (chunk,) = chunks
    dropped = max(0, len(chunk) - T5_TOKENS)
    return [_without_words(chunk[: T5_TOKENS - 1] + chunk[-1:] if dropped else chunk)], dropped


def _without_words(chunk):
    return [(token, weight) for token, weight, _ in chunk]
