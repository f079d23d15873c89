"""Picture sizes: the longer edge goes to a target, both edges are multiples of 32.

The VAE shrinks by 8 and the transformer reads patches of 2 latents, so 16 pixels are the least step;
32 is what UniPic2's published scripts use.
"""

from .errors import InputError

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
        return max(multiple, int(edge * scale / multiple + 0.5) * multiple)

    return snap(width), snap(height)


def nearest_valid_size(width: int, height: int, multiple: int = 32) -> tuple[int, int]:
    """Return the nearest `(width, height)` in pixels whose edges are multiples of `multiple`, for error texts."""
    return tuple(max(multiple, int(edge / multiple + 0.5) * multiple) for edge in (width, height))
