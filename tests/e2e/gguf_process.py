"""Runs inside ComfyUI's own Python: models as GGUF, through the loaders of ComfyUI-GGUF.

    python gguf_process.py COMFYUI_ROOT PACK GGUF_PACK WORK_FOLDER

Prints, as JSON, how far from plain models of the same weights are

- `clip`: MetaQuery Encode's states with Qwen2.5-VL-7B, two layers of it;
- `model`: what a KSampler draws with the micro transformer.
"""

import asyncio
import importlib
import json
import sys
from functools import partial
from pathlib import Path

ROOT, PACK, GGUF_PACK, WORK = map(Path, sys.argv[1:5])
sys.path.insert(0, str(ROOT))
sys.argv = ["main.py", "--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.ops  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.text_encoders.llama as llama  # noqa: E402
import comfy.text_encoders.qwen_vl as qwen_vl  # noqa: E402
import folder_paths  # noqa: E402
import gguf  # noqa: E402
import nodes  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

Q8 = gguf.GGMLQuantizationType.Q8_0
SIZES = {"num_hidden_layers": 2, "intermediate_size": 256}  # all else as published, the vocabulary too
TEXT_NAMES = {
    "model.layers.": "blk.", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "mlp.gate_proj": "ffn_gate", "model.embed_tokens": "token_embd", "model.norm": "output_norm",
}  # fmt: skip
VISION_NAMES = {
    "visual.merger.mlp.": "mm.", "visual.merger.ln_q.": "v.post_ln.", "visual.blocks.": "v.blk.",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate_proj": "ffn_gate", "attn.proj.": "attn_out.",
    "norm1.": "ln1.", "norm2.": "ln2.",
}  # fmt: skip
"""llama.cpp's names of the two files' tensors."""
_DOWN, _ACROSS = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 96), indexing="ij")
PICTURE = torch.stack([_DOWN, _ACROSS, _DOWN * _ACROSS], -1)[None]


def random_weights() -> dict[str, torch.Tensor]:
    """Return weights under ComfyUI's names."""
    model = llama.Qwen25_7BVLI(SIZES, torch.float32, "cpu", comfy.ops.disable_weight_init)
    weights = {}
    for name, parameter in model.state_dict().items():
        if parameter.ndim > 1:
            weights[name] = torch.randn(parameter.shape) * 0.7 * parameter[0].numel() ** -0.5
        elif "norm" in name or "ln_q" in name:
            weights[name] = torch.ones(parameter.shape)
        else:
            weights[name] = 0.1 * torch.randn(parameter.shape)
    return weights


