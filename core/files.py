"""Files are written whole or not at all, and folders of ours only replace folders of ours."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from .errors import InputError

PIPELINE_INDEX, COMFYUI_LORA = "model_index.json", "comfyui_lora.safetensors"
"""Files that tell an exported pipeline, and an exported LoRA, from any other folder."""
VLM_LORA_FOLDER, VLM_LORA_FILE = "text_encoder_lora", "comfyui_clip_lora.safetensors"
"""Where a MetaQuery model has the LoRA of its language model, and which file of it ComfyUI's Load LoRA reads."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


def cannot_write(path: str | Path, error: Exception) -> InputError:
    """Return the error that tells people why `path` could not be written; a full disk is said in those words."""
    full = getattr(error, "errno", None) in _FULL or "No space left" in str(error)
    found = "a full disk" if full else getattr(error, "strerror", None) or error
    remedy = "Free some space or choose another folder; nothing was left half-written." if full else None
    return InputError(f"writing {path}", found=found, remedy=remedy)


def write_file(path: Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) through a temporary file beside `path`: the file is whole, or as it was before.

    Raises:
        InputError: full disk, no permission, ...
    """
    data = data.encode() if isinstance(data, str) else data
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:  # one of a killed process that had this number is no hindrance
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def check_replaceable(folder: Path) -> None:
    """Refuse to replace what is not an exported pipeline or LoRA.

    Raises:
        InputError: `folder` is a file, or a folder with other things in it.
    """
    ours = any((folder / name).is_file() for name in (PIPELINE_INDEX, COMFYUI_LORA))
    if ours or (folder.is_dir() and not any(folder.iterdir())):
        return
    if folder.exists():
        found = "a file" if not folder.is_dir() else f"a folder without {PIPELINE_INDEX} or {COMFYUI_LORA}"
        expected = "a new folder, an empty one, or an exported pipeline or LoRA, which is replaced"
        raise InputError(f"output {folder}", found=found, expected=expected)


@contextlib.contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Yield a path beside `folder` to write a new one at, which then takes its place; all or nothing.

    The old one is there until the new one can be. A process that is killed leaves no half of either in that place.

    Raises:
        InputError: it cannot be written, or the disk is full; what was there stays.
    """
    unfinished, old = (folder.with_name(f".{folder.name}.{what}") for what in ("unfinished", "old"))
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        yield unfinished
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        try:
            unfinished.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def read_json(path: Path, expected: str) -> dict:
    """Return a JSON object. Raises InputError, saying what was expected, where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"file {path}", found="no such file", expected=expected) from None
    except ValueError as error:
        raise InputError(f"file {path}", found=f"broken JSON ({error})", expected=expected) from None
    if not isinstance(content, dict):
        raise InputError(f"file {path}", found=f"{type(content).__name__} instead of an object", expected=expected)
    return content
