"""Training parts of the transformer: attention alone, LoRAs; LoRA files that diffusers and ComfyUI read alike."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from unipic2.core.errors import InputError
from unipic2.trainer.adapters import lora_config, prepare, save_lora


@pytest.fixture
def small(make_small_pipeline):
    return make_small_pipeline()


def trained_names(transformer):
    return {name for name, p in transformer.named_parameters() if p.requires_grad}


def test_attention_alone(small):
    prepare(small.transformer, "attention", None, seed=0)
    names = trained_names(small.transformer)
    assert "transformer_blocks.0.attn2.to_q.weight" in names and "transformer_blocks.1.attn.add_k_proj.weight" in names
    assert all(".attn." in name or ".attn2." in name for name in names)


def test_everything(small):
    prepare(small.transformer, "full", None, seed=0)
    assert trained_names(small.transformer) == {name for name, _ in small.transformer.named_parameters()}


def test_frozen_weights_keep_their_type(small):
    small.transformer.to(torch.bfloat16)
    prepare(small.transformer, "full", lora_config(4, 8, 0.0, ["attention", "ff"]), seed=0)
    types = {p.requires_grad: p.dtype for p in small.transformer.parameters()}
    assert types == {True: torch.float32, False: torch.bfloat16}
    names = trained_names(small.transformer)
    assert all("lora_" in name for name in names)
    for module in ("attn2.to_v", "attn.to_out.0", "attn.add_q_proj", "ff.net.0.proj", "ff_context.net.2"):
        assert any(f"transformer_blocks.0.{module}.lora_A" in name for name in names), module


def test_loras_are_drawn_from_the_seed(make_small_pipeline):
    state = torch.get_rng_state()
    drawn = []
    for seed in (0, 0, 1):
        transformer = make_small_pipeline().transformer
        torch.set_rng_state(state)
        prepare(transformer, "full", lora_config(4, 4, 0.0, ["attn2.to_q"]), seed)
        assert torch.equal(torch.get_rng_state(), state)
        drawn.append(transformer.transformer_blocks[0].attn2.to_q.lora_A["default"].weight.clone())
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("field", "values"), [("lora_r", (0, 4, 0.0, ["attention"])), ("lora_dropout", (4, 4, 1.0, ["attention"]))]
)
def test_numbers_that_cannot_be(field, values):
    with pytest.raises(InputError, match=field):
        lora_config(*values)


@pytest.mark.parametrize("target", ["to_z", "attn"])
def test_a_target_that_is_no_layer(small, target):
    with pytest.raises(InputError, match=f"lora_target_modules: found '{target}'"):
        prepare(small.transformer, "full", lora_config(4, 4, 0.0, ["to_q", target]), seed=0)


@torch.no_grad()
def test_both_files_give_the_trained_model(small, tmp_path, inputs_for):
    """diffusers loads its file into a fresh model; the other file's `.alpha`, A and B give the same weights."""
    plain = copy.deepcopy(small)
    prepare(small.transformer, "full", lora_config(4, 12, 0.0, ["attention", "ff"]), seed=0)
    for name, parameter in small.transformer.named_parameters():
        if "lora_B" in name:
            parameter.copy_(0.1 * torch.randn(parameter.shape))
    save_lora(small, tmp_path)
    arguments = inputs_for(small.transformer)
    expected = small.transformer(**arguments).sample
    assert (plain.transformer(**arguments).sample - expected).abs().max() > 1e-2
    by_hand = copy.deepcopy(plain.transformer)
    tensors = load_file(tmp_path / "comfyui_lora.safetensors")
    modules = {key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")}
    assert len(tensors) == 3 * len(modules) and all(m.startswith("transformer.transformer_blocks.") for m in modules)
    for module in modules:
        down, up = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
        layer = by_hand.get_submodule(module.removeprefix("transformer."))
        layer.weight.add_(tensors[f"{module}.alpha"] / down.shape[0] * up @ down)
    torch.testing.assert_close(by_hand(**arguments).sample, expected, atol=1e-4, rtol=1e-4)
    plain.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(plain.transformer(**arguments).sample, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture
def inputs_for():
    def make(transformer):
        generator = torch.Generator().manual_seed(1)
        config = transformer.config
        latents = torch.randn(2, 2, 16, 8, 8, generator=generator)
        return {
            "hidden_states": latents[0],
            "ref_hidden_states": latents[1],
            "encoder_hidden_states": torch.randn(2, 5, config.joint_attention_dim, generator=generator),
            "pooled_projections": torch.randn(2, config.pooled_projection_dim, generator=generator),
            "timestep": torch.tensor([200.0, 700.0]),
        }

    return make
