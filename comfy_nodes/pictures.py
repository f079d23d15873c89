"""Pictures on the way into the model and back: size, channels, masks, reference latents. No nodes here."""

import logging

import torch

from ..core.errors import InputError
from ..core.sizes import MAX_EDGE, Placement, nearest_valid_size, place
from .kontext import LATENT_CHANNELS

PATCH_PIXELS = 16
"""Pixels per token edge: the VAE shrinks by 8, the transformer reads patches of 2 latents."""
_SAME_SHAPE = 0.05  # of width to height: edges become multiples of 32


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


def resize_for_editing(image, longer_edge: int, multiple: int, socket: str, fit: str = "stretch"):
    """Return the IMAGE at a size for editing, and its `Placement`.

    Bicubic with antialiasing, values kept in 0..1; padding repeats the border. A picture that already fits comes back
    unchanged.
    """
    image = to_rgb(image, socket)
    placement = place(image.shape[2], image.shape[1], longer_edge, multiple, fit)
    pixels = _resized(_cut(image.movedim(-1, 1), placement.source), _size(placement.target), "bicubic").clamp(0, 1)
    return _padded(pixels, placement, mode="replicate").movedim(1, -1).to(image.dtype), placement


def resize_mask(mask, placement: Placement):
    """Return a MASK (B, H, W) of the original picture for the one that is drawn; padding is not masked."""
    mask = _at_size(mask, placement.original)
    pixels = _resized(_cut(mask, placement.source), _size(placement.target), "bilinear")
    return _padded(pixels, placement, mode="constant")[:, 0].clamp(0, 1)


def paste_back(edited, original, placement: Placement, mask, feather: int, node: str):
    """Return the original IMAGE with the edit at its place, at the original's size.

    Args:
        edited: IMAGE of `placement.size`, or of a multiple of it (an upscaled edit).
        original: IMAGE the placement was made for, one or one for each edit.
        placement: of `resize_for_editing`.
        mask: MASK (B, H, W) of the original, or as it is drawn (`resize_mask`): 1 takes the edit, 0 keeps the
            original; None takes all of the edit.
        feather: pixels of the original over which the mask fades, outside of it; and, inside, the edges of a part
            that was cropped.

    Raises:
        InputError: another picture than the placement's, an edit of another shape, or batches that do not fit.
    """
    edited = to_rgb(edited, f"{node}, image").movedim(-1, 1)
    original = to_rgb(original, f"{node}, original").movedim(-1, 1).to(edited.device)
    found = (original.shape[-1], original.shape[-2])
    if found != placement.original:
        raise InputError(
            f"{node}, original",
            found="{}x{} pixels".format(*found),
            expected="{}x{}, the picture that UniPic2 Edit Image Size got".format(*placement.original),
            remedy="Connect the same picture to both.",
        )
    width, height = edited.shape[-1], edited.shape[-2]
    smaller = width < placement.size[0] or height < placement.size[1]
    if smaller or abs(width * placement.size[1] - height * placement.size[0]) > max(width, height):
        expected = "{}x{} or that enlarged".format(*placement.size)
        raise InputError(f"{node}, image", found=f"{width}x{height} pixels", expected=expected)
    mask = None if mask is None else _mask_of_original(mask, placement).to(edited.device)
    count = max(len(edited), len(original))
    for name, batch in (("image", edited), ("original", original), *([] if mask is None else [("mask", mask)])):
        if len(batch) not in (1, count):
            raise InputError(f"{node}, {name}", found=f"{len(batch)} in the batch", expected=f"1 or {count} of them")
    scale = width / placement.size[0], height / placement.size[1]
    box = tuple(round(edge * scale[i % 2]) for i, edge in enumerate(placement.target))
    left, top, right, bottom = placement.source
    part = _resized(_cut(edited, box), (right - left, bottom - top), "bicubic").clamp(0, 1).to(original.dtype)
    result = original.expand(count, -1, -1, -1).clone()
    weight = _fading_edges(placement, feather).to(part)
    if mask is not None:
        weight = weight * _feathered(mask, feather).to(part)[..., top:bottom, left:right]
    result[..., top:bottom, left:right] = torch.lerp(result[..., top:bottom, left:right], part, weight)
    return result.movedim(1, -1)


def _cut(pixels, box: tuple[int, int, int, int]):
    left, top, right, bottom = box
    return pixels[..., top:bottom, left:right]


def _size(box: tuple[int, int, int, int]) -> tuple[int, int]:
    return box[2] - box[0], box[3] - box[1]


