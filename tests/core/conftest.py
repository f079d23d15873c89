"""A small SD3 transformer on disk, in the published layout."""

import pytest
import torch
from unipic2.trainer import SD3Transformer2DKontextModel

CONFIG = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 6,
    "num_layers": 3,
    "attention_head_dim": 64,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "caption_projection_dim": 128,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 10,
    "dual_attention_layers": (0, 2),
    "qk_norm": "rms_norm",
}


@pytest.fixture(scope="session")
def transformer():
    torch.manual_seed(0)
    return SD3Transformer2DKontextModel(**CONFIG).eval()


@pytest.fixture(scope="session")
def saved(transformer, tmp_path_factory):
    """Return a folder with `transformer/` as diffusers writes it. Tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("published")
    transformer.save_pretrained(folder / "transformer")
    return folder
