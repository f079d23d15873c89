"""Reading datasets of pictures and edits: jsonl with paths, parquet, webdataset tars, image folders, hub names.

The `datasets` library does the reading. Here columns get their meaning, and rows become pictures; a row that cannot be
read is a `BrokenRow` with a reason, never a crash of a run that was going well.
"""

import difflib
import hashlib
import io
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
from PIL import Image, ImageOps

from ...core.errors import InputError
from ...core.pictures import TRANSPARENCY, to_rgb
from .tars import features_of_tars

SOURCE_COLUMNS = (
    "src_img", "source_image", "source_images", "source_img", "input_images", "input_image", "original_image", "image"
)  # fmt: skip
TARGET_COLUMNS = ("edited_img", "edited_image", "target_image", "target_img", "output_images", "output_image")
PROMPT_COLUMNS = ("prompt", "instruction", "caption", "edited_prompt_list", "edit_prompt", "text", "txt", "json")
PICTURE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp")
"""Names of the one picture of a text-to-image row, where there is no column of `TARGET_COLUMNS`."""
_ENDINGS = ("jpg", "jpeg", "png", "webp", "txt")  # of a field of a webdataset, such as `src_img.png`
ROLES = ("prompt", "target", "source", "mask")
MASK_COLUMNS = ("mask", "mask_img", "mask_image")
_LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".tar": "webdataset"}
_READING = (
    OSError, ValueError, RuntimeError, TypeError, AttributeError, tarfile.TarError, datasets.exceptions.DatasetsError
)  # fmt: skip
"""What `datasets` raises of data that it cannot read."""
_IN_FOLDERS = (".parquet", ".tar", ".jsonl")
_SPLITS = ("train", "test", "validation", "valid", "val", "dev")
_SPLIT = re.compile(rf"({'|'.join(_SPLITS)})(?=[-_.])", re.IGNORECASE)
_ROTATED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_EXIF_ORIENTATION = 0x0112


class BrokenRow(ValueError):
    """A row that cannot be trained on; the message is the reason, with the file's name where there is one."""

    passing = False
    """Whether it was the system's fault (a network disk that is away, rights), and may be whole another time."""


class TransparentMask(BrokenRow):
    """A mask that is not opaque: whether that means inside or outside cannot be told."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column is what. Example: `Columns("instruction", "edited_img", "src_img")`."""

    prompt: str
    """Text, a list of texts, of which the last is used, or an object with one of `PROMPT_COLUMNS`."""
    target: str | None
    """The picture to learn; None where none is needed."""
    source: str | None = None
    """The picture that an edit starts from; None where all rows are text-to-image."""
    mask: str | None = None
    """Where the edit is: white is inside."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One row. Example: `Pair("make it red", target, source)`."""

    prompt: str
    """The caption, or the instruction of an edit."""
    target: Image.Image | None
    """8-bit RGB; None where none is needed."""
    source: Image.Image | None
    """8-bit RGB; None for text-to-image."""
    mask: Image.Image | None = None
    """8-bit grey."""


@dataclass(frozen=True, slots=True)
class Source:
    """One opened dataset. Example: `open_source("edits.jsonl")`."""

    name: str
    """As the user gave it."""
    rows: datasets.Dataset
    """Pictures are not decoded yet."""
    columns: Columns
    """Meaning of the columns."""
    root: Path
    """Folder that relative picture paths start from."""

    def map(self, function, what: str, num_proc: int | None) -> datasets.Dataset:
        """Return what `function(row, columns, root)` says of each row, computed in `num_proc` processes.

        What `datasets` kept of an earlier run is not used: it knows neither the files beside the rows nor our code.
        """
        return self.rows.map(
            function,
            fn_kwargs={"columns": self.columns, "root": self.root},
            remove_columns=self.rows.column_names,
            num_proc=num_proc if num_proc and num_proc > 1 else None,
            load_from_cache_file=False,
            desc=f"{what} of {self.name}",
        )


