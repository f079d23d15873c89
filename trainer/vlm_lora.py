"""LoRAs of Qwen2.5-VL's language model, which itself stays as it is: in training, and as files.

They are in effect where the learned queries are read (`query_states`), and off where questions are answered: what
understands is the unchanged model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import nn

from ..core.checkpoint import read_header, save_tensors
from ..core.errors import InputError
from ..core.files import VLM_LORA_FILE, read_json
from ..core.micro import MICRO_QWEN_KEY
from .adapters import comfyui_tensors

_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NAME = "default"
_PEFT_PREFIX = "base_model.model.model.language_model."
"""As PEFT names layers where a whole Qwen2.5-VL is given to it."""
_UNREAD = ("alpha_pattern", "rank_pattern", "use_dora", "use_rslora")  # settings that would change the scale
_COMFYUI_KEYS = {3584: "qwen25_7b", 2048: "qwen25_3b"}
"""ComfyUI's names of Qwen2.5-VL by width: 7B and 3B; larger ones it does not load."""


def _language_model(vlm: nn.Module) -> nn.Module:
    return vlm.model.language_model


def lora_of(vlm: nn.Module) -> LoraConfig | None:
    """Return the settings of a Qwen2.5-VL's LoRA, None where it has none."""
    return getattr(_language_model(vlm), "peft_config", {}).get(_NAME)


def add_lora(vlm: nn.Module, r: int, alpha: float, seed: int) -> dict[str, nn.Parameter]:
    """Return the trainable weights of a LoRA on the language model's attention by their layers, in float32.

    A new one is drawn from `seed` and changes nothing yet; one that is there goes on.

    Raises:
        InputError: there is one of another rank or scale.
    """
    language, config = _language_model(vlm), lora_of(vlm)
    if config is None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            inject_adapter_in_model(LoraConfig(r=r, lora_alpha=alpha, target_modules=list(_TARGETS)), language, _NAME)
    elif (config.r, config.lora_alpha) != (r, alpha):
        found, expected = f"{r} with vlm_lora_alpha {alpha}", f"{config.r} with {config.lora_alpha}, as the model has"
        raise InputError("vlm_lora_r", found=found, expected=expected)
    weights = {name: p for name, p in language.named_parameters() if ".lora_" in name}
    for weight in weights.values():
        weight.data = weight.data.float()
        weight.requires_grad_(True)
    return weights


@contextmanager
def without_lora(vlm: nn.Module) -> Iterator[None]:
    """Switch a LoRA off meanwhile, if there is one."""
    if lora_of(vlm) is None:
        yield
        return
    language = _language_model(vlm)
    trained = [p for p in language.parameters() if p.requires_grad]
    _switch(language, on=False)
    try:
        yield
    finally:
        _switch(language, on=True)
        language.requires_grad_(False)  # switching on makes them trainable
        for weight in trained:
            weight.requires_grad_(True)


def _switch(language: nn.Module, on: bool) -> None:
    for module in language.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(on)


def own_weights(vlm: nn.Module) -> dict[str, torch.Tensor]:
    """Return Qwen2.5-VL's own weights by their own names, without those of a LoRA."""
    return {name.replace(".base_layer.", "."): p for name, p in vlm.state_dict().items() if ".lora_" not in name}


def save_lora(vlm: nn.Module, folder: Path) -> None:
    """Write a LoRA: for PEFT, and in `VLM_LORA_FILE` for ComfyUI's LoRA loaders, as one of the CLIP.

    Raises:
        InputError: the files cannot be written.
    """
    config, width = lora_of(vlm), vlm.config.text_config.hidden_size
    layers = {name: p.contiguous() for name, p in get_peft_model_state_dict(_language_model(vlm)).items()}
    config.save_pretrained(folder)
    save_tensors({f"{_PEFT_PREFIX}{name}": p for name, p in layers.items()}, folder / SAFETENSORS_WEIGHTS_NAME)
    key = MICRO_QWEN_KEY if width < min(_COMFYUI_KEYS) else _COMFYUI_KEYS.get(width)
    if key is not None:
        tensors, scale = comfyui_tensors(layers, config, f"text_encoders.{key}.transformer.model.")
        save_tensors(tensors, folder / VLM_LORA_FILE, scale)


def load_lora(vlm: nn.Module, folder: Path) -> None:
    """Put a LoRA that `save_lora` wrote onto a Qwen2.5-VL, frozen, in float32: a later stage hands it on as it is.

    Raises:
        InputError: a file is missing or broken, it is a LoRA of another model, or of a kind that is not trained here.
    """
    settings, path = read_json(folder / CONFIG_NAME, "settings of a LoRA"), folder / SAFETENSORS_WEIGHTS_NAME
    r, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(r) is not int or r < 1 or type(alpha) not in (int, float) or not alpha > 0:
        found, expected = f"r {r}, lora_alpha {alpha}", "a rank from 1 on, and a scale above 0"
        raise InputError(f"{folder / CONFIG_NAME}", found=found, expected=expected)
    unread = [name for name in _UNREAD if settings.get(name)]
    if unread:
        expected = "a LoRA as `unipic2 train metaquery` writes it"
        raise InputError(f"{folder / CONFIG_NAME}", found=", ".join(unread), expected=expected)
    shapes = read_header(path).shapes
    add_lora(vlm, r, alpha, seed=0)
    language = _language_model(vlm)
    own = {f"{_PEFT_PREFIX}{name}": tuple(p.shape) for name, p in get_peft_model_state_dict(language).items()}
    if own != shapes:
        found = f"{len(shapes)} tensors of another model"
        raise InputError(f"LoRA {path}", found=found, expected=f"{len(own)} of rank {r} for this Qwen2.5-VL")
    set_peft_model_state_dict(language, {n.removeprefix(_PEFT_PREFIX): p for n, p in load_file(path).items()})
    language.requires_grad_(False)
