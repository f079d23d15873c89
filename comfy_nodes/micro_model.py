"""Load a micro model (published folder layout) into ComfyUI's own MODEL, CLIP and VAE. No nodes here."""

import inspect
import logging
from functools import partial
from pathlib import Path

import comfy.clip_model
import comfy.sd
import comfy.sd1_clip
import folder_paths
import torch
from comfy.supported_models_base import ClipTarget

from ..core.checkpoint import read_component
from ..core.errors import InputError
from ..core.files import VLM_LORA_FILE, VLM_LORA_FOLDER
from ..core.micro import BUNDLED_MODELS, LORAS_DIR, TEXT_ENCODER_CONFIG, component_dir, weights_dir
from . import micro_qwen, published

_BUNDLED = {f"{name} (bundled)": weights_dir(name) for name in BUNDLED_MODELS}
DEFAULT_MODEL = next(iter(_BUNDLED))
CLIP_KEY = "unipic2_micro"
"""Key of the micro tokens in what `clip.tokenize` returns."""


def register_folders() -> None:
    """Make `models/unipic2` a model folder that `extra_model_paths.yaml` can extend, and offer the bundled LoRA."""
    folder_paths.add_model_folder_path(published.FOLDER_KEY, str(Path(folder_paths.models_dir) / published.FOLDER_KEY))
    folder_paths.add_model_folder_path("loras", str(LORAS_DIR))


def available_models() -> dict[str, Path]:
    """Return name -> folder: the bundled models first, then every folder in `models/unipic2` with a transformer."""
    found = dict(_BUNDLED)
    for base in folder_paths.get_folder_paths(published.FOLDER_KEY):
        for config in sorted(Path(base).glob("*/transformer/config.json")):
            found.setdefault(config.parents[1].name, config.parents[1])
    return found


def load(folder: Path):
    """Return `(MODEL, CLIP, VAE)` of the micro model in `folder`.

    Raises:
        InputError: a file is missing, unreadable or truncated, its tensors are not those of a micro model,
            or its config disagrees with them.
    """
    model, width = published.load_transformer(folder / "transformer")
    clip, context_width = _load_text_encoder(folder)
    published.reload_with(clip.patcher, _load_clip_patcher, folder)
    if context_width not in (width, None):
        raise InputError(
            f"text encoder in {folder}", found=f"hidden_size {context_width}", expected=f"{width} (the transformer's)"
        )
    return published.with_trained_shift(model, folder), clip, published.load_vae(component_dir(folder, "vae"))


def _load_clip_patcher(folder, **loading):
    """Return what `published.reload_with` asks for: the ModelPatcher of a new CLIP, in a tuple."""
    return (_load_text_encoder(folder, **loading)[0].patcher,)


def _load_text_encoder(folder, **loading):
    """Return the CLIP and the width of its states; None where a connector stands between them and the transformer.

    `loading` as in `published.load_transformer`.
    """
    path, tokenizer = component_dir(folder, "text_encoder"), component_dir(folder, "tokenizer")
    config_path = path / "config.json"
    config = published.read_config(config_path)
    if config.get("model_type") == micro_qwen.MODEL_TYPE:
        return _load_qwen(path, tokenizer, config, loading), None
    config = {**TEXT_ENCODER_CONFIG, **config}
    missing = [key for key in ("vocab_size", "bos_token_id", "eos_token_id") if not isinstance(config.get(key), int)]
    if missing:
        raise InputError(f"{config_path}", found=f"no {', '.join(missing)}", expected="a CLIP text model's config")
    if config["hidden_act"] not in comfy.clip_model.ACTIVATIONS:
        raise InputError(f"{config_path}, hidden_act", found=config["hidden_act"], expected="gelu")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        published.require_file(tokenizer / name)
    weights = read_component(path)
    expected = _TextModel(config, None, "meta", torch.nn).state_dict()  # ComfyUI's layers may have none before loading
    published.check_tensors(path, {key: tuple(tensor.shape) for key, tensor in weights.items()}, expected)

    clip = _clip(_clip_target(tokenizer, config), weights, weights["text_projection.weight"].dtype, loading)
    return clip, config["hidden_size"]


def _load_qwen(path, tokenizer, config, loading):
    sizes = micro_qwen.read_config(config, path / "config.json")
    published.require_file(tokenizer / "tokenizer.json")
    lora = path.parent / VLM_LORA_FOLDER / VLM_LORA_FILE
    if lora.is_file():
        logging.warning(
            "UniPic2: %s is not loaded with the model; put it into models/loras and load it with Load LoRA.", lora
        )
    weights = read_component(path)
    expected = micro_qwen.tensors(sizes)
    published.check_tensors(path, {k: tuple(t.shape) for k, t in weights.items()}, expected)
    pad = config["text_config"].get("pad_token_id")
    target = micro_qwen.target(tokenizer, sizes, 0 if pad is None else pad)
    return _clip(target, weights, weights["model.embed_tokens.weight"].dtype, loading)


def _clip(target, weights, dtype, loading):
    """Return ComfyUI's CLIP of a target with its weights."""
    arguments = {
        **loading,
        "embedding_directory": folder_paths.get_folder_paths("embeddings"),
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        "model_options": {"dtype": dtype},
    }
    # ComfyUI loads the weights in the constructor from 0.4 on; before that afterwards.
    in_constructor = "state_dict" in inspect.signature(comfy.sd.CLIP.__init__).parameters
    if in_constructor:
        arguments["state_dict"] = [weights]
    clip = comfy.sd.CLIP(target, **arguments)
    if not in_constructor:
        clip.load_sd(weights)
    return clip


def _clip_target(tokenizer_folder, config):
    """Describe the micro text encoder to `comfy.sd.CLIP`, with SD3's conventions for CLIP.

    The conditioning is the state before the last layer without the final norm; pooled is the projected end token.
    """
    start, end, length = config["bos_token_id"], config["eos_token_id"], config["max_position_embeddings"]
    text_model = partial(
        comfy.sd1_clip.SDClipModel,
        max_length=length,
        layer="hidden",
        layer_idx=-2,
        textmodel_json_config=config,
        model_class=_TextModel,
        special_tokens={"start": start, "end": end, "pad": end},
        layer_norm_hidden_state=False,
        return_projected_pooled=True,
    )
    tokenizer = partial(
        comfy.sd1_clip.SDTokenizer,
        str(tokenizer_folder),
        max_length=length,
        embedding_size=config["hidden_size"],
        embedding_key=CLIP_KEY,
    )
    return ClipTarget(
        partial(comfy.sd1_clip.SD1Tokenizer, name=CLIP_KEY, tokenizer=tokenizer),
        partial(comfy.sd1_clip.SD1ClipModel, name=CLIP_KEY, clip_model=text_model),
    )


class _TextModel(comfy.clip_model.CLIPTextModel):
    """ComfyUI's CLIP text model with the vocabulary of the config instead of CLIP's 49408 tokens."""

    def __init__(self, config, dtype, device, operations):
        super().__init__(config, dtype, device, operations)
        embedding = operations.Embedding(config["vocab_size"], config["hidden_size"], dtype=dtype, device=device)
        self.set_input_embeddings(embedding)