def find_columns(names: Iterable[str], what: str, needs_target: bool = True, **given: str | None) -> Columns:
    """Tell the columns apart by their names; `given` (`prompt=`, `target=`, `source=`, `mask=`) goes first.

    Without `needs_target` the picture to learn may be missing and is not read; a lone `image` is still taken for it,
    not for a source.

    Raises:
        InputError: a given column does not exist, or there is no prompt or no picture.
    """
    names = list(names)
    for role, name in given.items():
        if name is not None and name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            remedy = f"Did you mean {near[0]}?" if near else None
            raise InputError(
                f"{role}_column of {what}", found=repr(name), expected=f"one of {', '.join(names)}", remedy=remedy
            )

    known = {name.rpartition(".")[0]: name for name in reversed(names) if name.rpartition(".")[2].lower() in _ENDINGS}
    known |= {name: name for name in names}

    def first(role: str, aliases: tuple[str, ...]) -> str | None:
        return given.get(role) or next((known[alias] for alias in aliases if alias in known), None)

    target = first("target", TARGET_COLUMNS)
    # Where nothing else is the picture to learn, `image` is.
    source = first("source", SOURCE_COLUMNS if target is not None else SOURCE_COLUMNS[:-1])
    target = target or first("target", PICTURE_COLUMNS)
    prompt = first("prompt", PROMPT_COLUMNS)
    for role, name, aliases in (
        ("prompt", prompt, PROMPT_COLUMNS),
        ("target", target, (*TARGET_COLUMNS, *PICTURE_COLUMNS)),
    ):
        if name is None and (needs_target or role == "prompt"):
            raise InputError(
                f"columns of {what}",
                found=", ".join(names),
                expected=f"a {role}: {', '.join(aliases)}",
                remedy=f"Name the column with --{role}_column.",
            )
    if not needs_target:
        return Columns(prompt, None, source)
    return Columns(prompt, target, None if source == target else source, first("mask", MASK_COLUMNS))


def open_source(
    name: str,
    image_root: str | None = None,
    split: str = "train",
    needs_target: bool = True,
    **columns: str | None,
) -> Source:
    """Open a dataset without decoding its pictures.

    Args:
        name: a .jsonl, .json, .parquet or .tar file, a folder of such files or of pictures, or a dataset's name on the
            hub. No code of a dataset is ever run.
        image_root: folder that picture paths in rows start from; default the folder of the file.
        split: which split to read where there are several.
        needs_target: False where there need be no picture to learn.
        columns: overrides for `find_columns`.

    Raises:
        InputError: nothing there, unreadable, or columns that say nothing.
    """
    with unreadable_otherwise(name):
        found = find_files(name, split)
        if found is None:
            rows = datasets.load_dataset(name, split=split)
        else:
            # Named as one split: by themselves the library's loaders guess splits from parts of names.
            loader, files = found
            options = {"data_files": {"train": [str(f) for f in files]}, "features": known_features(loader, files)}
            rows = datasets.load_dataset(loader, split="train", **options)
    if not len(rows):
        raise InputError(f"dataset {name}", found="no rows", expected="at least one")
    for column, feature in rows.features.items():
        if (
            undecoded := _undecoded(feature)
        ) != feature:  # of a picture a matter of words; lists of them are rewritten
            rows = rows.cast_column(column, undecoded)
    found = find_columns(rows.column_names, name, needs_target, **columns)
    return Source(name, rows, found, find_root(name, image_root))


@contextmanager
def unreadable_otherwise(name: str) -> Iterator[None]:
    """Turn what `datasets` raises of a dataset into an InputError."""
    try:
        yield
    except InputError:
        raise
    except _READING as error:
        reason = error.__cause__ or error  # the library wraps what a reader said
        found = " ".join(str(reason).split())[:400]
        remedy = None if Path(name).exists() else "There is no such folder here, so it was looked for on the hub."
        expected = "rows that `datasets` can read"
        raise InputError(f"dataset {name}", found=found, expected=expected, remedy=remedy) from error


def known_features(loader: str, files: Sequence[Path]) -> datasets.Features | None:
    """Return the columns of files whose loader would guess them from the first one; None for other loaders.

    Raises:
        InputError: see `features_of_tars`.
    """
    return features_of_tars(files) if loader == "webdataset" else None


def find_root(name: str, image_root: str | None) -> Path:
    """Return the folder that relative picture paths start from.

    Raises:
        InputError: `image_root` is no folder.
    """
    if image_root and not Path(image_root).is_dir():
        raise InputError("image_root", found=f"{image_root}, which is no folder", expected="a folder of pictures")
    path = Path(name)
    return Path(image_root) if image_root else (path if path.is_dir() else path.parent)


def open_sources(names: list[str], image_root: str | None, split: str, settings, open_one=open_source) -> list:
    """Open datasets with `settings.prompt_column`, `settings.target_column`, ... as overrides; see `open_source`."""
    columns = {role: getattr(settings, f"{role}_column", None) for role in ROLES}
    return [open_one(name, image_root, split, **columns) for name in names]