def _resized(pixels, size: tuple[int, int], mode: str):
    """Return pixels (B, C, H, W) at (width, height)."""
    if (pixels.shape[-1], pixels.shape[-2]) == size:
        return pixels
    # No antialiasing in half precision on a CPU.
    return torch.nn.functional.interpolate(pixels.float(), size[::-1], mode=mode, antialias=True)


def _padded(pixels, placement: Placement, mode: str):
    left, top, right, bottom = placement.target
    around = (left, placement.size[0] - right, top, placement.size[1] - bottom)
    if not any(around):
        return pixels
    return torch.nn.functional.pad(pixels.float(), around, mode=mode)


def _mask_of_original(mask, placement: Placement):
    """Return a MASK of the original, or of the picture that is drawn, as (B, 1, H, W) at the original's size."""
    if mask.shape[-2:] != placement.size[::-1] or placement.size == placement.original:
        return _at_size(mask, placement.original)
    left, top, right, bottom = placement.source
    drawn = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    whole = drawn.new_zeros(len(drawn), 1, *placement.original[::-1])
    whole[..., top:bottom, left:right] = _resized(
        _cut(drawn, placement.target), (right - left, bottom - top), "bilinear"
    )
    return whole


def _at_size(mask, size: tuple[int, int]):
    """Return a MASK (B, H, W) or (H, W) as (B, 1, H, W) at (width, height), as ComfyUI stretches masks."""
    return _resized(mask.reshape(-1, 1, *mask.shape[-2:]).float(), size, "bilinear")


def _fading_edges(placement: Placement, width: int):
    """Return weights (H, W) of the part that was edited: 1, and less near those of its edges that were cropped."""
    edges, scales = placement.source, []
    for axis in (1, 0):  # rows, columns
        low, high = edges[axis], edges[axis + 2]
        places, weight = torch.arange(low, high) + 0.5, torch.ones(high - low)
        for cropped, distance in ((low, places - low), (placement.original[axis] - high, high - places)):
            # No wider than what was cropped, where little was, nor than leaves a middle.
            fade = min(width, cropped, (high - low) // 4)
            weight = torch.minimum(weight, distance / fade) if fade else weight
        scales.append(weight)
    return scales[0][:, None] * scales[1]


def _feathered(mask, width: int):
    """Fade a mask (B, 1, H, W) over `width` pixels outside of it; all of the mask itself, however thin, stays."""
    grown, blurred, whole = width // 2, width - width // 2, mask

    def around(half: int):
        return torch.nn.functional.pad(mask, (half,) * 4, mode="replicate")

    if grown:
        size, largest = 2 * grown + 1, torch.nn.functional.max_pool2d
        mask = largest(largest(around(grown), (size, 1), stride=1), (1, size), stride=1)
    for half in (blurred // 2, blurred - blurred // 2):  # two boxes: no kink in the fade
        size, mean = 2 * half + 1, torch.nn.functional.avg_pool2d
        mask = mean(mean(around(half), (size, 1), stride=1), (1, size), stride=1)
    return torch.maximum(mask, whole)


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


def masked(latents, mask, size: tuple[int, int], node: str):
    """Return the LATENT of a local edit: the picture's own latents, and where noise may change them.

    Args:
        latents: (B, 16, H/8, W/8) of the picture.
        mask: MASK (B, H, W), 1 where the picture may change; one, or one for each picture.
        size: (width, height) of the picture in pixels; a mask of another shape is stretched to it, which is told.
        node: what errors name.

    Raises:
        InputError: nothing is masked, or masks and pictures are not as many.
    """
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    if not mask.any():
        raise InputError(
            f"{node}, mask",
            found=f"none of its {mask.shape[-1]}x{mask.shape[-2]} pixels above 0, so nothing would change",
            expected="1 where the picture may change",
            remedy="Paint it (Open in MaskEditor, on Load Image), or disconnect it to edit all of the picture.",
        )
    if len(mask) not in (1, len(latents)):
        raise InputError(f"{node}, mask", found=f"{len(mask)} of them", expected=f"1 or {len(latents)}, one a picture")
    width, height = mask.shape[-1], mask.shape[-2]
    if abs(width * size[1] - height * size[0]) > _SAME_SHAPE * height * size[0]:
        logging.warning(
            "%s: the mask (%dx%d) has another shape than the picture (%dx%d) and is stretched; where UniPic2 Edit "
            "Image Size crops or pads, take the mask through it.", node, width, height, *size,
        )  # fmt: skip
    if mask.shape[-2] >= latents.shape[-2] and mask.shape[-1] >= latents.shape[-1]:
        # A latent changes if any of its pixels may; ComfyUI's own shrinking would miss thin strokes.
        mask = torch.nn.functional.adaptive_max_pool2d(mask, latents.shape[-2:])
    return {"samples": latents, "noise_mask": mask}
