"""What of the transformer is trained: all of it, its attention, or LoRAs; and LoRAs as files."""

from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE as LORA_WEIGHTS_FILE
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from ..core.checkpoint import read_header, save_tensors
from ..core.errors import InputError
from ..core.files import COMFYUI_LORA

TRAINABLE = ("full", "attention")
LORA_TARGETS = {
    "attention": ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"],
    "ff": ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"],
}
"""Short names for groups of modules; anything else in `lora_target_modules` is a module's name or its end."""


def lora_config(r: int, alpha: int, dropout: float, targets: list[str]) -> LoraConfig:
    """Return PEFT's settings of a LoRA.

    Args:
        r: rank.
        alpha: the update is scaled by alpha / r.
        dropout: share of inputs that a LoRA does not see in training, 0 to 1.
        targets: names of modules, `attention` (joint and dual attention) or `ff` (both feed-forwards).

    Raises:
        InputError: numbers out of range.
    """
    if r < 1:
        raise InputError("lora_r", found=r, expected="at least 1")
    if not 0 <= dropout < 1:
        raise InputError("lora_dropout", found=dropout, expected="a share from 0 to below 1")
    modules = [module for target in targets for module in LORA_TARGETS.get(target, [target])]
    return LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=modules)


def prepare(transformer: torch.nn.Module, trainable: str, peft_config: LoraConfig | None, seed: int) -> None:
    """Set which parameters of a transformer are trained, those in float32; LoRAs are added, drawn from `seed`.

    Frozen weights keep their type.

    Raises:
        InputError: a LoRA target that names no module.
    """
    transformer.requires_grad_(False)
    if peft_config is not None:
        names = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
        for target in peft_config.target_modules:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                expected = "a linear layer of the transformer, `attention` or `ff`"
                raise InputError("lora_target_modules", found=repr(target), expected=expected)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            transformer.add_adapter(peft_config)
    else:
        for name, parameter in transformer.named_parameters():
            in_attention = ".attn." in name or ".attn2." in name
            parameter.requires_grad_(trainable == "full" or (trainable == "attention" and in_attention))
    cast_training_params(transformer, dtype=torch.float32)


def load_lora(transformer: torch.nn.Module, folder: str | Path) -> None:
    """Put the weights of a LoRA, as `save_lora` wrote it, into the adapter that the transformer has.

    Raises:
        InputError: no such file, or another rank, scale or other targets than the adapter's.
    """
    path = Path(folder) / LORA_WEIGHTS_FILE
    if not path.is_file():
        raise InputError(f"LoRA {folder}", found=f"no {LORA_WEIGHTS_FILE}", expected="a folder that training exported")
    layers = {key.removeprefix("transformer."): tensor for key, tensor in load_file(path).items()}
    own = {key: tuple(tensor.shape) for key, tensor in get_peft_model_state_dict(transformer).items()}
    scale = read_header(Path(folder) / COMFYUI_LORA).metadata.get("unipic2.lora_alpha")
    same_scale = scale is None or float(scale) == transformer.peft_config["default"].lora_alpha
    if not same_scale or own != {key: tuple(tensor.shape) for key, tensor in layers.items()}:
        remedy = "Take the lora_r, lora_alpha and lora_target_modules that it was trained with."
        raise InputError(
            f"LoRA {path}", found="another rank, scale or other targets", expected="these settings'", remedy=remedy
        )
    set_peft_model_state_dict(transformer, layers)


def save_lora(pipeline, folder: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a transformer's LoRA to `folder`: one file for diffusers and PEFT, one for ComfyUI's LoRA loaders.

    They hold the same weights. ComfyUI reads the scale from `.alpha` tensors and would take 1 without them; diffusers
    reads it from the metadata and refuses such tensors. `metadata` is added to ComfyUI's file.

    Raises:
        InputError: the files cannot be written.
    """
    transformer = pipeline.transformer
    config = transformer.peft_config["default"]
    layers = get_peft_model_state_dict(transformer)
    pipeline.save_lora_weights(
        folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=config.to_dict()
    )
    tensors, scale = comfyui_tensors(layers, config, "transformer.")
    save_tensors(tensors, folder / COMFYUI_LORA, {**scale, **(metadata or {})})


def comfyui_tensors(
    layers: dict[str, torch.Tensor], config: LoraConfig, prefix: str
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file for ComfyUI's LoRA loaders: with an `.alpha` for each layer."""
    tensors = {f"{prefix}{key}": tensor.contiguous() for key, tensor in layers.items()}
    for key in layers:
        if key.endswith(".lora_A.weight"):
            tensors[f"{prefix}{key.removesuffix('.lora_A.weight')}.alpha"] = torch.tensor(float(config.lora_alpha))
    return tensors, {"unipic2.lora_r": str(config.r), "unipic2.lora_alpha": str(config.lora_alpha)}
