"""Load parts of folders in the published layout, and single files, through ComfyUI's own loaders. No nodes here."""

import logging
from contextlib import contextmanager, suppress
from pathlib import Path

import comfy.latent_formats
import comfy.model_detection
import comfy.sd
import comfy.taesd.taesd
import comfy.utils
import folder_paths
import torch
from safetensors import safe_open

from ..core.checkpoint import (
    COMFYUI_SD3,
    DIFFUSERS_SD3,
    DYNAMIC_SHIFT_KEY,
    LORA,
    check_transformer_config,
    component_files,
    detect_format,
    read_component,
    read_files,
    read_header,
    shift_of_scheduler,
    trained_shift,
    transformer_config,
)
from ..core.errors import InputError
from ..core.files import read_json
from ..core.micro import VAE_CONFIG, component_dir
from . import kontext

FOLDER_KEY = "unipic2"
WEIGHT_DTYPES = {
    "default": {},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}
"""Choices of the stock Load Diffusion Model, and what ComfyUI's loaders take for them."""
_OF_A_VAE, _OF_A_TINY_VAE = "first_stage_model.", ("encoder.layers.", "decoder.layers.")
_FIRST = "joint_blocks.0.context_block.attn.qkv.weight"  # what stands before it is the file's prefix


def available(models: dict[str, Path]) -> dict[str, Path]:
    """Return name -> path: folders and files in `models/unipic2`, then those in `models/diffusion_models`.

    A folder in the published layout among the latter is an entry, too; its shards, VAE and text encoders are not.

    Args:
        models: the folders, `micro_model.available_models()`.
    """
    found = dict(models)
    for base in folder_paths.get_folder_paths(FOLDER_KEY):
        for file in sorted(Path(base).glob("*.safetensors")):
            found.setdefault(file.name, file)
    files, folders = listed("diffusion_models"), {}
    for name, path in files.items():
        part = Path(name).parent
        if part.name == "transformer" and part.parent.name and (path.parent / "config.json").is_file():
            folders[str(part.parent)] = path.parent.parent
    roots = set(folders.values())
    folders |= {name: path for name, path in files.items() if not _is_part(path, roots)}
    return found | {name: path for name, path in folders.items() if name not in found}


def _is_part(path, roots: set[Path]) -> bool:
    """Return whether a file is of no use without the others of a folder in the published layout."""
    if path.parent.parent not in roots:
        return False
    return path.parent.name != "transformer" and (path.parent / "config.json").is_file() or "-of-" in path.name


def listed(key: str) -> dict[str, Path]:
    """Return name -> path of the files in a model folder of ComfyUI; links that lead nowhere are left out."""
    paths = {name: folder_paths.get_full_path(key, name) for name in folder_paths.get_filename_list(key)}
    return {name: Path(path) for name, path in paths.items() if path is not None}


def load(path, weight_dtype: str, node: str):
    """Return `(MODEL, VAE)` of a folder in the published layout, or of one file; the MODEL with editing enabled.

    Args:
        path: folder with `transformer/` (sharded or not) and perhaps `vae/`, or a file with diffusers' or ComfyUI's
            keys, perhaps a whole checkpoint.
        weight_dtype: one of `WEIGHT_DTYPES`.
        node: what errors name.

    Without a VAE that output is one that ComfyUI's own nodes refuse with a clear message.

    Raises:
        InputError: a file is missing, broken, or of another kind.
    """
    options = WEIGHT_DTYPES[weight_dtype]
    if path.is_dir():
        model, _ = load_transformer(path / "transformer", options)
        folder = component_dir(path, "vae")
        vae = load_vae(folder) if folder.is_dir() else None
    else:
        model, vae = _load_file(path, options, node)
    model = kontext.enable_editing(with_trained_shift(model, path))
    return model, comfy.sd.VAE(sd={}) if vae is None else vae


