"""The picture as Qwen2.5-VL sees it, the same in both wings. Bicubic with antialiasing, float32, kept in 0..1.

Its own processor, and the published script, resize 8-bit pictures; without rounding to 8 bits, as here, values differ
by up to half a step of 255.
"""

import torch
import torch.nn.functional as F

from .sizes import understanding_size, vision_size


def vision_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """Return pictures (B, 3, H, W) in 0..1 at 28/32 of each edge, as prompts of edits show them.

    Raises:
        InputError: see `vision_size`.
    """
    return _resized(pixels, vision_size(pixels.shape[-1], pixels.shape[-2]))


def understanding_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """Return pictures (B, 3, H, W) in 0..1 at the size at which Qwen2.5-VL is asked about them.

    Raises:
        InputError: see `understanding_size`.
    """
    return _resized(pixels, understanding_size(pixels.shape[-1], pixels.shape[-2]))


def _resized(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    width, height = size
    return F.interpolate(pixels.float(), (height, width), mode="bicubic", antialias=True).clamp(0, 1)
