"""Contact sheets: pictures with their words, to be looked at."""

import io
import textwrap
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..core.errors import InputError
from ..core.files import write_file

_PAD = 6  # pixels around a cell
_LINE = 11  # pixels of a line of text
_LINES = 3


@dataclass(frozen=True, slots=True)
class Cell:
    """One entry of a sheet. Example: `Cell("a red circle", [picture], passed=True)`."""

    caption: str
    """Words under the pictures."""
    images: list[Image.Image]
    """One picture, or source and results side by side, of any shapes."""
    passed: bool | None = None
    """Green or red frame; None for no verdict."""


def contact_sheet(cells: list[Cell], columns: int = 8, edge: int = 128) -> Image.Image:
    """Return a sheet of cells, row by row; every cell is as wide as the widest.

    Pictures are shown in squares of `edge` pixels; small ones are enlarged pixel by pixel.
    """
    width = max(len(c.images) for c in cells) * (edge + 2) + 2 * _PAD
    height = edge + _LINES * _LINE + 2 * _PAD + 4
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for i, cell in enumerate(cells):
        _draw_cell(sheet, cell, (i % columns) * width, (i // columns) * height, edge, width)
    return sheet


def _draw_cell(sheet: Image.Image, cell: Cell, left: int, top: int, edge: int, width: int) -> None:
    draw = ImageDraw.Draw(sheet)
    frame = {True: (40, 160, 70), False: (210, 40, 40), None: (190, 190, 190)}[cell.passed]
    x = left + _PAD
    for image in cell.images:
        method = Image.Resampling.NEAREST if max(image.size) < edge else Image.Resampling.LANCZOS
        sheet.paste(ImageOps.pad(image, (edge, edge), method, color="white"), (x, top + _PAD))
        draw.rectangle([x - 1, top + _PAD - 1, x + edge, top + _PAD + edge], outline=frame, width=2)
        x += edge + 2
    font = ImageFont.load_default(size=9)
    lines = textwrap.wrap(cell.caption, max(12, (width - 2 * _PAD) // 5))[:_LINES]
    draw.multiline_text((left + _PAD, top + _PAD + edge + 3), "\n".join(lines), fill="black", font=font, spacing=1)


def stack(sheets: list[Image.Image]) -> Image.Image:
    """Return sheets under each other, on the widest one's width."""
    out = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), "white")
    top = 0
    for sheet in sheets:
        out.paste(sheet, (0, top))
        top += sheet.height
    return out


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write a sheet as a whole or not at all.

    Raises:
        InputError: the folder does not exist, the suffix is no picture format, or the file cannot be written.
    """
    formats = Image.registered_extensions()
    if path.suffix.lower() not in formats:
        raise InputError(f"sheet {path}", found=f"suffix {path.suffix!r}", expected="a picture format, such as .png")
    if not path.parent.is_dir():
        raise InputError(f"sheet {path}", found=f"no folder {path.parent}", remedy="Create it first.")
    encoded = io.BytesIO()
    sheet.save(encoded, formats[path.suffix.lower()])
    write_file(path, encoded.getvalue())