def with_trained_shift(model, path):
    """Return a MODEL with the timestep shift that a folder's scheduler or a file's metadata names.

    ModelSamplingSD3 sets it. A shift by the picture's size is left to the artist's ModelSamplingFlux; the log says so.

    Raises:
        InputError: that is no number above 0.
    """
    where = path / "scheduler" / "scheduler_config.json"
    if where.is_file():
        metadata = shift_of_scheduler(read_config(where))
    else:  # a file, or `transformer/` alone was copied: an export says it there, too
        where = component_files(path / "transformer")[0] if path.is_dir() else path
        metadata = read_header(where).metadata
    if DYNAMIC_SHIFT_KEY in metadata:
        said = "%s: trained with a shift by the picture's size; put ModelSamplingFlux behind it: %s"
        logging.warning(said, path.name, metadata[DYNAMIC_SHIFT_KEY])
    shift = trained_shift(metadata, where)
    if shift in (None, model.get_model_object("model_sampling").shift):
        return model
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3  # imports `nodes`, and with it ComfyUI's server

    return ModelSamplingSD3().patch(model, shift)[0]


def loaded_from(patcher, loader: str):
    """Return the file, or files, that a function of `comfy.sd` made a patcher of; None where that is not noted."""
    load, arguments, *_ = getattr(patcher, "cached_patcher_init", None) or (None, ())
    return arguments[0] if load is not None and load is getattr(comfy.sd, loader, None) else None


def warn_of_shift(model):
    """Log where a MODEL of Load Diffusion Model samples with another shift than its file was trained with."""
    file = loaded_from(model, "load_diffusion_model")
    if file is None:
        return
    path = Path(file)
    with suppress(InputError):  # not safetensors, or no longer there
        shift = trained_shift(read_header(path).metadata, path)
        used = getattr(model.get_model_object("model_sampling"), "shift", None)
        if None not in (shift, used) and shift != used:
            remedy = "put ModelSamplingSD3 before UniPic2 Enable Editing, or take UniPic2 Loader"
            logging.warning("%s: trained with shift %g and sampled with %g; %s.", path.name, shift, used, remedy)


def fingerprint(path) -> list | None:
    """Return what changes when a folder or file is exported anew: names, sizes and times; None without one."""
    if path is None or not path.exists():
        return None
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in (".safetensors", ".json"))
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _load_file(path, options: dict, node: str):
    shapes = read_header(path).shapes
    kind = detect_format(shapes)
    if kind == DIFFUSERS_SD3:
        return _load_diffusers_file(path, options)[0], None
    if kind != COMFYUI_SD3:
        remedy = "Load it behind the model with LoraLoaderModelOnly." if kind == LORA else None
        expected = "a UniPic2 transformer with diffusers' or ComfyUI's keys"
        raise InputError(f"{node}, {path.name}", found=kind, expected=expected, remedy=remedy)
    with _mismatches_named(path):
        model = comfy.sd.load_diffusion_model(str(path), model_options=dict(options))
    prefix = next(key for key in shapes if key.endswith(_FIRST)).removesuffix(_FIRST)
    wanted = {key for key in model.model.diffusion_model.state_dict() if key.endswith((".weight", ".bias"))}
    _check_names(path, {key.removeprefix(prefix) for key in shapes} & wanted, wanted)  # ComfyUI only logs what misses
    own = [key for key in shapes if key.startswith(_OF_A_VAE)]
    if not own:
        return model, None
    with safe_open(path, framework="pt") as file:
        return model, _sd3_vae(path, {key.removeprefix(_OF_A_VAE): file.get_tensor(key) for key in own})


def _load_diffusers_file(path, options: dict, **loading):
    """Return MODEL and width of text states of a file with diffusers' keys; `loading` as in `load_transformer`."""
    layers = transformer_config(read_header(path).shapes)["num_layers"]
    model, width = _from_diffusers(path, read_files([path]), layers, options, loading)
    reload_with(model, _load_diffusers_file, path, options)
    return model, width


def load_transformer(path, options: dict | None = None, **loading):
    """Return the MODEL in a folder `transformer/`, and the width of the text states that it reads.

    `loading` is what ComfyUI says when it loads a model anew (`disable_dynamic`).

    Raises:
        InputError: a file is missing, unreadable or truncated, its tensors are not those of an SD3 transformer, or its
            config disagrees with them.
    """
    config = read_config(path / "config.json")
    weights = read_component(path)
    check_transformer_config(config, {k: tuple(t.shape) for k, t in weights.items()}, path / "config.json")
    model, width = _from_diffusers(path, weights, config["num_layers"], options, loading)
    reload_with(model, load_transformer, path, options)
    return model, width


