"""The checkpoint contract: what a file is (by its keys), the published folder layout, and the single file.

Only safetensors are read; headers are checked before any weight is touched, so a wrong or broken file is named
at once. Writing goes to a temporary file that is renamed, so a full disk leaves nothing half-written.
"""

import json
import math
import os
import re
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from .errors import InputError
from .files import cannot_write, read_json, write_file

TRANSFORMER_FILE = "diffusion_pytorch_model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
DIFFUSERS_SD3, COMFYUI_SD3, LORA, CONNECTOR, UNKNOWN = (
    "diffusers SD3 transformer", "ComfyUI SD3 transformer", "LoRA", "MetaQuery connector", "unknown",
)  # fmt: skip
SHIFT_KEY, DYNAMIC_SHIFT_KEY = "unipic2.shift", "unipic2.dynamic_shift"
"""Metadata of a trained file: its shift, or JSON of `base_shift` and `max_shift`, if it is by the picture's size."""
_OURS = "unipic2."
_PICKLE_SUFFIXES = {".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle"}
_HEADER_LIMIT = 100_000_000  # bytes; the format's own limit
_HEAD_DIM = 64
_CONFIG_KEYS = (
    "pos_embed.pos_embed", "context_embedder.weight", "time_text_embed.text_embedder.linear_1.weight",
    "proj_out.weight",
)  # fmt: skip
"""Tensors that `transformer_config` reads sizes from, beside those that tell the format."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says about itself. Example: `Header({"proj_out.bias": (64,)}, {"format": "pt"})`."""

    shapes: dict[str, tuple[int, ...]]
    """Shape of every tensor by its key."""
    metadata: dict[str, str]
    """The file's free text entries."""