def find_files(name: str, split: str) -> tuple[str, list[Path]] | None:
    """Return the library's loader and the files of a dataset on this machine, None for one of the hub.

    Raises:
        InputError: nothing of that name, or files of no known kind.
    """
    path = Path(name)
    if path.exists():
        return _files_of(path, split)
    if path.is_absolute() or len(path.parts) != 2 or path.suffix in _LOADERS:
        raise InputError(f"dataset {name}", found="no such file or folder", expected=", ".join(_LOADERS))
    return None


def _files_of(path: Path, split: str) -> tuple[str, list[Path]]:
    """Return the loader's name and the files of a split: all of a folder, where none is named after a split.

    Raises:
        InputError: no known kind or several, another split only, or files of which one cannot say.
    """
    if path.is_file():
        if path.suffix.lower() not in _LOADERS:
            expected = f"a file of {', '.join(_LOADERS)}, or a folder"
            raise InputError(f"dataset {path}", found=f"a {path.suffix or 'nameless'} file", expected=expected)
        return _LOADERS[path.suffix.lower()], [path]
    found = {suffix: [f for f in sorted(path.rglob(f"*{suffix}")) if f.stem != "metadata"] for suffix in _IN_FOLDERS}
    found = {suffix: files for suffix, files in found.items() if files}
    if len(found) > 1:
        expected = "files of one kind"
        remedy = "Name those that are meant: dataset_name takes files, and several of them."
        raise InputError(f"dataset {path}", found=f"{' and '.join(found)} files", expected=expected, remedy=remedy)
    if not found:
        return "imagefolder", [file for file in sorted(path.rglob("*")) if file.is_file()]
    ((suffix, files),) = found.items()
    splits = {file: _split_of(file.relative_to(path)) for file in files}
    named = sorted({name for name in splits.values() if name})
    if named and split not in named:
        raise InputError(
            f"dataset_split {split} of {path}", found=f"files of {', '.join(named)}", expected=f"{split}-...{suffix}"
        )
    if named and None in splits.values():
        other = next(file for file, name in splits.items() if name is None)
        expected = "every file named after its split, or none"
        remedy = "Name the files that are meant: dataset_name takes several."
        found = f"{other.name} beside files of {', '.join(named)}"
        raise InputError(f"dataset {path}", found=found, expected=expected, remedy=remedy)
    return _LOADERS[suffix], [file for file in files if not named or splits[file] == split]


def _split_of(file: Path) -> str | None:
    """Return the split that a file is of, by its name (`train-0000.parquet`) or else its folder (`train/0000.tar`)."""
    if match := _SPLIT.match(file.name):
        return match[1].lower()
    return next((name.lower() for name in reversed(file.parent.parts) if name.lower() in _SPLITS), None)


def _undecoded(feature):
    """Return a feature with its pictures as bytes or paths; decoding is ours, so that a bad one is one bad row."""
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, list):
        return [_undecoded(feature[0])]
    if isinstance(getattr(feature, "feature", None), datasets.Image):
        return type(feature)(datasets.Image(decode=False))
    return feature


def read_prompt(row: dict, columns: Columns) -> str:
    """Return a row's prompt. Raises BrokenRow where it has none."""
    value = row[columns.prompt]
    if isinstance(value, dict):  # the .json of a webdataset
        value = next((value[name] for name in PROMPT_COLUMNS if value.get(name)), None)
    if isinstance(value, (list, tuple)):
        value = value[-1] if value else ""
    if not isinstance(value, str) or not value.strip():
        raise BrokenRow(f"no text in {columns.prompt}")
    try:
        value.encode()
    except UnicodeEncodeError:  # half of an emoji, such as in a caption that was cut
        raise BrokenRow(f"text in {columns.prompt} that is no Unicode") from None
    return value.strip()


def picture_of(value, column: str, root: Path):
    """Return what `PIL.Image.open` takes and a name for it, or None where the row has no such picture.

    Raises:
        BrokenRow: several pictures, or a file that is not there.
    """
    if isinstance(value, (list, tuple)):
        if len(value) > 1:
            raise BrokenRow(f"{len(value)} pictures in {column}, one is supported")
        value = value[0] if value else None
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if value is None or value == "":
        return None
    if isinstance(value, bytes):
        return io.BytesIO(value), column
    path = root / str(value)
    try:
        if path.is_file():
            return path, str(path)
    except (OSError, ValueError):  # a name too long, a zero byte in it: no path at all
        pass
    broken = BrokenRow(f"no file {str(path)[:200]}")
    broken.passing = True
    raise broken


