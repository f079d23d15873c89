"""Pictures in and out: any picture file becomes 8-bit RGB PNG bytes; results are written whole or not at all."""

import io
import os
from pathlib import Path

from ..core.errors import InputError
from ..core.pictures import FORMATS, to_rgb


def read_masked(path: Path) -> bytes:
    """Return a picture as 8-bit RGBA PNG bytes, for a workflow that takes what is transparent as its mask.

    Raises:
        InputError: it has no transparency, or see `read_rgb`.
    """
    from PIL import Image, ImageOps

    read_rgb(path)  # whatever else is wrong with it
    with Image.open(path) as image:
        mode, rgba = image.mode, ImageOps.exif_transpose(image).convert("RGBA")
    if rgba.getchannel("A").getextrema()[0] == 255:  # also where there is a channel for it, as in screenshots
        remedy = "Make the region that may change transparent, and save a PNG."
        found, expected = f"none (mode {mode})", "transparency, which this workflow takes as the mask"
        raise InputError(f"picture {path}", found=found, expected=expected, remedy=remedy)
    rgba.info.clear()
    return _png(rgba)


def read_rgb(path: Path) -> tuple[bytes, list[str]]:
    """Read a picture for upload.

    Alpha is composited over white, 16 bits are scaled to 8, CMYK, palette and grey become RGB, the EXIF rotation
    is applied, of an animation the first frame is taken.

    Args:
        path: any file that Pillow reads.

    Returns:
        8-bit RGB as PNG bytes without metadata, and what was converted, in words.

    Raises:
        InputError: missing, empty, truncated or huge file, not a picture, zero pixels, 32-bit floats.
    """
    from PIL import Image, UnidentifiedImageError

    what = f"picture {path}"
    try:
        if path.stat().st_size == 0:
            raise InputError(what, found="an empty file", expected=FORMATS)
        with Image.open(path) as image:
            deep = _is_deep(image)
            image.load()
            rgb, notes = _to_rgb(image, deep, what)
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(what, found="something that is not a picture, or a broken one", expected=FORMATS) from error
    except Image.DecompressionBombError as error:
        raise InputError(what, found="too many pixels", expected="fewer than 178 million") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        # Pillow raises SyntaxError for broken PNG chunks.
        reason = getattr(error, "strerror", None) or error
        raise InputError(what, found=reason, expected=FORMATS, remedy="Export the picture again.") from error
    return _png(rgb), notes


def _png(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def _is_deep(image) -> bool:
    """Tell whether the file has 16 bits per channel; Pillow reduces colour PNGs to 8 while it loads."""
    tiles = [str(tile[3]) for tile in getattr(image, "tile", None) or []]
    return image.mode.startswith("I") or any(";16" in tile for tile in tiles)


def _to_rgb(image, deep: bool, what: str):
    from PIL import ImageOps

    notes = []
    if getattr(image, "n_frames", 1) > 1:
        notes.append(f"first of {image.n_frames} frames")
    if image.getexif().get(0x0112, 1) != 1:
        image = ImageOps.exif_transpose(image)
        notes.append("EXIF rotation applied")
    if deep and not image.mode.startswith("I"):
        notes.append("16 bits scaled to 8")
    rgb, converted = to_rgb(image, what)
    return rgb, notes + converted


# -- results -------------------------------------------------------------------------------------------------------


class Output:
    """Where the results go: a file, or a folder with names of our own.

    Args:
        target: `-o`: a file name, a folder, or None for the current folder.
        stem: name to use without a file name, such as `micro_edit_7`.

    Raises:
        InputError: the folder does not exist or cannot be written to.
    """

    def __init__(self, target: str | None, stem: str):
        path = Path(target or ".").expanduser()
        names_folder = target is None or path.is_dir() or target.endswith(("/", os.sep)) or not path.suffix
        self.folder = path if names_folder else path.parent
        self.stem = stem if names_folder else path.stem
        self.suffix = None if names_folder else path.suffix
        if not self.folder.is_dir():
            found = "a file" if self.folder.exists() else "no such folder"
            raise InputError(f"output folder {self.folder}", found=found, remedy="Create it first.")
        probe = self.folder / f".unipic2-{os.getpid()}.tmp"
        try:
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise InputError(
                f"output folder {self.folder}", found=error.strerror, expected="a writable one"
            ) from error

    def paths(self, names: list[str]) -> list[Path]:
        """Return a path for each of the server's file names; its suffix stays true to what the server saved."""
        suffixes = [Path(name).suffix for name in names]
        same = {".jpeg": ".jpg"}
        if self.suffix and len(names) == 1:
            given, saved = self.suffix.lower(), suffixes[0].lower()
            if same.get(given, given) == same.get(saved, saved):
                suffixes = [self.suffix]
        if len(names) == 1:
            return [self.folder / (self.stem + suffixes[0])]
        return [self.folder / f"{self.stem}_{i:05d}{suffix}" for i, suffix in enumerate(suffixes, 1)]
