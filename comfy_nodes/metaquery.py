"""MetaQuery on ComfyUI's own Qwen2.5-VL: the queries' states, the connector, and answers. No nodes here.

The stock CLIP computes everything up to the queries' states. They enter as one token whose value is a (Q, L) tensor,
which ComfyUI puts in as Q positions; a picture enters as a token of our own type, whose tokens come from the stock
vision encoder and which ComfyUI numbers plainly, as the published script does.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.text_encoders.llama
import comfy.text_encoders.qwen_vl
import folder_paths
import torch
from safetensors import safe_open

from ..core.checkpoint import read_header
from ..core.connector import StableDiffusion3Conditioner
from ..core.errors import InputError
from ..core.prompts import IMAGE_TOKEN, metaquery_segments, question_segments
from ..core.vision import understanding_pixels, vision_pixels
from . import micro_model, published
from .pictures import to_rgb

FOLDER_KEY = "model_patches"
TIED = "none (tied to the embedding)"
AUTO = "auto"
_PICTURE_TYPES = {"1d": "unipic2_picture", "mrope": "image"}
"""Types of a picture's token; ComfyUI numbers "image" by rows and columns, any other plainly."""
_OURS = "unipic2"
_LM_HEAD, _LM_HEAD_SCALES = "lm_head.weight", ("lm_head.weight_scale", "lm_head.scale_weight")
_UNTIED_WIDTH = 3584  # Qwen2.5-VL-7B's; the micro models' output layer is the embedding
_MOST_TOKENS = 8192
_MOST_OF_A_NORM = 1e4  # a trained one's weights are far below
_ANSWER_END = ("<|im_end|>", "<|endoftext|>")


def available_connectors() -> dict[str, Path]:
    """Return name -> path: connectors of micro models first, then every file in `models/model_patches`."""
    found = {
        name: folder / "conditioner"
        for name, folder in micro_model.available_models().items()
        if (folder / "conditioner").is_dir()
    }
    return found | {name: path for name, path in published.listed(FOLDER_KEY).items() if name not in found}


def available_heads() -> list[str]:
    """Return the files that an output layer can come from, the choice of none first."""
    return [TIED, *folder_paths.get_filename_list("text_encoders")]


class _Holder(torch.nn.Module):
    """Gives ComfyUI a module whose attributes it may set."""

    def __init__(self, conditioner: StableDiffusion3Conditioner):
        super().__init__()
        self.conditioner = conditioner


def load_connector(path: Path):
    """Return a patcher (ComfyUI's loading and offloading) around the connector in a folder or file.

    Raises:
        InputError: see `StableDiffusion3Conditioner.from_pretrained`.
    """
    offload = comfy.model_management.text_encoder_offload_device()
    conditioner = StableDiffusion3Conditioner.from_pretrained(path, operations=comfy.ops.manual_cast, device=offload)
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    device = comfy.model_management.text_encoder_device()
    return patcher(_Holder(conditioner.eval()), load_device=device, offload_device=offload)


@dataclass(frozen=True, slots=True)
class _Qwen:
    """The parts of a CLIP that is a Qwen2.5-VL."""

    key: str
    """Its name in what `clip.encode_from_tokens` takes, and in the CLIP's model."""
    transformer: torch.nn.Module
    """ComfyUI's model: `.model` is the language model, `.visual` the vision encoder, if there is one."""
    tokenizer: object
    """transformers' tokenizer."""


def find_qwen(clip, node: str, width: int | None = None, sees: bool = False) -> _Qwen:
    """Return the parts of a CLIP.

    Args:
        clip: CLIP of any loader.
        node: what errors name.
        width: the connector's `llm_hidden_size`, if there is a connector.
        sees: a picture is to be shown to it.

    Raises:
        InputError: no CLIP, one that is not a Qwen2.5-VL, of another width, or without vision.
    """
    remedy = "Load Qwen2.5-VL with Load CLIP (the file of Qwen-Image), type qwen_image."
    if clip is None:
        raise InputError(f"{node}, clip", found="nothing", expected="Qwen2.5-VL", remedy=remedy)
    llama = comfy.text_encoders.llama
    kinds = tuple(getattr(llama, name) for name in ("Qwen25_7BVLI", "Qwen25_3B") if hasattr(llama, name))
    # Not `cond_stage_model`: hooks and device nodes give a clone of a CLIP another model.
    for key, module in clip.patcher.model.named_children():
        transformer = getattr(module, "transformer", None)
        if not isinstance(transformer, kinds):
            continue
        found = transformer.model.embed_tokens.weight.shape[1]
        if width is not None and found != width:
            raise InputError(
                f"{node}, clip",
                found=f"a language model of width {found}",
                expected=f"{width}, for which the connector was trained (7B has 3584, 3B 2048)",
            )
        if sees and not _has_vision(clip.patcher, transformer):
            remedy = (
                "Load a file with vision, such as qwen_2.5_vl_7b_fp8_scaled.safetensors; beside a GGUF, its mmproj."
            )
            raise InputError(f"{node}, clip", found="a language model without vision", remedy=remedy)
        inner = getattr(clip.tokenizer, clip.tokenizer.clip)
        return _Qwen(key, transformer, inner.tokenizer)
    found = type(clip.patcher.model).__name__
    raise InputError(f"{node}, clip", found=f"another text encoder ({found})", expected="Qwen2.5-VL", remedy=remedy)


