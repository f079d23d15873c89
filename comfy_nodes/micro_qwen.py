"""Load a micro model's Qwen2.5-VL into ComfyUI's own CLIP. No nodes here.

ComfyUI's classes are used as they are, but for the sizes: its loader knows those of the published models only.
"""

from functools import partial
from pathlib import Path

import comfy.sd1_clip
import comfy.text_encoders.llama
import comfy.text_encoders.qwen_vl
import torch
from comfy.supported_models_base import ClipTarget
from transformers import PreTrainedTokenizerFast

from ..core.errors import InputError
from ..core.micro import MICRO_QWEN_KEY

MODEL_TYPE = "qwen2_5_vl"
_TEXT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "rms_norm_eps",
)  # fmt: skip
_VISION = ("hidden_size", "intermediate_size", "num_heads", "depth", "fullatt_block_indexes", "window_size")


class _Model(comfy.text_encoders.llama.Qwen25_7BVLI):
    """ComfyUI's Qwen2.5-VL with a vision encoder of the config's size instead of the published one."""

    def __init__(self, config, dtype, device, operations):
        torch.nn.Module.__init__(self)  # the parent's would make the published encoder first, 2.7 GB
        vision = config["vision"]
        text = comfy.text_encoders.llama.Qwen25_7BVLI_Config(**config["text"])
        text.head_dim, text.rope_dims = config["head_dim"], config["rope_dims"]  # no fields of the dataclass
        self.num_layers, self.dtype = text.num_hidden_layers, dtype
        where = {"device": device, "dtype": dtype, "ops": operations}
        self.model = comfy.text_encoders.llama.Llama2_(text, **where)
        self.visual = comfy.text_encoders.qwen_vl.Qwen2VLVisionTransformer(
            hidden_size=vision["hidden_size"],
            output_hidden_size=text.hidden_size,
            intermediate_size=vision["intermediate_size"],
            num_heads=vision["num_heads"],
            num_layers=vision["depth"],
            window_size=vision["window_size"],
            **where,
        )
        self.visual.fullatt_block_indexes = vision["fullatt_block_indexes"]


class _Tokenizer:
    """Reads `tokenizer.json` as any version of transformers does: Qwen2Tokenizer of version 4 wants other files."""

    @staticmethod
    def from_pretrained(folder) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast(tokenizer_file=str(Path(folder) / "tokenizer.json"))


def read_config(config: dict, path) -> dict:
    """Return what `_Model` is built from.

    Raises:
        InputError: a size is missing, or the model is of a kind that ComfyUI's classes do not compute.
    """
    text, vision = config.get("text_config", {}), config.get("vision_config", {})
    for part, fields, name in ((text, _TEXT, "text_config"), (vision, _VISION, "vision_config")):
        missing = [field for field in fields if field not in part]
        if missing:
            raise InputError(f"{path}, {name}", found=f"no {', '.join(missing)}", expected="a Qwen2.5-VL's config")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    head_dim, sections = text["hidden_size"] // text["num_attention_heads"], rope.get("mrope_section")
    if not isinstance(sections, list) or 2 * sum(sections) != head_dim:
        expected = f"three numbers whose sum is {head_dim // 2}, half the width of a head"
        raise InputError(f"{path}, mrope_section", found=sections, expected=expected)
    if not config.get("tie_word_embeddings", text.get("tie_word_embeddings")):
        expected = "true: ComfyUI answers with the embedding as output layer"
        raise InputError(f"{path}, tie_word_embeddings", found="false", expected=expected)
    for field, value in (("patch_size", 14), ("spatial_merge_size", 2), ("temporal_patch_size", 2)):
        if vision.get(field, value) != value:
            raise InputError(f"{path}, vision_config {field}", found=vision[field], expected=value)
    theta = rope.get("rope_theta", text.get("rope_theta"))
    return {
        "text": {field: text[field] for field in _TEXT} | ({} if theta is None else {"rope_theta": theta}),
        "head_dim": head_dim,
        "rope_dims": sections,
        "vision": {field: vision[field] for field in _VISION},
        "num_hidden_layers": text["num_hidden_layers"],
    }


def tensors(config: dict) -> dict[str, torch.Tensor]:
    """Return the model's tensors by name, without memory, to compare a file with."""
    return _Model(config, None, "meta", torch.nn).state_dict()  # ComfyUI's layers may have no weights before loading


def target(tokenizer_folder, config: dict, pad_token_id: int) -> ClipTarget:
    """Describe the model to `comfy.sd.CLIP`, with the conventions of ComfyUI's own Qwen2.5-VL."""
    model = partial(
        comfy.sd1_clip.SDClipModel,
        layer="last",
        textmodel_json_config=config,
        model_class=_Model,
        special_tokens={"pad": pad_token_id},
        layer_norm_hidden_state=False,
        enable_attention_masks=True,
        return_attention_masks=True,
    )
    tokenizer = partial(
        comfy.sd1_clip.SDTokenizer,
        str(tokenizer_folder),
        pad_with_end=False,
        embedding_size=config["text"]["hidden_size"],
        embedding_key=MICRO_QWEN_KEY,
        tokenizer_class=_Tokenizer,
        has_start_token=False,
        has_end_token=False,
        pad_to_max_length=False,
        max_length=99999999,
        min_length=1,
        pad_token=pad_token_id,
    )
    return ClipTarget(
        partial(comfy.sd1_clip.SD1Tokenizer, name=MICRO_QWEN_KEY, tokenizer=tokenizer),
        partial(comfy.sd1_clip.SD1ClipModel, name=MICRO_QWEN_KEY, clip_model=model),
    )
