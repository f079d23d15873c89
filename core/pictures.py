"""Any Pillow picture as 8-bit RGB, the same on every way into the model. Needs no import of Pillow."""

from .errors import InputError

FORMATS = "a picture: PNG, JPEG, WebP, ... with 8 or 16 bits per channel"
TRANSPARENCY = "transparency put over white"
"""What `to_rgb` says of a picture that is not opaque."""
_WITH_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")


def to_rgb(image, what: str):
    """Return an 8-bit RGB copy of a Pillow picture, and what was converted, in words.

    Alpha is composited over white, 16 bits are scaled to 8, CMYK, palette and grey become RGB. Metadata is dropped.

    Args:
        image: `PIL.Image.Image` of any mode.
        what: how errors name the picture.

    Raises:
        InputError: zero pixels, 32-bit floats, or integers beyond 16 bits.
    """
    notes = []
    if 0 in image.size:
        raise InputError(what, found=f"{image.width} x {image.height} pixels", expected="at least 1 x 1")
    if image.mode == "F":
        raise InputError(what, found="32-bit floats", expected=FORMATS, remedy="Convert the picture to 8 bits.")
    if image.mode.startswith("I"):
        image = image.convert("I")
        low, high = image.getextrema()
        if low < 0 or high > 65535:
            raise InputError(what, found=f"values from {low} to {high}", expected="0 to 65535 (16 bits)")
        image = image.point(lambda value: value * (1 / 257) + 0.5).convert("L")
        image.info.pop("transparency", None)
        notes.append("16 bits scaled to 8")
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            notes.append(TRANSPARENCY)
        white = image.copy()
        white.paste((255, 255, 255, 255), (0, 0, *image.size))
        white.alpha_composite(image)
        image = white
    elif image.mode == "CMYK":
        notes.append("CMYK to RGB")
    rgb = image.convert("RGB")
    rgb.info.clear()
    return rgb, notes
