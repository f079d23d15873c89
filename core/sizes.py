"""Picture sizes: the longer edge goes to a target, both edges are multiples of 32.

The VAE shrinks by 8 and the transformer reads patches of 2 latents, so 16 pixels are the least step;
32 is what UniPic2's published scripts use.
"""

import math
from dataclasses import dataclass

from .errors import InputError, check_one_of

VISION_UNIT = 28
"""Pixels of a token's edge in Qwen2.5-VL: patches of 14, merged by twos."""
_VISION_PIXELS = (
    56 * 56,
    12_845_056,
)  # least and most that ComfyUI's and transformers' preprocessing leave as they are
_MAX_ASPECT = 200  # of Qwen2.5-VL's own processor

MAX_EDGE = 6144  # 384 position rows x 16 pixels: the end of SD3.5-Medium's position table


def fit_size(width: int, height: int, longer_edge: int = 512, multiple: int = 32) -> tuple[int, int]:
    """Return `(width, height)` in pixels with the longer edge at `longer_edge` and the shape kept.

    Both results are rounded to the nearest multiple of `multiple` (halves go up) and are at least one multiple.

    Raises:
        InputError: an edge is below 1 pixel, or `longer_edge` is outside `multiple`..6144.
    """
    if width < 1 or height < 1:
        raise InputError("picture size", found=f"{width}x{height}", expected="at least 1x1 pixel")
    if not multiple <= longer_edge <= MAX_EDGE:
        raise InputError("longer_edge", found=longer_edge, expected=f"{multiple} to {MAX_EDGE} pixels")
    scale = longer_edge / max(width, height)

    def snap(edge: int) -> int:
        most = MAX_EDGE // multiple * multiple
        return min(most, max(multiple, int(edge * scale / multiple + 0.5) * multiple))

    return snap(width), snap(height)


FITS = ("stretch", "crop", "pad")
"""How edges become multiples: the picture's shape changes by a few percent, or its border is cut off, or added."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Which part of a picture is edited, and where it lies in the picture that is drawn. Boxes are in pixels."""

    original: tuple[int, int]
    """(width, height) of the picture."""
    source: tuple[int, int, int, int]
    """(left, top, right, bottom) in it: the part that is edited."""
    size: tuple[int, int]
    """(width, height) of what is drawn."""
    target: tuple[int, int, int, int]
    """(left, top, right, bottom) of `source` in that; around it is padding."""


def place(width: int, height: int, longer_edge: int = 512, multiple: int = 32, fit: str = FITS[0]) -> Placement:
    """Return how a picture is brought to `fit_size`; padded, the shorter edge goes up to the next multiple instead.

    Raises:
        InputError: see `fit_size`; or an unknown `fit`.
    """
    check_one_of("fit", fit, FITS)
    size = fit_size(width, height, longer_edge, multiple)
    source, target = (0, 0, width, height), (0, 0, *size)
    if fit == "crop":
        kept = (min(width, max(1, round(height * size[0] / size[1]))), height)
        if kept[0] == width:
            kept = (width, min(height, max(1, round(width * size[1] / size[0]))))
        source = _centred(kept, (width, height))
    elif fit == "pad":
        scale = max(size) / max(width, height)
        content = (max(1, round(width * scale)), max(1, round(height * scale)))
        size = (-(-content[0] // multiple) * multiple, -(-content[1] // multiple) * multiple)
        target = _centred(content, size)
    return Placement((width, height), source, size, target)


def _centred(inner: tuple[int, int], outer: tuple[int, int]) -> tuple[int, int, int, int]:
    left, top = (outer[0] - inner[0]) // 2, (outer[1] - inner[1]) // 2
    return left, top, left + inner[0], top + inner[1]


def nearest_valid_size(width: int, height: int, multiple: int = 32) -> tuple[int, int]:
    """Return the nearest `(width, height)` in pixels whose edges are multiples of `multiple`, for error texts."""
    return tuple(max(multiple, int(edge / multiple + 0.5) * multiple) for edge in (width, height))


def vision_size(width: int, height: int) -> tuple[int, int]:
    """Return `(width, height)` in pixels at which Qwen2.5-VL sees a picture: exactly 28/32 of each edge, as published.

    Raises:
        InputError: an edge is no multiple of 32, or more than 200 times as long as the other, or the picture is too
            small or too large for the vision encoder.
    """
    least, most = _VISION_PIXELS
    small = tuple(edge * VISION_UNIT // 32 for edge in (width, height))
    if width % 32 or height % 32 or not least <= small[0] * small[1] <= most:
        nearest = nearest_valid_size(width, height)
        raise InputError(
            "picture for Qwen2.5-VL",
            found=f"{width}x{height} pixels",
            expected=f"edges that are multiples of 32 (nearest: {nearest[0]}x{nearest[1]}) and, at 28/32 of them, "
            f"{least:,} to {most:,} pixels, such as 64x64 to 4096x4096",
        )
    _check_aspect(width, height)
    return small


def understanding_size(width: int, height: int) -> tuple[int, int]:
    """Return `(width, height)` in pixels at which Qwen2.5-VL sees a picture it is asked about.

    As its own processor has it: edges rounded to multiples of 28, scaled together where they are too few or too many.

    Raises:
        InputError: an edge is below 1 pixel, or one is more than 200 times as long as the other.
    """
    least, most = _VISION_PIXELS
    _check_aspect(width, height)
    edges = [round(edge / VISION_UNIT) * VISION_UNIT for edge in (width, height)]
    if edges[0] * edges[1] > most:
        scale = math.sqrt(width * height / most)
        edges = [max(1, math.floor(edge / scale / VISION_UNIT)) * VISION_UNIT for edge in (width, height)]
    elif edges[0] * edges[1] < least:
        scale = math.sqrt(least / (width * height))
        edges = [math.ceil(edge * scale / VISION_UNIT) * VISION_UNIT for edge in (width, height)]
    return edges[0], edges[1]


def _check_aspect(width: int, height: int) -> None:
    if min(width, height) < 1 or max(width, height) > _MAX_ASPECT * min(width, height):
        expected = f"at least 1x1, edges at most {_MAX_ASPECT} times as long as each other"
        raise InputError("picture for Qwen2.5-VL", found=f"{width}x{height} pixels", expected=expected)