def read_header(path: str | Path) -> Header:
    """Read and check the header of a safetensors file without reading its weights.

    Raises:
        InputError: the file is missing, a pickle, not safetensors, or shorter than its header says.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"checkpoint {path}", found="no such file", expected="a .safetensors file")
    if path.suffix.lower() in _PICKLE_SUFFIXES:
        raise InputError(
            f"checkpoint {path}",
            found=f"a {path.suffix} file, which can run code when it is opened",
            expected="safetensors",
            remedy="Convert it to safetensors where it was made.",
        )
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= _HEADER_LIMIT:
            raise InputError(f"checkpoint {path}", found="no safetensors header", expected="a safetensors file")
        try:
            entries = json.loads(file.read(length))
            metadata = entries.pop("__metadata__", {})
            needed = 8 + length + max((e["data_offsets"][1] for e in entries.values()), default=0)
            shapes = {key: tuple(e["shape"]) for key, e in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            remedy = "It was probably cut off while downloading or copying: fetch it again."
            raise InputError(f"checkpoint {path}", found="a broken safetensors header", remedy=remedy) from None
    if size < needed:
        raise InputError(
            f"checkpoint {path}",
            found=f"{size} bytes",
            expected=f"{needed} bytes",
            remedy="The file was cut off while downloading or copying: fetch it again.",
        )
    return Header(shapes, metadata)


def detect_format(keys: Mapping[str, object] | set[str]) -> str:
    """Tell what a file holds from its keys alone, never from its name.

    Returns:
        One of `DIFFUSERS_SD3`, `COMFYUI_SD3`, `LORA`, `CONNECTOR`, `UNKNOWN`.
    """
    if any(re.search(r"\.(lora_[AB]|lora_up|lora_down|lora\.up|lora\.down)\.", key) for key in keys):
        return LORA
    if "pos_embed.proj.weight" in keys and "transformer_blocks.0.attn.add_q_proj.weight" in keys:
        return DIFFUSERS_SD3
    if any(key.endswith("joint_blocks.0.context_block.attn.qkv.weight") for key in keys):
        return COMFYUI_SD3
    if "meta_queries" in keys and any(key.startswith("connector.layers.") for key in keys):
        return CONNECTOR
    return UNKNOWN


def transformer_config(shapes: Mapping[str, tuple[int, ...]]) -> dict:
    """Derive the diffusers config of an SD3 transformer from the shapes of its diffusers-keyed weights.

    `sample_size` is not in the weights; SD3.5-Medium's 128 is returned.

    Raises:
        InputError: the keys are not those of a diffusers SD3 transformer, or one that a size is read from is missing.
    """
    kind = detect_format(shapes)
    if kind != DIFFUSERS_SD3:
        raise InputError("transformer weights", found=kind, expected=DIFFUSERS_SD3)
    missing = [key for key in _CONFIG_KEYS if key not in shapes]
    if missing:
        remedy = "The file is incomplete: fetch or export it again."
        raise InputError("transformer weights", found=f"no {', '.join(missing)}", expected=kind, remedy=remedy)
    width, in_channels, patch_size, _ = shapes["pos_embed.proj.weight"]
    blocks = {int(m[1]) for key in shapes if (m := re.match(r"transformer_blocks\.(\d+)\.", key))}
    dual = {int(m[1]) for key in shapes if (m := re.match(r"transformer_blocks\.(\d+)\.attn2\.", key))}
    return {
        "sample_size": 128,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0] // patch_size**2,
        "num_layers": len(blocks),
        "attention_head_dim": _HEAD_DIM,
        "num_attention_heads": width // _HEAD_DIM,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "caption_projection_dim": shapes["context_embedder.weight"][0],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "pos_embed_max_size": math.isqrt(shapes["pos_embed.pos_embed"][1]),
        "dual_attention_layers": sorted(dual),
        "qk_norm": "rms_norm" if "transformer_blocks.0.attn.norm_q.weight" in shapes else None,
    }


def config_disagrees(field: str, written: object, real: object, path: str | Path) -> InputError:
    """Return the error for a field of the config at `path` that is not what its weights have."""
    return InputError(
        f"{field} in {path}",
        found="nothing" if written is None else written,
        expected=f"{real}, which is what the weights have",
        remedy="Use the config.json that belongs to these weights.",
    )


def check_transformer_config(config: Mapping, shapes: Mapping[str, tuple[int, ...]], path: str | Path) -> None:
    """Compare a `config.json` with the weights beside it.

    Raises:
        InputError: names the first field on which they disagree.
    """
    real = transformer_config(shapes)
    for name, value in real.items():
        written = config.get(name)
        written = list(written) if isinstance(written, (list, tuple)) else written
        absent = name not in config and not value  # no dual attention, no norm: an absent field says the same
        if name != "sample_size" and written != value and not absent:
            raise config_disagrees(name, written, value, path)


def component_files(folder: str | Path) -> list[Path]:
    """Return the safetensors files of one component folder (`transformer/`, ...): one, or all shards of an index.

    Variants (`model.fp16.safetensors` beside `model.safetensors`) hold the same weights again and are left out.

    Raises:
        InputError: no safetensors there, the index is broken, or a shard that it names is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"model folder {folder}", found="no such folder", expected="a folder with safetensors")
    indices = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    if indices:
        files = [folder / name for name in _shard_names(indices[0])]
        missing = [f.name for f in files if not f.is_file()]
        if missing:
            found = f"no {', '.join(missing)}"
            raise InputError(f"sharded model {folder}", found=found, expected=f"{len(files)} shards")
        return files
    files = sorted(folder.glob("*.safetensors"))
    names = {file.name for file in files}
    files = [f for f in files if "." not in f.stem or f"{f.name.split('.')[0]}.safetensors" not in names]
    if not files:
        pickles = [f.name for f in folder.iterdir() if f.suffix in _PICKLE_SUFFIXES]
        found = f"only {', '.join(pickles)}, which can run code when opened" if pickles else "no safetensors file"
        raise InputError(f"model folder {folder}", found=found, expected="safetensors weights")
    return files


def _shard_names(index: Path) -> list[str]:
    """Return the file names that an index lists, without any folder in front."""
    try:
        names = {Path(name).name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError):
        names = set()
    if not names:
        raise InputError(
            f"file {index}",
            found="no list of shards",
            expected='{"weight_map": {"tensor": "file.safetensors", ...}}',
            remedy="Fetch the index again; it belongs to the shards beside it.",
        )
    return sorted(names)


def read_component(folder: str | Path) -> dict[str, torch.Tensor]:
    """Load all tensors of one component folder; headers are checked first.

    Raises:
        InputError: as `component_files` and `read_header`.
    """
    return read_files(component_files(folder))


def read_files(files: list[Path]) -> dict[str, torch.Tensor]:
    """Load all tensors of safetensors files; headers are checked first. Raises InputError, see `read_header`."""
    for file in files:
        read_header(file)
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors.update(load_file(file))
    return tensors


def shift_of_scheduler(config: Mapping) -> dict[str, str]:
    """Return what the config of a flow-matching scheduler says of the timestep shift, as a file's metadata say it."""
    if config.get("use_dynamic_shifting"):
        return {DYNAMIC_SHIFT_KEY: json.dumps({name: config.get(name) for name in ("base_shift", "max_shift")})}
    return {} if config.get("shift") is None else {SHIFT_KEY: str(config["shift"])}


