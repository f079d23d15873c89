"""LoRAs on top of a model that is drawn with, or merged into its weights."""

from inspect import signature
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..core.checkpoint import read_header
from ..core.errors import InputError
from ..core.files import COMFYUI_LORA
from .adapters import LORA_WEIGHTS_FILE
from .kontext_pipeline import StableDiffusion3KontextPipeline
from .metaquery_pipeline import load_transformer


def _file_of(path: Path) -> Path:
    return path / LORA_WEIGHTS_FILE if path.is_dir() else path


def add_lora(pipeline: StableDiffusion3KontextPipeline, path: Path) -> Path:
    """Put a LoRA on a pipeline's transformer: an exported folder, or diffusers' file; returns the file.

    Raises:
        InputError: no such file, or one that is not for this transformer.
    """
    file = _file_of(path)
    try:
        pipeline.load_lora_weights(file.parent, weight_name=file.name, local_files_only=True, use_safetensors=True)
        found = None if getattr(pipeline.transformer, "peft_config", None) else "nothing for this transformer"
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        found = " ".join(str(error).split())[:400] if file.is_file() else "no such file"
    if found is not None:
        expected = f"a folder that training exported, or its {LORA_WEIGHTS_FILE}"
        raise InputError(f"--lora {file}", found=found, expected=expected)
    return file


def merged(folder: Path, path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return a transformer's weights with a LoRA merged into them, float32, and how the LoRA was made.

    Args:
        folder: pipeline folder; only its `transformer/` is read.
        path: as for `add_lora`.

    Raises:
        InputError: see `add_lora`; or it has layers of text encoders, too.
    """
    file = _file_of(path)
    layers = read_header(file).shapes if file.is_file() else {}
    if other := next((key for key in layers if key.startswith("text_encoder")), None):
        expected = "layers of the transformer alone: the file has no text encoder"
        raise InputError(f"--lora {file}", found=other, expected=expected)
    transformer = load_transformer(folder, torch.float32)
    others = dict.fromkeys(signature(StableDiffusion3KontextPipeline).parameters)
    add_lora(StableDiffusion3KontextPipeline(**{**others, "transformer": transformer}), path)
    transformer.fuse_lora()
    transformer.unload_lora()
    beside = file.with_name(COMFYUI_LORA)
    said = read_header(beside).metadata if beside.is_file() else {}
    return transformer.state_dict(), {k: v for k, v in said.items() if k.startswith("unipic2.") and ".lora_" not in k}
