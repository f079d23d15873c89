"""Load a micro model (published folder layout) into ComfyUI's own MODEL, CLIP and VAE. No nodes here."""

import inspect
import json
from functools import partial
from pathlib import Path

import comfy.clip_model
import comfy.latent_formats
import comfy.model_detection
import comfy.sd
import comfy.sd1_clip
import comfy.taesd.taesd
import comfy.utils
import folder_paths
import torch
from comfy.supported_models_base import ClipTarget

from ..core.checkpoint import check_transformer_config, read_component
from ..core.errors import InputError
from ..core.micro import BUNDLED_MODELS, TEXT_ENCODER_CONFIG, VAE_CONFIG, weights_dir
from . import micro_qwen

FOLDER_KEY = "unipic2"
_BUNDLED = {f"{name} (bundled)": weights_dir(name) for name in BUNDLED_MODELS}
DEFAULT_MODEL = next(iter(_BUNDLED))
CLIP_KEY = "unipic2_micro"
"""Key of the micro tokens in what `clip.tokenize` returns."""


def register_folder() -> None:
    """Make `models/unipic2` a model folder that `extra_model_paths.yaml` can extend."""
    folder_paths.add_model_folder_path(FOLDER_KEY, str(Path(folder_paths.models_dir) / FOLDER_KEY))


def available_models() -> dict[str, Path]:
    """Return name -> folder: the bundled models first, then every folder in `models/unipic2` with a transformer."""
    found = dict(_BUNDLED)
    for base in folder_paths.get_folder_paths(FOLDER_KEY):
        for config in sorted(Path(base).glob("*/transformer/config.json")):
            found.setdefault(config.parents[1].name, config.parents[1])
    return found


def load(folder: Path):
    """Return `(MODEL, CLIP, VAE)` of the micro model in `folder`.

    Raises:
        InputError: a file is missing, unreadable or truncated, its tensors are not those of a micro model,
            or its config disagrees with them.
    """
    model, width = _load_transformer(folder / "transformer")
    clip, context_width = _load_text_encoder(folder)
    if context_width not in (width, None):
        raise InputError(
            f"text encoder in {folder}", found=f"hidden_size {context_width}", expected=f"{width} (the transformer's)"
        )
    return model, clip, _load_vae(folder / "vae")


def _load_transformer(path):
    config = _read_config(path / "config.json")
    # A copy, because the conversion rewrites some tensors in place.
    diffusers = {key: tensor.clone() for key, tensor in read_component(path).items()}
    check_transformer_config(config, {k: tuple(t.shape) for k, t in diffusers.items()}, path / "config.json")
    _check_fused(path, diffusers, config["num_layers"])
    converted = comfy.model_detection.convert_diffusers_mmdit(diffusers) or {}
    if diffusers or not converted:
        raise InputError(
            f"{path}",
            found=f"{len(diffusers)} unknown tensors, for example {min(diffusers, default='none')!r}",
            expected="the tensors of a diffusers SD3Transformer2DModel",
        )
    context_width = converted["context_embedder.weight"].shape[1]
    shapes = {key: tuple(tensor.shape) for key, tensor in converted.items()}
    try:
        model = comfy.sd.load_diffusion_model_state_dict(converted)
    except RuntimeError as error:  # torch: "size mismatch for ..."
        raise InputError(f"{path}", found="tensors that do not fit together", remedy=f"{error}") from error
    if model is None:
        raise InputError(f"{path}", found="an unknown architecture", expected="an SD3 transformer")
    _check_tensors(path, shapes, model.model.diffusion_model.state_dict())
    return model, context_width


def _load_text_encoder(folder):
    """Return the CLIP and the width of its states; None where a connector stands between them and the transformer."""
    path = folder / "text_encoder"
    config_path = path / "config.json"
    config = _read_config(config_path)
    if config.get("model_type") == micro_qwen.MODEL_TYPE:
        return _load_qwen(folder, config, config_path), None
    config = {**TEXT_ENCODER_CONFIG, **config}
    missing = [key for key in ("vocab_size", "bos_token_id", "eos_token_id") if not isinstance(config.get(key), int)]
    if missing:
        raise InputError(f"{config_path}", found=f"no {', '.join(missing)}", expected="a CLIP text model's config")
    if config["hidden_act"] not in comfy.clip_model.ACTIVATIONS:
        raise InputError(f"{config_path}, hidden_act", found=config["hidden_act"], expected="gelu")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        _require_file(folder / "tokenizer" / name)
    weights = read_component(path)
    expected = _TextModel(config, None, "meta", torch.nn).state_dict()  # ComfyUI's layers may have none before loading
    _check_tensors(path, {key: tuple(tensor.shape) for key, tensor in weights.items()}, expected)

    clip = _clip(_clip_target(folder / "tokenizer", config), weights, weights["text_projection.weight"].dtype)
    return clip, config["hidden_size"]


