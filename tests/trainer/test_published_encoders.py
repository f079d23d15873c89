"""The published layout with its real tokenizers: tiny CLIP-L, CLIP-G and T5 on disk, trained on and exported."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from safetensors.torch import load_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)
from unipic2.cli.comfyui import resolve_install
from unipic2.core.prompts import DEFAULT_EDIT_NEGATIVE_PROMPT
from unipic2.trainer import SD3Transformer2DKontextModel, StableDiffusion3KontextPipeline
from unipic2.trainer.pretrain import parse, pretrain

pytestmark = pytest.mark.comfyui  # its tokenizers are those of the published checkpoint


def clip(tokenizer, width: int, projection: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2, projection_dim=projection,
        max_position_embeddings=77, vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config)


@pytest.fixture(scope="module")
def model(tmp_path_factory, randomise, small_config, kl_vae):
    """Return a folder in the published layout: three text encoders, a VAE with a posterior, dual attention."""
    torch.manual_seed(0)
    tokenizers = resolve_install().root / "comfy"
    words = CLIPTokenizer.from_pretrained(tokenizers / "sd1_tokenizer", model_max_length=77)
    pieces = T5TokenizerFast.from_pretrained(tokenizers / "text_encoders" / "t5_tokenizer")
    t5 = T5Config(vocab_size=len(pieces), d_model=48, d_kv=16, d_ff=64, num_layers=2, num_heads=3)
    sizes = {"joint_attention_dim": 48, "pooled_projection_dim": 12 + 20}
    pipe = StableDiffusion3KontextPipeline(
        transformer=randomise(SD3Transformer2DKontextModel(**{**small_config, **sizes})),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_vae,
        text_encoder=clip(words, 16, 12),
        tokenizer=words,
        text_encoder_2=clip(words, 24, 20),
        tokenizer_2=words,
        text_encoder_3=T5EncoderModel(t5),
        tokenizer_3=pieces,
    )
    folder = tmp_path_factory.mktemp("published") / "model"
    pipe.save_pretrained(folder)
    return folder


def train(model, pairs_file, folder, *flags):
    argv = ["--model_name_or_path", str(model), "--dataset_name", str(pairs_file), "--output_dir", str(folder)]
    argv += "--use_cpu --resolution 64 --max_steps 2 --per_device_train_batch_size 2 --report_to none".split()
    argv += "--disable_tqdm true --save_strategy no --preview_steps 2 --preview_inference_steps 1".split()
    return pretrain(*parse([*argv, *flags, "--learning_rate", "1e-3", "--export_dtype", "float32"]))


def test_texts_are_encoded_as_diffusers_does_it(model):
    ours = StableDiffusion3KontextPipeline.from_pretrained(model)
    theirs = StableDiffusion3Pipeline(**ours.components)
    prompts = {"prompt": ["make it blue", "a photo of a cat"], "prompt_2": None, "prompt_3": None}
    negatives = {"negative_prompt": [DEFAULT_EDIT_NEGATIVE_PROMPT] * 2}
    encoded = ours.encode_prompt(**prompts, **negatives)
    assert encoded[0].shape == (2, 77 + 256, 48) and encoded[2].shape == (2, 32)
    assert all(torch.equal(a, b) for a, b in zip(encoded, theirs.encode_prompt(**prompts, **negatives), strict=True))


def test_a_whole_cache_stands_for_three_encoders(model, pairs_file, tmp_path, monkeypatch):
    """Training in the encoders' presence, on a fresh cache, and on a whole one where loading any encoder fails."""
    plain = train(model, pairs_file, tmp_path / "plain")
    cache = ["--cache_dir", str(tmp_path / "cache"), "--cache_dtype", "float32"]
    train(model, pairs_file, tmp_path / "fresh", *cache)
    for encoder in (CLIPTextModelWithProjection, T5EncoderModel):
        monkeypatch.setattr(encoder, "from_pretrained", lambda *args, **kwargs: 1 / 0)
    whole = train(model, pairs_file, tmp_path / "whole", *cache)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    start, one, two = (load_file(folder / weights) for folder in (model, plain, whole))
    worst = max((one[key] - two[key]).abs().max().item() for key in one)
    moved = max((one[key] - start[key]).abs().max().item() for key in one)
    assert worst < 1e-4 < 1e-3 < moved, (worst, moved)
    previews = [tmp_path / name / "previews/step_000002.png" for name in ("fresh", "whole")]
    assert previews[0].read_bytes() == previews[1].read_bytes()
    monkeypatch.undo()
    for part in ("text_encoder_2/model.safetensors", "text_encoder_3/model.safetensors", "tokenizer_3/tokenizer.json"):
        assert (whole / part).read_bytes() == (model / part).read_bytes(), part
    drawn = StableDiffusion3KontextPipeline.from_pretrained(whole)("a cat", height=64, width=64, num_inference_steps=1)
    assert drawn.images[0].size == (64, 64)


def test_a_lora_on_a_cache(model, pairs_file, tmp_path):
    flags = ["--cache_dir", str(tmp_path / "cache"), "--use_peft", "--lora_r", "2"]
    export = train(model, pairs_file, tmp_path / "lora", *flags)
    tensors = load_file(export / "comfyui_lora.safetensors")
    assert any("attn2.to_q" in key for key in tensors) and any(key.endswith(".alpha") for key in tensors)
