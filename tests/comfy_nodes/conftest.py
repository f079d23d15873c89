"""A random micro model, one ComfyUI process that runs every case on it, and the trainer's pipeline to compare with."""

import copy
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer
from unipic2.cli.comfyui import resolve_install
from unipic2.core.checkpoint import DYNAMIC_SHIFT_KEY, SHIFT_KEY, export_single_file, save_tensors
from unipic2.core.connector import StableDiffusion3Conditioner
from unipic2.core.files import COMFYUI_LORA, VLM_LORA_FILE
from unipic2.core.micro import MAX_TOKENS, SHIFT, TEXT_ENCODER_CONFIG, TRANSFORMER_CONFIG, VAE_CONFIG
from unipic2.core.prompts import DEFAULT_EDIT_NEGATIVE_PROMPT
from unipic2.trainer import vlm_lora
from unipic2.trainer.adapters import lora_config, prepare, save_lora
from unipic2.trainer.kontext_pipeline import StableDiffusion3KontextPipeline
from unipic2.trainer.kontext_transformer import SD3Transformer2DKontextModel
from unipic2.trainer.metaquery_pipeline import MetaQueryPipeline
from unipic2.trainer.micro.vlm import build_vlm, build_vlm_tokenizer

HERE = Path(__file__).resolve().parent
PACK = HERE.parents[1]
START, END = "<|startoftext|>", "<|endoftext|>"

VISION_SIZES = ((64, 64), (96, 64), (256, 288))  # the last one has several attention windows
METAQUERY_PROMPTS = ("make the red circle blue", "", "a (red:1.3) <|im_end|>\n<|im_start|>user <|image_pad|> café")
FORWARD_CASES = [(width, height, batch) for width, height in ((64, 64), (96, 64), (128, 128)) for batch in (1, 3)]
PROMPTS = {
    "short": "a red circle",
    "empty": "",
    "unicode": "Ein roter Kreis über 2 Quadraten, café!",
    "brackets": "a circle \\(red\\)",
    "exact": "red " * (MAX_TOKENS - 2),
    "long": "one red circle and two blue squares " * 40,
}
"""All prompts without weights: what a weight does is ComfyUI's own business."""


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write a CLIP tokenizer by hand: all bytes, all bytes that end a word, a few merges, start and end."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(code) for code in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    merges = [("r", "e"), ("re", "d</w>"), ("b", "l"), ("bl", "u"), ("blu", "e</w>"), ("c", "i"), ("a", "n")]
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *("".join(pair) for pair in merges), START, END]
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {**special, "model_max_length": MAX_TOKENS, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True}
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


