"""Small real models: a micro pipeline whose every weight matters, and an even smaller one to train."""

import copy
import io
import tarfile

import datasets
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, FlowMatchEulerDiscreteScheduler
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModelWithProjection
from unipic2.core.connector import StableDiffusion3Conditioner
from unipic2.core.micro import MAX_TOKENS, SHIFT, VAE_CONFIG
from unipic2.trainer import MetaQueryPipeline, SD3Transformer2DKontextModel, StableDiffusion3KontextPipeline
from unipic2.trainer.micro.build import build_pipeline, build_tokenizer
from unipic2.trainer.micro.codec import initialize, sample_scenes, to_pixels
from unipic2.trainer.micro.vlm import build_vlm, build_vlm_tokenizer
from unipic2.trainer.micro.world import render

from .judge_server import Server

QWEN_TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 1}
QWEN_TEXT |= {"num_key_value_heads": 1}
QWEN_VISION = {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 1, "fullatt_block_indexes": [1]}
CONNECTOR = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 1}
SMALL = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 64,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "caption_projection_dim": 128,
    "pooled_projection_dim": 24,
    "pos_embed_max_size": 12,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}


def write_tar(path, members):
    """Write a tar of `(name, content)`; returns its path as text."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return str(path)


@torch.no_grad()
def randomise_weights(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fill every parameter, zero-initialised ones included, so that outputs depend on all inputs."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        std = 0.7 * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        center = 1.0 if "norm" in name and name.endswith("weight") and parameter.ndim == 1 else 0.0
        parameter.copy_(center + std * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="session")
def model(pipeline, tmp_path_factory):
    """Return the folder of `pipeline`, as it is saved; a test that breaks it takes a copy."""
    folder = tmp_path_factory.mktemp("model") / "random"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def server():
    """Return a chat endpoint whose `behave` a test sets."""
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path, monkeypatch):
    """Keep what `datasets` caches out of the user's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def randomise():
    return randomise_weights


@pytest.fixture(scope="session")
def small_config():
    return dict(SMALL)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def vae():
    """Return an untrained codec that passes its input on: unit-sized latents, pictures that differ."""
    torch.manual_seed(0)
    vae = AutoencoderTiny(**VAE_CONFIG)
    initialize(vae, to_pixels([render(scene) for scene in sample_scenes(8, seed=0)]))
    return vae.eval()


@pytest.fixture(scope="session")
def kl_vae():
    """Return a tiny VAE with a posterior and the published scaling, random."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    return vae.eval()


@pytest.fixture(scope="session")
def pipeline(vae, tokenizer):
    """Return the micro pipeline with random weights everywhere. Tests leave it as it is."""
    pipe = build_pipeline(vae, tokenizer, seed=0)
    randomise_weights(pipe.transformer)
    pipe.text_encoder.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def make_small_pipeline(vae, tokenizer):
    """Return a function that builds the same small pipeline each time, for training."""

    def make(seed: int = 0) -> StableDiffusion3KontextPipeline:
        torch.manual_seed(seed)
        text_config = CLIPTextConfig(
            hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2, projection_dim=24,
            max_position_embeddings=MAX_TOKENS, vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        pipe = StableDiffusion3KontextPipeline(
            transformer=randomise_weights(SD3Transformer2DKontextModel(**SMALL), seed),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
            vae=copy.deepcopy(vae),
            text_encoder=CLIPTextModelWithProjection(text_config),
            tokenizer=tokenizer,
            text_encoder_2=None,
            tokenizer_2=None,
            text_encoder_3=None,
            tokenizer_3=None,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture(scope="session")
def vlm_tokenizer(tmp_path_factory):
    return build_vlm_tokenizer(tmp_path_factory.mktemp("qwen"))


@pytest.fixture
def make_vlm(vlm_tokenizer):
    """Return a function that builds a Qwen2.5-VL smaller than the micro one."""
    return lambda seed=0: build_vlm(vlm_tokenizer, seed, QWEN_TEXT, QWEN_VISION)


@pytest.fixture(scope="session")
def vlm(vlm_tokenizer):
    """Return such a one, all random and frozen. Tests leave it as it is."""
    return randomise_weights(build_vlm(vlm_tokenizer, 0, QWEN_TEXT, QWEN_VISION)).requires_grad_(False)


@pytest.fixture
def make_metaquery_pipeline(make_small_pipeline, vlm, vlm_tokenizer):
    """Return a function that builds the same small MetaQuery pipeline each time."""

    def make(seed: int = 0) -> MetaQueryPipeline:
        base = make_small_pipeline(seed)
        conditioner = StableDiffusion3Conditioner(
            CONNECTOR, num_queries=5, llm_hidden_size=64, pooled_projection_dim=24, joint_attention_dim=32
        )
        conditioner = randomise_weights(conditioner, seed + 1)
        pipe = MetaQueryPipeline(base.transformer, base.scheduler, base.vae, vlm, vlm_tokenizer, conditioner)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
    """Return a jsonl with eight edits and eight pictures."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(16):
        for kind in "st":
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{kind}{i}.png")
        source = f'"src_img": "s{i}.png", ' if i % 2 else '"src_img": null, '
        rows.append(f'{{"prompt": "a red circle {i}", {source}"edited_img": "t{i}.png"}}')
    (folder / "data.jsonl").write_text("\n".join(rows))
    return folder / "data.jsonl"


@pytest.fixture
def tone(tmp_path, monkeypatch):
    """Make `tone.redness` a reward that any picture gets some of, also for processes started in `tmp_path`."""
    (tmp_path / "tone.py").write_text(
        "def redness(prompts, images, **columns):\n"
        "    pixels = [image.resize((1, 1)).getpixel((0, 0)) for image in images]\n"
        "    return [(red - green) / 255 for red, green, _ in pixels]\n"
    )
    monkeypatch.chdir(tmp_path)
    return "tone.redness"
