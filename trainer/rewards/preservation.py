"""How much of the source an edit left as it was: a guard beside a reward for what was asked, never alone."""

import numpy as np
from PIL import Image

_SAME = 8.0  # levels of 255: below it two pixels are alike to the eye
_OTHER = 48.0  # from here on a pixel has changed


def preservation(
    prompts: list[str], images: list[Image.Image], source_image: list[Image.Image | None], **columns
) -> list[float | None]:
    """Return the share of pixels like those of the source, 0 to 1; None for text-to-image.

    A pixel counts by the largest difference of its channels: 1 below 8 of 255 levels, 0 from 48 on, between them on a
    straight line. A picture that was not edited at all gets 1.
    """
    return [
        None if source is None else _share(image, source) for image, source in zip(images, source_image, strict=True)
    ]


def _share(image: Image.Image, source: Image.Image) -> float:
    if image.size != source.size:
        source = source.resize(image.size, Image.Resampling.BICUBIC)
    one, other = (np.asarray(picture.convert("RGB"), dtype=np.float64) for picture in (image, source))
    difference = np.abs(one - other).max(axis=-1)
    return float(((_OTHER - difference) / (_OTHER - _SAME)).clip(0, 1).mean())