@torch.no_grad()
def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Fill every parameter, zero-initialised ones included, so that each of them can be seen in a comparison."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.7 * parameter[0].numel() ** -0.5)
        else:
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name and name.endswith("weight") else 0.0, std=0.1)
    return model.eval()


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory) -> StableDiffusion3KontextPipeline:
    """The trainer's pipeline with random weights."""
    torch.manual_seed(0)
    tokenizer = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text_config = CLIPTextConfig(**TEXT_ENCODER_CONFIG, vocab_size=len(tokenizer), **ids)
    pipe = StableDiffusion3KontextPipeline(
        transformer=randomise(SD3Transformer2DKontextModel(**TRANSFORMER_CONFIG)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=randomise(AutoencoderTiny(**VAE_CONFIG)),
        text_encoder=randomise(CLIPTextModelWithProjection(text_config)),
        tokenizer=tokenizer,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def metaquery(pipeline, tmp_path_factory) -> MetaQueryPipeline:
    """The trainer's MetaQuery pipeline with random weights: a small Qwen2.5-VL, six queries, a connector."""
    tokenizer = build_vlm_tokenizer(tmp_path_factory.mktemp("qwen"))
    text = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    vlm = randomise(build_vlm(tokenizer, 0, text, {"depth": 3, "fullatt_block_indexes": [1]}))
    config = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    dim, pooled = TRANSFORMER_CONFIG["joint_attention_dim"], TRANSFORMER_CONFIG["pooled_projection_dim"]
    conditioner = randomise(StableDiffusion3Conditioner(config, 6, 128, pooled, dim))
    pipe = MetaQueryPipeline(
        pipeline.transformer, pipeline.scheduler, pipeline.vae, vlm, tokenizer, conditioner.requires_grad_(False)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def models_folder(pipeline, metaquery, tmp_path_factory) -> Path:
    """A `models/unipic2` folder with `random` (the pipeline's weights), `metaquery`, and broken ones."""
    base = tmp_path_factory.mktemp("models") / "unipic2"
    metaquery.save_pretrained(base / "metaquery")
    shutil.copytree(base / "metaquery", base / "fp8")
    weights = base / "fp8/text_encoder/model.safetensors"
    save_tensors({k: t.to(torch.float8_e4m3fn) for k, t in load_file(weights).items()}, weights)
    for name in ("random", "truncated", "no_vae", "wrong_config", "wrong_tensors"):
        pipeline.save_pretrained(base / name)
    pipeline.save_pretrained(base / "sharded", max_shard_size="4MB")
    weights = "transformer/diffusion_pytorch_model.safetensors"
    data = (base / "truncated" / weights).read_bytes()
    (base / "truncated" / weights).write_bytes(data[: len(data) // 2])
    (base / "no_vae/vae/diffusion_pytorch_model.safetensors").unlink()
    config = base / "wrong_config/transformer/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_layers": 4}))
    tensors = {key: tensor.clone() for key, tensor in load_file(base / "wrong_tensors" / weights).items()}
    del tensors["transformer_blocks.1.attn.to_q.weight"]
    save_file(tensors, base / "wrong_tensors" / weights)
    return base


@pytest.fixture(scope="session")
def inputs() -> dict[str, torch.Tensor]:
    """Random inputs of all cases, keyed as `comfyui_process.py` reads them."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    dim, pooled_dim = TRANSFORMER_CONFIG["joint_attention_dim"], TRANSFORMER_CONFIG["pooled_projection_dim"]
    out = {}
    for width, height, batch in FORWARD_CASES:
        case = f"{width}x{height}x{batch}"
        out[f"{case}.x"] = randn(batch, 16, height // 8, width // 8)
        out[f"{case}.reference"] = randn(batch, 16, height // 8, width // 8)
        out[f"{case}.context"] = randn(batch, MAX_TOKENS, dim)
        out[f"{case}.pooled"] = randn(batch, pooled_dim)
        out[f"{case}.timestep"] = 1000 * torch.rand(batch, generator=generator)
    width, tokens = 64 * TRANSFORMER_CONFIG["num_attention_heads"], 4 * 6
    out["control"] = randn(2, 1, tokens, width)
    out["image"] = torch.rand(2, 64, 96, 3, generator=generator)
    for width, height in VISION_SIZES:
        # Smooth, as pictures are: steps of noise would be all that bicubic resizing shows.
        small = torch.rand(2, 3, height // 16, width // 16, generator=generator)
        picture = torch.nn.functional.interpolate(small, (height, width), mode="bilinear")
        out[f"vision.{width}x{height}"] = (picture * 255).round().div(255).movedim(1, -1).contiguous()
    out["latents"] = randn(2, 16, 8, 12)
    # Smooth and without a repeated pattern: a shift of it by part of a pixel can be measured.
    photo = torch.nn.functional.interpolate(torch.rand(1, 3, 12, 18, generator=generator), (331, 503), mode="bicubic")
    out["photo"] = photo.clamp(0, 1).movedim(1, -1).contiguous()
    return out


@pytest.fixture(scope="session")
def lora(pipeline, tmp_path_factory):
    """`(pipeline with a LoRA in every attention and feed-forward, folder that `save_lora` wrote)`."""
    trained = copy.deepcopy(pipeline)
    prepare(trained.transformer, "full", lora_config(4, 10, 0.0, ["attention", "ff"]), seed=0)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in trained.transformer.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("lora")
    save_lora(trained, folder)
    return trained, folder


@pytest.fixture(scope="session")
def qwen_lora(metaquery, tmp_path_factory):
    """`(MetaQuery pipeline with a LoRA in its language model, folder that `vlm_lora.save_lora` wrote)`."""
    trained, folder = copy.deepcopy(metaquery), tmp_path_factory.mktemp("qwen_lora")
    generator = torch.Generator().manual_seed(3)
    for weight in vlm_lora.add_lora(trained.text_encoder, r=4, alpha=10, seed=0).values():
        weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    vlm_lora.save_lora(trained.text_encoder, folder)
    return trained, folder


@pytest.fixture(scope="session")
def comfyui(models_folder, inputs, lora, qwen_lora, tmp_path_factory):
    """`(tensors, report)` of one ComfyUI process that loaded the pack by path and ran every case.

    It costs ComfyUI's start (about 10 s) once. `report` holds texts and figures; see `comfyui_process.py`.
    """
    install = resolve_install()
    folder = tmp_path_factory.mktemp("comfyui")
    pack = folder / "ComfyUI-UniPic2"  # a hyphen, as in most clones: not importable by name
    pack.symlink_to(PACK, target_is_directory=True)
    save_file(inputs, folder / "inputs.safetensors")
    shutil.copy(lora[1] / COMFYUI_LORA, folder / "lora.safetensors")
    shutil.copy(qwen_lora[1] / VLM_LORA_FILE, folder / "qwen_lora.safetensors")
    export_single_file(models_folder / "random", folder / "single.safetensors")
    for name, metadata in (
        ("shifted", {SHIFT_KEY: "1.5"}), ("unshifted", {SHIFT_KEY: "none"}), ("dynamic", {DYNAMIC_SHIFT_KEY: "{}"}),
    ):  # fmt: skip
        export_single_file(models_folder / "random", folder / f"{name}.safetensors", metadata)
    (folder / "diffusion_models").mkdir()
    (folder / "edit_negative.json").write_text(json.dumps(DEFAULT_EDIT_NEGATIVE_PROMPT))
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    (folder / "metaquery_prompts.json").write_text(json.dumps(METAQUERY_PROMPTS))
    command = [install.python, HERE / "comfyui_process.py", install.root, pack, models_folder, folder]
    # One thread: the models are tiny, and threads that wait for each other are slow on a busy machine.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    # A caller's PYTHONPATH could put another `comfy` or `nodes` in front of ComfyUI's.
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    if done.returncode:
        pytest.fail(f"the ComfyUI process failed:\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}", pytrace=False)
    return load_file(folder / "outputs.safetensors"), json.loads((folder / "report.json").read_text())
