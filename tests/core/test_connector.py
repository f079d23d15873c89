"""The connector: published keys, its maths, and what is said of files and configs that do not fit."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from unipic2.core.connector import METADATA_KEY, StableDiffusion3Conditioner, conditioner_config
from unipic2.core.errors import InputError

SMALL = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDTHS = {"num_queries": 5, "llm_hidden_size": 48, "pooled_projection_dim": 24, "joint_attention_dim": 40}
PUBLISHED = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 24, "num_attention_heads": 24}


@pytest.fixture
def conditioner():
    """A connector with all weights random."""
    model = StableDiffusion3Conditioner(SMALL, **WIDTHS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def test_the_published_model_has_its_keys_and_its_size():
    with torch.device("meta"):
        model = StableDiffusion3Conditioner(PUBLISHED)
    state = model.state_dict()
    layer = [
        f"{part}.{kind}"
        for part in (
            "layer_norm1", "layer_norm2", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
            "self_attn.out_proj", "mlp.fc1", "mlp.fc2",
        )
        for kind in ("weight", "bias")
    ]  # fmt: skip
    expected = {f"connector.layers.{i}.{name}" for i in range(24) for name in layer}
    expected |= {f"projector_{i}.{kind}" for i in (1, 2, 3) for kind in ("weight", "bias")} | {"meta_queries"}
    assert state.keys() == expected
    assert state["meta_queries"].shape == (256, 3584) and state["projector_1.weight"].shape == (1536, 3584)
    assert state["projector_2.weight"].shape == (2048, 1536) and state["projector_3.weight"].shape == (4096, 1536)
    layer = 4 * (1536 + 1) * 1536 + (1536 + 1) * 8960 + (8960 + 1) * 1536 + 4 * 1536
    outside = (3584 + 1) * 1536 + (1536 + 1) * (2048 + 4096) + 256 * 3584
    assert sum(t.numel() for t in state.values()) == 24 * layer + outside  # 0.90 billion


def test_it_computes_a_pre_norm_encoder(conditioner):
    """Written out by hand: norm, attention of two heads without mask, residual; norm, tanh GELU, residual."""
    state, states = conditioner.state_dict(), torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(1))

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    x = linear(states, "projector_1")
    for i in range(2):
        at = f"connector.layers.{i}"
        y = F.layer_norm(x, (128,), state[f"{at}.layer_norm1.weight"], state[f"{at}.layer_norm1.bias"], 1e-6)
        q, k, v = (linear(y, f"{at}.self_attn.{n}_proj").view(3, 5, 2, 64).transpose(1, 2) for n in "qkv")
        weights = (q @ k.transpose(2, 3) / math.sqrt(64)).softmax(-1)
        x = x + linear((weights @ v).transpose(1, 2).reshape(3, 5, 128), f"{at}.self_attn.out_proj")
        y = F.layer_norm(x, (128,), state[f"{at}.layer_norm2.weight"], state[f"{at}.layer_norm2.bias"], 1e-6)
        y = linear(y, f"{at}.mlp.fc1")
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + linear(y, f"{at}.mlp.fc2")
    text, pooled = conditioner(states)
    torch.testing.assert_close(text, linear(x, "projector_3"), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(pooled, linear(x.mean(1), "projector_2"), atol=1e-4, rtol=1e-5)


def test_a_new_one_starts_from_an_empty_prompt():
    model = StableDiffusion3Conditioner(SMALL, **{**WIDTHS, "llm_hidden_size": 4096}).initialize(0)
    text, pooled = model(torch.randn(2, 5, 4096))
    assert not text.any() and not pooled.any()
    assert abs(model.meta_queries.std().item() * 4096**0.5 - 1) < 0.05
    text.sum().backward()
    assert model.projector_3.bias.grad.abs().sum() > 0  # and yet it learns
    again = StableDiffusion3Conditioner(SMALL, **{**WIDTHS, "llm_hidden_size": 4096}).initialize(0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    other = StableDiffusion3Conditioner(SMALL, **{**WIDTHS, "llm_hidden_size": 4096}).initialize(1)
    assert not torch.equal(model.meta_queries, other.meta_queries)


def test_a_folder_comes_back_as_it_was(conditioner, tmp_path):
    conditioner.save_pretrained(tmp_path / "conditioner")
    loaded = StableDiffusion3Conditioner.from_pretrained(tmp_path / "conditioner")
    assert loaded.config == conditioner.config
    assert all(torch.equal(a, b) for a, b in zip(conditioner.parameters(), loaded.parameters(), strict=True))


def test_one_file_is_enough(conditioner, tmp_path):
    """By its metadata, which holds the heads; without them heads are 64 wide."""
    folder = tmp_path / "conditioner"
    conditioner.save_pretrained(folder)
    path = next(folder.glob("*.safetensors"))
    assert StableDiffusion3Conditioner.from_pretrained(path).config == conditioner.config
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(path), bare)
    assert StableDiffusion3Conditioner.from_pretrained(bare).config == conditioner.config
    odd = StableDiffusion3Conditioner({**SMALL, "num_attention_heads": 8}, **WIDTHS).initialize(0)
    odd.save_pretrained(tmp_path / "odd")
    path = next((tmp_path / "odd").glob("*.safetensors"))
    assert StableDiffusion3Conditioner.from_pretrained(path).config["connector_config"]["num_attention_heads"] == 8


def test_a_published_config_with_further_entries_is_read(conditioner, tmp_path):
    conditioner.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["connector_config"] |= {"_attn_implementation": "flash_attention_2", "hidden_act": "gelu_pytorch_tanh"}
    path.write_text(json.dumps({**config, "_diffusers_version": "0.34.0"}))
    assert StableDiffusion3Conditioner.from_pretrained(tmp_path).config == conditioner.config


def test_weights_keep_their_type_unless_asked(conditioner, tmp_path):
    conditioner.half().save_pretrained(tmp_path)
    assert StableDiffusion3Conditioner.from_pretrained(tmp_path).dtype == torch.float16
    assert StableDiffusion3Conditioner.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 64}, "hidden_size"),
        ({"num_hidden_layers": 3}, "num_hidden_layers"),
        ({"num_attention_heads": 3}, "divisor of 128"),
        ({"num_attention_heads": None}, "num_attention_heads"),
        ({"hidden_act": "relu"}, "gelu_pytorch_tanh"),
        ({"intermediate_size": "96"}, "whole number"),
    ],
)
def test_a_config_that_does_not_fit_is_named(conditioner, tmp_path, change, words):
    conditioner.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["connector_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=words):
        StableDiffusion3Conditioner.from_pretrained(tmp_path)


def test_files_that_are_no_connector_are_named(conditioner, tmp_path):
    conditioner.save_pretrained(tmp_path / "a")
    path = next((tmp_path / "a").glob("*.safetensors"))
    tensors = load_file(path)

    def broken(name, **changes):
        changed = {k: v for k, v in {**tensors, **changes}.items() if v is not None}
        metadata = {METADATA_KEY: json.dumps(conditioner.config)}
        save_file(changed, tmp_path / f"{name}.safetensors", metadata=metadata)
        return tmp_path / f"{name}.safetensors"

    for file, words in (
        (broken("no queries", meta_queries=None), "meta_queries"),
        (broken("hole", **{"connector.layers.1.mlp.fc2.bias": None}), "1 missing tensors"),
        (broken("more", extra=torch.zeros(1)), "1 unknown tensors"),
        (broken("wide", **{"projector_2.bias": torch.zeros(3)}), "projector_2.bias"),
        (tmp_path / "absent.safetensors", "no such file"),
    ):
        with pytest.raises(InputError, match=words):
            StableDiffusion3Conditioner.from_pretrained(file)
    with pytest.raises(InputError, match="expected a MetaQuery connector"):
        conditioner_config({"pos_embed.proj.weight": (1, 1)})


def test_how_pictures_were_numbered_is_kept_and_checked(conditioner, tmp_path):
    assert "positions" not in conditioner.config
    told = StableDiffusion3Conditioner(**{**conditioner.config, "positions": "mrope"}).initialize(0)
    told.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "diffusion_pytorch_model.safetensors"):
        assert StableDiffusion3Conditioner.from_pretrained(path).config == told.config
    (tmp_path / "config.json").write_text(json.dumps({**told.config, "positions": "2d"}))
    with pytest.raises(InputError, match="positions in .*config.json: found '2d', expected one of 1d, mrope"):
        StableDiffusion3Conditioner.from_pretrained(tmp_path)