def read_picture(value, column: str, root: Path, opaque: bool = False) -> Image.Image | None:
    """Decode a row's picture as 8-bit RGB, as it is shown; None where it has none.

    Raises:
        BrokenRow: it cannot be read, or must be `opaque` and is not.
    """
    found = picture_of(value, column, root)
    if found is None:
        return None
    with _broken_otherwise(found[1]):
        rgb, notes = to_rgb(ImageOps.exif_transpose(Image.open(found[0])), found[1])
    if opaque and TRANSPARENCY in notes:
        raise TransparentMask(f"{found[1]}: a mask with transparency, expected black and white")
    return rgb


@contextmanager
def _broken_otherwise(name: str) -> Iterator[None]:
    """Turn what Pillow raises of a picture, which is of many kinds, into a BrokenRow."""
    try:
        yield
    except MemoryError:
        raise
    except Image.DecompressionBombError:
        raise BrokenRow(f"{name}: too many pixels") from None
    except Exception as error:
        broken = BrokenRow(f"{name}: {' '.join(str(error).split())[:200] or type(error).__name__}")
        broken.passing = isinstance(error, OSError) and error.errno is not None  # what Pillow says has none
        raise broken from None


def read_pair(row: dict, columns: Columns, root: Path) -> Pair:
    """Decode a row.

    Raises:
        BrokenRow: no prompt, a picture that is missing or cannot be read, several sources, or no target.
    """
    prompt = read_prompt(row, columns)
    target = read_picture(row[columns.target], columns.target, root) if columns.target else None
    if target is None and columns.target:
        raise BrokenRow(f"no picture in {columns.target}")
    source = read_picture(row[columns.source], columns.source, root) if columns.source else None
    mask = read_picture(row[columns.mask], columns.mask, root, opaque=True) if columns.mask else None
    return Pair(prompt, target, source, None if mask is None else mask.convert("L"))


def measure(row: dict, columns: Columns, root: Path) -> dict:
    """Read a row's headers only.

    Returns:
        `width` and `height` of the target as it is shown (where none is needed, of the source, or 1 and 1),
        `is_edit`, `source_id` (same source picture, same number;
        for text-to-image by the prompt), `prompt`, `key` (a digest of text and pictures; of files their names, sizes
        and times), `error` ("" or the reason why the row is broken).
    """
    result = {"width": 0, "height": 0, "is_edit": False, "source_id": 0, "prompt": "", "key": "", "error": ""}
    try:
        prompt = read_prompt(row, columns)
        target = picture_of(row[columns.target], columns.target, root) if columns.target else None
        if target is None and columns.target:
            raise BrokenRow(f"no picture in {columns.target}")
        source = picture_of(row[columns.source], columns.source, root) if columns.source else None
        sizes = [picture_size(*picture) for picture in (target, source) if picture is not None]
        result["width"], result["height"] = sizes[0] if sizes else (1, 1)
        mask = picture_of(row[columns.mask], columns.mask, root) if columns.mask else None
        pictures = [b"" if place is None else _identity(place[0]) for place in (target, source, mask)]
        same = prompt.encode() if source is None else pictures[1]
        result |= {"is_edit": source is not None, "source_id": int.from_bytes(_digest(same)[:8], "big") >> 1}
        result |= {"prompt": prompt, "key": _digest(b"".join(map(_digest, [prompt.encode(), *pictures]))).hex()}
    except BrokenRow as broken:
        result["error"] = str(broken)
    return result


def picture_size(where, name: str) -> tuple[int, int]:
    """Return `(width, height)` of what `picture_of` returned, as it is shown, by its head. Raises BrokenRow."""
    with _broken_otherwise(name), Image.open(where) as image:
        width, height = image.size
        # Asked for EXIF that is not in its head, Pillow decodes a whole PNG to look behind the picture.
        exif = image.getexif() if image.format != "PNG" or "exif" in image.info else {}
        rotated = image.format != "TIFF" and exif.get(_EXIF_ORIENTATION) in _ROTATED  # Pillow turns TIFFs itself
    if not width or not height:
        raise BrokenRow(f"{name}: {width}x{height} pixels")
    return (height, width) if rotated else (width, height)


def _identity(where) -> bytes:
    """Return what tells a picture from others: its bytes, or a file's name, size and time."""
    if not isinstance(where, Path):
        return where.getvalue()
    stat = where.stat()
    return f"{where.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
