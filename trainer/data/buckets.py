"""Aspect buckets: the few sizes that training pictures are brought to, so that a batch has one size."""

import math

from ...core.errors import InputError, check_one_of
from ...core.sizes import MAX_EDGE

BUCKET_MODES = ("area", "longer_edge")
BUCKET_STEP = 32
"""Pixels; both edges are multiples of it, as in UniPic2's published scripts."""


def aspect_buckets(resolution: int, mode: str = "area", max_aspect: float = 2.0) -> list[tuple[int, int]]:
    """Return the bucket sizes `(width, height)` in pixels, from the tallest to the widest.

    Args:
        resolution: `area`: a bucket has about `resolution**2` pixels, so every batch costs about the same.
            `longer_edge`: its longer edge is `resolution`, as when editing with the published scripts.
        mode: one of `BUCKET_MODES`.
        max_aspect: longer edge to shorter edge, at most.

    Raises:
        InputError: a resolution that is no multiple of 32 or out of range, another mode, or an aspect below 1.
    """
    check_one_of("bucket_mode", mode, BUCKET_MODES)
    if resolution < BUCKET_STEP or resolution % BUCKET_STEP or resolution > MAX_EDGE:
        expected = f"a multiple of {BUCKET_STEP} from {BUCKET_STEP} to {MAX_EDGE} pixels"
        raise InputError("resolution", found=resolution, expected=expected)
    if not max_aspect >= 1:
        raise InputError("max_aspect", found=max_aspect, expected="at least 1")
    sizes = {(resolution, resolution)}
    for shorter in range(BUCKET_STEP, resolution, BUCKET_STEP):
        longer = resolution
        if mode == "area":
            longer = round(resolution**2 / shorter / BUCKET_STEP) * BUCKET_STEP
        if longer <= max_aspect * shorter and longer <= MAX_EDGE:
            sizes |= {(shorter, longer), (longer, shorter)}
    return sorted(sizes, key=lambda size: size[0] / size[1])


def nearest_bucket(width: int, height: int, buckets: list[tuple[int, int]]) -> tuple[int, int]:
    """Return the bucket whose shape is nearest to a picture's: the least has to be cut off."""
    aspect = math.log(width / height)
    return min(buckets, key=lambda size: abs(math.log(size[0] / size[1]) - aspect))