def _has_vision(patcher, transformer) -> bool:
    """Whether a language model has a vision encoder with weights; ComfyUI only logs which ones a file lacks.

    The file says it, where it is known. Else what the loaders leave does: no weight (quantized layers), zeros of the
    wrong shape (layers that wait for theirs, ComfyUI-GGUF), or memory as it was, which would hardly pass for norms.
    """
    if not hasattr(transformer, "visual") or not _file_has_vision(patcher):
        return False
    visual = transformer.visual
    weight = getattr(visual.blocks[0].attn.qkv, "weight", None)
    if weight is None or weight.shape[0] != 3 * weight.shape[1]:
        return False
    norms = [norm for block in visual.blocks for norm in (block.norm1, block.norm2)]
    return all(_is_trained(norm.weight) for norm in (*norms, visual.merger.ln_q))


def _file_has_vision(patcher) -> bool:
    """Whether a file of Load CLIP has a vision encoder; True also where the files are not known or not safetensors."""
    files = published.loaded_from(patcher, "load_clip_model_patcher")
    if files is None:
        return True
    try:
        return any("visual." in key for path in files for key in read_header(path).shapes)
    except InputError:
        return True


def _is_trained(norm) -> bool:
    """Whether a norm's weight can have come from a file: numbers of its size, most of them not zero."""
    if norm is None:
        return False
    values = norm.detach().float().abs()
    return bool((values < _MOST_OF_A_NORM).all()) and int(values.count_nonzero()) > values.numel() // 2


def encode(clip, connector, prompts: tuple[str, str], image, positions: str, node: str) -> list:
    """Return CONDITIONING for prompt and negative prompt, or for instructions and the picture(s) they are about.

    Args:
        clip: Qwen2.5-VL.
        connector: patcher of `load_connector`.
        prompts: prompt and negative prompt, plain text; parentheses and markup of chats in it are read as text.
        image: IMAGE (B, H, W, C) at the size that is drawn, one for each edit; or None.
        positions: one of `core.prompts.POSITIONS`, or `AUTO`: as the connector was trained, 1d where it says nothing.
        node: what errors name.

    Raises:
        InputError: see `find_qwen`, `_require_one_strength` and `core.sizes.vision_size`.
    """
    if connector is None:
        raise InputError(f"{node}, connector", found="nothing", remedy="Load one with UniPic2 Load Connector.")
    conditioner = connector.model.conditioner
    if positions == AUTO:
        positions = conditioner.positions
    qwen = find_qwen(clip, node, conditioner.config["llm_hidden_size"], sees=image is not None)
    _require_one_strength(clip, node)
    queries = conditioner.meta_queries.detach().clone()
    pictures = [None]
    if image is not None:
        clip = _seeing(clip, qwen)
        pixels = to_rgb(image, f"{node}, image").movedim(-1, 1)
        seen = [vision_pixels(picture[None]).movedim(1, -1) for picture in pixels]
        pictures = [{"type": _PICTURE_TYPES[positions], "data": p, "original_type": "image", _OURS: {}} for p in seen]
    inner, states = _loaded(clip, qwen), [[] for _ in prompts]
    for picture in pictures:
        for found, prompt, name in zip(states, prompts, ("prompt", "negative_prompt"), strict=True):
            comfy.model_management.throw_exception_if_processing_interrupted()
            tokens = _tokens(qwen, metaquery_segments(prompt, picture is not None), picture, f"{node}, {name}")
            found.append(_states(inner, tokens, queries, clip.patcher.load_device))
        if picture is not None:
            picture[_OURS].clear()  # its tokens, before the next one's
    # Once the language model is done, so that it and the connector need not be in memory together.
    comfy.model_management.load_models_gpu([connector])
    out, conditioning = comfy.model_management.intermediate_device(), []
    for found in states:
        with _on(connector.load_device):
            text, pooled = conditioner(torch.cat(found).to(connector.load_device))
        values = {"pooled_output": pooled.to(out)}
        clip.add_hooks_to_dict(values)  # of Set CLIP Hooks, as stock encoding does it
        conditioning.append([[text.to(out), values]])
    return conditioning