def _load_qwen(folder, config, config_path):
    sizes = micro_qwen.read_config(config, config_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        _require_file(folder / "tokenizer" / name)
    weights = read_component(folder / "text_encoder")
    expected = micro_qwen.tensors(sizes)
    _check_tensors(folder / "text_encoder", {k: tuple(t.shape) for k, t in weights.items()}, expected)
    pad = config["text_config"].get("pad_token_id")
    target = micro_qwen.target(folder / "tokenizer", sizes, 0 if pad is None else pad)
    return _clip(target, weights, weights["model.embed_tokens.weight"].dtype)


def _clip(target, weights, dtype):
    """Return ComfyUI's CLIP of a target with its weights."""
    arguments = {
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


def _load_vae(path):
    config_path = path / "config.json"
    config = _read_config(config_path)
    for key, value in VAE_CONFIG.items():
        if config.get(key, value) != value:
            raise InputError(f"{config_path}, {key}", found=config[key], expected=value)
    weights = {_taesd_key(key): tensor for key, tensor in read_component(path).items()}
    expected = comfy.taesd.taesd.TAESD(latent_channels=VAE_CONFIG["latent_channels"]).state_dict()
    sd3 = comfy.latent_formats.SD3()
    # ComfyUI divides by these after encoding and SD3's latent format multiplies again: TAESD's latents come out.
    weights["vae_scale"] = torch.tensor(sd3.scale_factor)
    weights["vae_shift"] = torch.tensor(sd3.shift_factor)
    _check_tensors(path, {key: tuple(tensor.shape) for key, tensor in weights.items()}, expected)
    return comfy.sd.VAE(sd=weights)


def _taesd_key(key):
    """Rename a tensor of diffusers' `AutoencoderTiny`; ComfyUI's decoder counts the clamp as its first layer."""
    side, layers, *rest = key.split(".", 3)
    if layers != "layers" or len(rest) != 2 or not rest[0].isdecimal():
        return key
    index = int(rest[0]) + (side == "decoder")
    return f"taesd_{side}.{index}.{rest[1]}"


def _check_fused(path, weights, num_layers):
    """Require all parts of what ComfyUI fuses (query, key, value): it would leave a missing part uninitialised."""
    sizes = {"depth": num_layers, "num_blocks": num_layers}
    fused = {}
    for key, target in comfy.utils.mmdit_to_diffusers(sizes).items():
        fused.setdefault(target if isinstance(target, str) else target[0], []).append(key)
    parts = [part for part in fused.values() if any(key in weights for key in part)]
    _check_names(path, weights.keys(), {key for part in parts for key in part} | weights.keys())


def _check_names(path, found, expected):
    for kind, names in (("missing", expected - found), ("unknown", found - expected)):
        if names:
            raise InputError(
                f"{path}",
                found=f"{len(names)} {kind} tensors, for example {min(names)!r}",
                expected="the tensors of a micro UniPic2",
                remedy="Copy the file again or export it again.",
            )


def _check_tensors(path, found, expected):
    """Require that `found` (name -> shape) has exactly the names and shapes of `expected` (name -> tensor)."""
    _check_names(path, found.keys(), expected.keys())
    for name, tensor in expected.items():
        if found[name] != tuple(tensor.shape):
            raise InputError(f"{path}, tensor {name}", found=found[name], expected=tuple(tensor.shape))


def _require_file(path):
    if not path.is_file():
        raise InputError(
            f"{path}",
            found="no such file",
            expected="a complete micro model folder",
            remedy="Needed are transformer/, vae/, text_encoder/ and tokenizer/. Copy the folder again as a whole.",
        )


def _read_config(path) -> dict:
    _require_file(path)
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}", found=f"{error}", expected="a JSON object") from error