def trained_shift(metadata: Mapping[str, str], where: str | Path) -> float | None:
    """Return the shift in a file's metadata; None where there is none, or one by the picture's size.

    Raises:
        InputError: it is no number above 0; `where` says of what.
    """
    if SHIFT_KEY not in metadata:
        return None
    try:
        value = float(metadata[SHIFT_KEY])
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise InputError(f"{where}, shift", found=repr(metadata[SHIFT_KEY]), expected="a number above 0")
    return value


def save_tensors(
    tensors: Mapping[str, torch.Tensor], path: str | Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file as a whole or not at all.

    Raises:
        InputError: the folder does not exist or cannot be written, or the disk is full.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"output {path}", found="no such folder", expected="an existing folder")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            mode = os.fstat(file.fileno()).st_mode  # as the user's umask has it; safetensors makes files private
        save_file(dict(tensors), temporary, metadata={"format": "pt", **(metadata or {})})
        _sort_metadata(temporary)
        temporary.chmod(mode)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _sort_metadata(path: Path) -> None:
    """Sort a file's metadata in place: safetensors writes them in a random order, and equal files should be equal."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        metadata = dict(sorted(header.pop("__metadata__").items()))
        text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # the format allows spaces at the end
            file.seek(8)
            file.write(text.ljust(size))


def cast_file(path: str | Path, dtype: torch.dtype, metadata: dict[str, str] | None = None) -> None:
    """Rewrite a safetensors file with its floating-point tensors in `dtype`; `metadata` is added to its own."""
    header = read_header(path)
    tensors = {k: t.to(dtype) if t.is_floating_point() else t for k, t in load_file(path).items()}
    save_tensors(tensors, path, {**header.metadata, **(metadata or {})})


def _without_shift(metadata: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key not in (SHIFT_KEY, DYNAMIC_SHIFT_KEY)}


def export_single_file(
    folder: str | Path,
    path: str | Path,
    metadata: dict[str, str] | None = None,
    dtype: torch.dtype | None = None,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Merge `folder/transformer` (published layout, sharded or not) into one file that ComfyUI's UNETLoader reads.

    Keys stay diffusers' own, which ComfyUI converts on loading. The file records its source format, and what the
    trainer wrote into the folder's. Floating-point tensors are cast to `dtype`; None keeps their own. `weights` of the
    same names take the place of the folder's.

    Raises:
        InputError: the folder holds no SD3 transformer, or the file cannot be written.
    """
    part = Path(folder) / "transformer"
    tensors = read_component(part)
    transformer_config({k: tuple(t.shape) for k, t in tensors.items()})
    if weights is not None:
        tensors = {k: weights[k].to(t.dtype) for k, t in tensors.items()}
    kept = {k: v for k, v in read_header(component_files(part)[0]).metadata.items() if k.startswith(_OURS)}
    scheduler = Path(folder) / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():  # it may be newer than the weights, of which a part was not trained again
        kept = _without_shift(kept) | shift_of_scheduler(read_json(scheduler, "a scheduler's settings"))
    if metadata is not None and _without_shift(metadata) != metadata:
        kept = _without_shift(kept)
    if dtype is not None:
        tensors = {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}
    save_tensors(tensors, path, {"format": "pt", **kept, "unipic2.format": DIFFUSERS_SD3, **(metadata or {})})


def import_single_file(path: str | Path, folder: str | Path) -> None:
    """Write a diffusers-keyed single file back as `folder/transformer` with a config derived from its shapes.

    Raises:
        InputError: the file is not a diffusers SD3 transformer, or the folder already has one.
    """
    config = transformer_config(read_header(path).shapes)
    target = Path(folder) / "transformer"
    if target.exists():
        raise InputError(f"folder {target}", found="it exists already", remedy="Choose a new folder.")
    text = json.dumps({"_class_name": "SD3Transformer2DKontextModel", **config}, indent=2)
    unfinished = target.with_name(f".transformer.{os.getpid()}.tmp")
    unfinished.mkdir(parents=True)
    try:
        with safe_open(path, framework="pt") as file:
            save_tensors({k: file.get_tensor(k) for k in file.keys()}, unfinished / TRANSFORMER_FILE)  # noqa: SIM118
        write_file(unfinished / "config.json", text + "\n")
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