def _require_one_strength(clip, node: str) -> None:
    """Refuse hooks that change along sampling: ComfyUI's loop over them runs more than the inner model.

    Raises:
        InputError: Set CLIP Hooks schedules the CLIP, by keyframes of several strengths.
    """
    hooks = clip.patcher.forced_hooks
    if clip.use_clip_schedule and hooks is not None and len(hooks.get_hooks_for_clip_schedule()) > 1:
        raise InputError(
            f"{node}, clip",
            found="a CLIP whose hooks have a schedule",
            expected="hooks that keep one strength",
            remedy="Switch schedule_clip off in Set CLIP Hooks; on the MODEL their schedule goes on to work.",
        )


def _states(inner, tokens: list, queries, device):
    """Return the states (1, Q, L) of the queries behind a chat, after the last norm.

    By the CLIP's inner model, always its last layer: what is around it belongs to the picture model that a CLIP was
    loaded for, which may want another layer and cut templates off.
    """
    inner.set_clip_options({"layer": None, "execution_device": device})
    try:
        with _on(device):
            encoded = inner.encode_token_weights([[(token, 1.0) for token in (*tokens, queries)]])
    finally:
        inner.reset_clip_options()
    return encoded[0][:, -len(queries) :].clone()  # a view would keep the states of all before


def _loaded(clip, qwen: _Qwen, extra_bytes: int = 0):
    """Return the CLIP's inner model, loaded by ComfyUI with its patches."""
    comfy.model_management.load_models_gpu([clip.patcher], memory_required=extra_bytes)
    return getattr(clip.patcher.model, qwen.key)


def _on(device):
    """Make a device the current one meanwhile, as newer cores do for their kernels."""
    return getattr(comfy.model_management, "cuda_device_context", nullcontext)(device)


def _tokens(qwen: _Qwen, segments: list[str], picture: dict | None, socket: str) -> list:
    """Return a chat's tokens as ComfyUI takes them, the picture's token replaced by the picture.

    Raises:
        InputError: more tokens than `_MOST_TOKENS`: memory grows with their square, and a server can be killed for it.
    """
    ids = [i for part in segments for i in qwen.tokenizer(part, add_special_tokens=False)["input_ids"]]
    if len(ids) > _MOST_TOKENS:
        raise InputError(socket, found=f"{len(ids)} tokens", expected=f"at most {_MOST_TOKENS}")
    if picture is None:
        return ids
    placeholder = qwen.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    return [picture if i == placeholder else i for i in ids]


def _seeing(clip, qwen: _Qwen):
    """Return a clone of the CLIP that reads our pictures; the CLIP itself is not changed."""
    clip = clip.clone()
    name = f"{qwen.key}.transformer.preprocess_embed"
    stock = clip.patcher.get_model_object(name)
    clip.patcher.add_object_patch(name, partial(_preprocess_embed, qwen.transformer, stock))
    return clip


def _preprocess_embed(transformer, stock, embed, device):
    """Return the vision encoder's tokens of our picture, and its grid; anything else is the stock method's."""
    if _OURS not in embed:
        return stock(embed, device=device)
    kept = embed[_OURS]  # both prompts see the same picture
    if not kept:
        kept["tokens"] = _vision_tokens(transformer, embed["data"], device)
    return kept["tokens"]


def _vision_tokens(transformer, picture, device):
    """Return tokens (N, L), row by row, and the grid of patches."""
    patches, grid = comfy.text_encoders.qwen_vl.process_qwen2vl_images(picture)
    merged = []
    hook = transformer.visual.merger.register_forward_hook(lambda module, inputs, output: merged.append(output))
    try:
        tokens = transformer.visual(patches.to(device, dtype=torch.float32), grid)
    finally:
        hook.remove()
    if torch.equal(tokens, merged[0]):
        # ComfyUI up to 0.3.x leaves them in the order of attention windows; Qwen2.5-VL reads them row by row.
        order = torch.argsort(transformer.visual.get_window_index(grid)[0])
        tokens = tokens[order.to(tokens.device)]
    return tokens, grid