def renamed(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        name = name.replace(old, new)
    return name


def put(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Write a tensor, matrices quantized, and return it as it will be read."""
    if tensor.ndim != 2 or tensor.shape[1] % 32:
        writer.add_tensor(name, tensor.numpy())
        return tensor
    packed = gguf.quants.quantize(tensor.numpy(), Q8)
    writer.add_tensor(name, packed, raw_dtype=Q8)
    return torch.from_numpy(gguf.quants.dequantize(packed, Q8).copy())


def write_files() -> dict[str, torch.Tensor]:
    """Write the language model and, beside it, the vision encoder; return what they hold."""
    text = gguf.GGUFWriter(str(WORK / "qwen-Q8_0.gguf"), "qwen2vl")
    vision = gguf.GGUFWriter(str(WORK / "qwen-mmproj.gguf"), "clip")
    vision.add_type("mmproj")
    held = {}
    for name, tensor in random_weights().items():
        if not name.startswith("visual."):
            held[name] = put(text, renamed(name, TEXT_NAMES), tensor)
        elif name == "visual.patch_embed.proj.weight":
            for i, suffix in enumerate(("", ".1")):
                vision.add_tensor(f"v.patch_embd.weight{suffix}", tensor[:, :, i].contiguous().numpy())
            held[name] = tensor
        elif ".attn.qkv." in name:  # the pack joins them in float16
            parts = [part.contiguous().half().float() for part in tensor.chunk(3)]
            for letter, part in zip("qkv", parts, strict=True):
                at = renamed(name, VISION_NAMES).replace("attn.qkv.", f"attn_{letter}.")
                vision.add_tensor(at, part.numpy())
            held[name] = torch.cat(parts)
        else:
            held[name] = put(vision, renamed(name, VISION_NAMES), tensor)
    for writer in (text, vision):
        close(writer)
    return held


def write_transformer(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Write a transformer with ComfyUI's keys; return what the file holds."""
    writer = gguf.GGUFWriter(str(WORK / "micro-Q8_0.gguf"), "sd3")
    held = {name: put(writer, name, tensor) for name, tensor in weights.items()}
    close(writer)
    return held


def close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_lora() -> None:
    """Write a LoRA as the trainer names it."""
    prefix = "text_encoders.qwen25_7b.transformer.model.layers.0.self_attn.o_proj"
    lora = {
        "lora_A.weight": torch.randn(4, 3584) / 60,
        "lora_B.weight": torch.randn(3584, 4),
        "alpha": torch.tensor(4.0),
    }
    save_file({f"{prefix}.{name}": tensor for name, tensor in lora.items()}, WORK / "lora.safetensors")


async def load_packs() -> None:
    await nodes.init_extra_nodes(init_api_nodes=False)
    for pack in (PACK, GGUF_PACK):
        if not await nodes.load_custom_node(str(pack)):
            raise SystemExit(f"{pack} does not load")


def compared(given: torch.Tensor, expected: torch.Tensor, without: torch.Tensor) -> dict[str, float]:
    """Return how far a result is from what is expected, and how much that was changed by a LoRA."""
    return {
        "difference": float((given - expected).norm() / expected.norm()),
        "change": float((expected - without).norm() / expected.norm()),
    }


def clip_report() -> dict:
    """Return what MetaQuery Encode makes of a GGUF CLIP."""
    stock = comfy.sd.load_text_encoder_state_dicts
    sizes = {"qwen25_7b_model_config": SIZES}
    comfy.sd.load_text_encoder_state_dicts = lambda *args, model_options, **kwargs: stock(
        *args, model_options={**model_options, **sizes}, **kwargs
    )
    qwen_vl.Qwen2VLVisionTransformer = partial(qwen_vl.Qwen2VLVisionTransformer, num_layers=2)
    weights = write_files()
    write_lora()
    found = nodes.NODE_CLASS_MAPPINGS
    (quantized,) = found["CLIPLoaderGGUF"]().load_clip("qwen-Q8_0.gguf", "qwen_image")
    kind = comfy.sd.CLIPType.QWEN_IMAGE
    plain = comfy.sd.load_text_encoder_state_dicts(
        clip_type=kind, state_dicts=[weights], model_options={"dtype": torch.float32}
    )
    package = found["UniPic2MetaQueryEncode"].__module__.rsplit(".", 2)[0]
    conditioner = importlib.import_module(f"{package}.core.connector").StableDiffusion3Conditioner(
        {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
        6,
        3584,
        64,
        64,
    )
    for parameter in conditioner.parameters():
        torch.nn.init.normal_(parameter, std=0.7 * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
    conditioner.save_pretrained(WORK / "conditioner")
    load_connector = importlib.import_module(f"{package}.comfy_nodes.metaquery").load_connector
    common = {"connector": load_connector(WORK / "conditioner"), "prompt": "make the red circle blue"}
    common |= {"negative_prompt": "", "positions": "1d"}

    def states(clip, image):
        return found["UniPic2MetaQueryEncode"].execute(clip=clip, image=image, **common).args[0][0][0].float()

    report, without = {}, {}
    for name, image in (("text", None), ("picture", PICTURE)):
        for lora in ("", " with a LoRA"):
            clips = [plain, quantized]
            if lora:
                clips = [nodes.LoraLoader().load_lora(None, c, "lora.safetensors", 0.0, 1.0)[1] for c in clips]
            expected, given = (states(clip, image) for clip in clips)
            without.setdefault(name, expected)
            report[f"{name}{lora}"] = compared(given, expected, without[name])
    return {"patcher": type(quantized.patcher).__name__, **report}


def model_report() -> dict:
    """Return what the stock sampler draws with a GGUF MODEL, with a reference and without."""
    found = nodes.NODE_CLASS_MAPPINGS
    whole, clip, vae = found["UniPic2MicroLoader"].execute(model="micro (bundled)").args
    weights = {name: tensor.float() for name, tensor in whole.model.diffusion_model.state_dict().items()}
    held = write_transformer(weights)
    (quantized,) = found["UnetLoaderGGUF"]().load_unet("micro-Q8_0.gguf")
    plain = comfy.sd.load_diffusion_model_state_dict(dict(held), model_options={"dtype": torch.float32})
    module, rank = "diffusion_model.joint_blocks.1.x_block.attn.qkv", 4
    wide, narrow = held["joint_blocks.1.x_block.attn.qkv.weight"].shape
    lora = {"lora_A.weight": torch.randn(rank, narrow) / narrow**0.5, "lora_B.weight": torch.randn(wide, rank) / 4}
    save_file({f"{module}.{name}": tensor for name, tensor in lora.items()}, WORK / "model_lora.safetensors")
    prompts = (
        found["UniPic2TextEncode"].execute(clip=clip, prompt="make it blue", negative_prompt="", task="edit").args
    )
    edit = found["UniPic2Reference"].execute(positive=prompts[0], negative=prompts[1], vae=vae, image=PICTURE).args
    drawings = {"text": (prompts[:2], {"samples": torch.zeros(1, 16, 8, 12)}), "edit": (edit[:2], edit[2])}
    report, without = {}, {}
    for name, (conds, latent) in drawings.items():
        for lora in ("", " with a LoRA"):
            drawn = []
            for model in (plain, quantized):
                (model,) = found["UniPic2EnableEditing"].execute(model=model).args
                if lora:
                    (model,) = nodes.LoraLoaderModelOnly().load_lora_model_only(model, "model_lora.safetensors", 1.0)
                drawn.append(
                    nodes.KSampler().sample(model, 3, 4, 1.5, "euler", "normal", *conds, latent)[0]["samples"]
                )
            expected, given = drawn
            without.setdefault(name, expected)
            report[f"{name}{lora}"] = compared(given, expected, without[name])
    report["reference"] = float((without["edit"] - without["text"]).norm() / without["text"].norm())
    return {"patcher": type(quantized).__name__, **report}


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    for kind in ("text_encoders", "clip", "loras", "diffusion_models"):
        folder_paths.add_model_folder_path(kind, str(WORK))
    asyncio.run(load_packs())
    print(json.dumps({"clip": clip_report(), "model": model_report()}))


main()