def reload_with(patcher, load, *arguments) -> None:
    """Tell ComfyUI how it gets a patcher's model with untouched weights, as its own loaders do.

    It needs that where weights cannot stay on the disk (TorchCompileModel, hooks) and for each further GPU.

    Args:
        patcher: ModelPatcher; those of older versions are never asked.
        load: returns a tuple with the patcher first.
    """
    if hasattr(patcher, "cached_patcher_init"):
        patcher.cached_patcher_init = (_first_loaded, (load, *arguments))


def _first_loaded(load, *arguments, **loading):
    return load(*arguments, **loading)[0]


def _from_diffusers(path, weights: dict, num_layers: int, options: dict | None, loading: dict):
    """Return MODEL and width of text states of a transformer's weights with diffusers' keys, all of them checked."""
    _check_fused(path, weights, num_layers)
    # It empties the dictionary, and rewrites some tensors in place.
    converted = comfy.model_detection.convert_diffusers_mmdit(weights) or {}
    if weights or not converted:
        raise InputError(
            f"{path}",
            found=f"{len(weights)} unknown tensors, for example {min(weights, default='none')!r}",
            expected="the tensors of a diffusers SD3Transformer2DModel",
        )
    context_width = converted["context_embedder.weight"].shape[1]
    shapes = {key: tuple(tensor.shape) for key, tensor in converted.items()}
    with _mismatches_named(path):
        model = comfy.sd.load_diffusion_model_state_dict(converted, model_options=dict(options or {}), **loading)
    if model is None:
        raise InputError(f"{path}", found="an unknown architecture", expected="an SD3 transformer")
    check_tensors(path, shapes, model.model.diffusion_model.state_dict())
    return model, context_width


def load_vae(path):
    """Return the VAE in a folder `vae/`: SD3's, or a micro model's.

    Raises:
        InputError: a file is missing, unreadable or truncated, or the VAE is of another kind.
    """
    weights = read_component(path)
    if not any(key.startswith(_OF_A_TINY_VAE) for key in weights):
        return _sd3_vae(path, weights)
    config_path = path / "config.json"
    config = read_config(config_path)
    for key, value in VAE_CONFIG.items():
        if config.get(key, value) != value:
            raise InputError(f"{config_path}, {key}", found=config[key], expected=value)
    weights = {_taesd_key(key): tensor for key, tensor in weights.items()}
    expected = comfy.taesd.taesd.TAESD(latent_channels=VAE_CONFIG["latent_channels"]).state_dict()
    sd3 = comfy.latent_formats.SD3()
    # ComfyUI divides by these after encoding and SD3's latent format multiplies again: TAESD's latents come out.
    weights["vae_scale"] = torch.tensor(sd3.scale_factor)
    weights["vae_shift"] = torch.tensor(sd3.shift_factor)
    check_tensors(path, {key: tuple(tensor.shape) for key, tensor in weights.items()}, expected)
    return comfy.sd.VAE(sd=weights)


def _sd3_vae(path, weights: dict):
    vae = comfy.sd.VAE(sd=weights)
    if vae.first_stage_model is None or vae.latent_channels != kontext.LATENT_CHANNELS:
        found = "an unknown VAE" if vae.first_stage_model is None else f"a VAE of {vae.latent_channels} channels"
        raise InputError(f"{path}", found=found, expected="the VAE of SD3.5, or of a micro model")
    return vae


@contextmanager
def _mismatches_named(path):
    """Name the file where torch says "size mismatch for ..."; ComfyUI knows what to do where memory runs out."""
    try:
        yield
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise InputError(f"{path}", found="tensors that do not fit together", remedy=f"{error}") from error


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
                expected="the tensors of a UniPic2 model",
                remedy="Copy the file again or export it again.",
            )


def check_tensors(path, found, expected):
    """Require that `found` (name -> shape) has exactly the names and shapes of `expected` (name -> tensor)."""
    _check_names(path, found.keys(), expected.keys())
    for name, tensor in expected.items():
        if found[name] != tuple(tensor.shape):
            raise InputError(f"{path}, tensor {name}", found=found[name], expected=tuple(tensor.shape))


def require_file(path):
    if not path.is_file():
        raise InputError(
            f"{path}",
            found="no such file",
            expected="a complete folder in the published layout",
            remedy="Copy the folder again as a whole (a micro model: transformer/, vae/, text_encoder/, tokenizer/).",
        )


def read_config(path) -> dict:
    require_file(path)
    return read_json(path, "a JSON object")
