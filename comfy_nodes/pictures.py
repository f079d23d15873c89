"""Pictures on the way into the model: size, channels, reference latents. No nodes here."""

import torch

from ..core.errors import InputError
from ..core.sizes import MAX_EDGE, fit_size, nearest_valid_size
from .kontext import LATENT_CHANNELS

PATCH_PIXELS = 16
"""Pixels per token edge: the VAE shrinks by 8, the transformer reads patches of 2 latents."""


def to_rgb(image, socket: str):
    """Return `(B, H, W, 3)` for an IMAGE `(B, H, W, C)` in 0..1; transparency is laid on white, grey is repeated.

    Raises:
        InputError: the picture is empty or has another number of channels than 1, 3 or 4.
    """
    if image.ndim != 4 or 0 in image.shape:
        raise InputError(
            socket,
            found=f"shape {tuple(image.shape)}",
            expected="at least one picture of at least 1x1 pixel",
            remedy="Load a picture that is not empty.",
        )
    channels = image.shape[-1]
    if channels == 4:
        alpha = image[..., 3:].clamp(0, 1)
        return image[..., :3] * alpha + (1 - alpha)
    if channels not in (1, 3):
        raise InputError(socket, found=f"{channels} channels", expected="1 (grey), 3 (RGB) or 4 (RGBA)")
    return image.expand(-1, -1, -1, 3)


def resize_for_editing(image, longer_edge: int, multiple: int, socket: str):
    """Return the IMAGE with its longer edge near `longer_edge` pixels, both edges multiples of `multiple`.

    Bicubic with antialiasing, values kept in 0..1. A picture that already fits comes back unchanged.
    """
    image = to_rgb(image, socket)
    width, height = fit_size(image.shape[2], image.shape[1], longer_edge, multiple)
    if (height, width) == tuple(image.shape[1:3]):
        return image
    pixels = image.movedim(-1, 1).float()  # no antialiasing in half precision on a CPU
    pixels = torch.nn.functional.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    return pixels.clamp(0, 1).movedim(1, -1).to(image.dtype)


def encode_reference(vae, image, node: str):
    """Return the latents `(B, 16, H/8, W/8)` of an IMAGE, unscaled, as ComfyUI's VAE nodes give them.

    Raises:
        InputError: no VAE, a VAE of another model, or edges that are not multiples of 16 pixels up to 6144.
    """
    if vae is None:
        raise InputError(f"{node}, vae", found="nothing", remedy="Load the VAE of SD3.5 with Load VAE.")
    image = to_rgb(image, f"{node}, image")
    height, width = image.shape[1:3]
    if height % PATCH_PIXELS or width % PATCH_PIXELS or max(height, width) > MAX_EDGE:
        nearest = "x".join(str(min(edge, MAX_EDGE)) for edge in nearest_valid_size(width, height, PATCH_PIXELS))
        raise InputError(
            f"{node}, image",
            found=f"{width}x{height} pixels",
            expected=f"edges that are multiples of {PATCH_PIXELS}, at most {MAX_EDGE} (nearest: {nearest})",
            remedy="Put UniPic2 Edit Image Size before it.",
        )
    latents = vae.encode(image)
    if latents.ndim != 4 or latents.shape[1:] != (LATENT_CHANNELS, height // 8, width // 8):
        raise InputError(
            f"{node}, vae",
            found=f"a VAE whose latents have shape {tuple(latents.shape)}",
            expected=f"({image.shape[0]}, {LATENT_CHANNELS}, {height // 8}, {width // 8})",
            remedy="Use the VAE of SD3.5 (or of the micro model).",
        )
    return latents