def answer(clip, question: str, image, lm_head: str, max_length: int, sampling: dict, node: str) -> str:
    """Return Qwen2.5-VL's answer to a question, about a picture if there is one, by ComfyUI's own text generation.

    Args:
        clip: Qwen2.5-VL.
        question: plain text.
        image: IMAGE; its first picture is shown (`core.sizes.understanding_size`). Or None.
        lm_head: file in `models/text_encoders` whose output layer is used, or `TIED`.
        max_length: tokens of the answer at most.
        sampling: `do_sample`, `temperature`, `top_k`, `top_p`, `seed`.
        node: what errors name.

    Raises:
        InputError: see `find_qwen`; a ComfyUI without text generation; or a model whose output layer is not loaded.
    """
    qwen = find_qwen(clip, node, sees=image is not None)
    if not isinstance(qwen.transformer, comfy.text_encoders.llama.Qwen25_7BVLI):
        found, remedy = "Qwen2.5-VL-3B, which ComfyUI loads without answers", "Ask Qwen2.5-VL-7B, or a micro model's."
        raise InputError(f"{node}, clip", found=found, remedy=remedy)
    rope = getattr(comfy.text_encoders.qwen_vl, "qwen2vl_mrope_position_ids", None)
    if not hasattr(qwen.transformer, "generate") or rope is None:
        raise InputError(
            f"{node}",
            found="a ComfyUI that has no text generation for Qwen2.5-VL",
            expected="one that has, such as 0.30.0",
            remedy="Update ComfyUI.",
        )
    head = _read_head(qwen, lm_head, node)
    picture = None
    if image is not None:
        clip = _seeing(clip, qwen)
        data = understanding_pixels(to_rgb(image, f"{node}, image")[:1].movedim(-1, 1)).movedim(1, -1)
        picture = {"type": "image", "data": data, "original_type": "image", _OURS: {}}
    tokens = _tokens(qwen, question_segments(question, image is not None), picture, f"{node}, question")
    inner, device = _loaded(clip, qwen, 0 if head is None else head.nbytes), clip.patcher.load_device
    with _on(device):
        embeds, _, _, info = inner.process_tokens([tokens], device)
    stops = [qwen.tokenizer.convert_tokens_to_ids(token) for token in _ANSWER_END]
    language_model = qwen.transformer.model
    if head is not None:
        language_model.lm_head = _head_layer(head.to(device))
    try:
        with _on(device):
            ids = qwen.transformer.generate(
                embeds,
                max_length=max_length,
                stop_tokens=stops,
                position_ids=rope(info, embeds.shape[1], device),
                **{"repetition_penalty": 1.0, **sampling},
            )
    finally:
        if head is not None:
            del language_model.lm_head
    return qwen.tokenizer.decode(ids, skip_special_tokens=True).strip()


def _read_head(qwen: _Qwen, lm_head: str, node: str):
    """Return the weight (words, L) of the output layer in a file, which ComfyUI's loader drops; None where it is tied.

    Raises:
        InputError: the model needs a file, or the file has no such layer.
    """
    language_model = qwen.transformer.model
    words, width = language_model.embed_tokens.weight.shape
    if lm_head == TIED:
        if width >= _UNTIED_WIDTH and not hasattr(language_model, "lm_head"):
            raise InputError(
                f"{node}, lm_head",
                found="none, for Qwen2.5-VL-7B",
                expected="its file",
                remedy=(
                    "Choose the same text encoder file as in Load CLIP: ComfyUI leaves its output layer out. Beside a "
                    "GGUF take any safetensors of Qwen2.5-VL-7B with lm_head.weight."
                ),
            )
        return None
    path = folder_paths.get_full_path_or_raise("text_encoders", lm_head)
    shapes = read_header(path).shapes
    shape = shapes.get(_LM_HEAD)
    if shape != (words, width):
        found = f"no {_LM_HEAD}" if shape is None else f"{_LM_HEAD} of shape {shape}"
        raise InputError(f"{node}, lm_head {lm_head}", found=found, expected=f"{_LM_HEAD} of shape {(words, width)}")
    with safe_open(path, framework="pt") as file:
        weight = file.get_tensor(_LM_HEAD)
        for name in _LM_HEAD_SCALES:
            if name in shapes:
                weight = weight.to(torch.bfloat16) * file.get_tensor(name).to(torch.bfloat16)
    return weight


def _head_layer(weight):
    """Return a linear layer of ComfyUI's kind, which computes in the type of its input."""
    head = comfy.ops.manual_cast.Linear(
        weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype
    )
    head.weight = torch.nn.Parameter(weight, requires_grad=False)
    return head
