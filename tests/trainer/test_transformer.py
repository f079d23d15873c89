"""The Kontext transformer against its parent and against the contract's figures."""

import pytest
import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig
from unipic2.core.errors import InputError
from unipic2.trainer import SD3Transformer2DKontextModel

PUBLISHED = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}


@pytest.fixture
def model(small_config, randomise):
    return randomise(SD3Transformer2DKontextModel(**small_config))


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 16, 8, 12, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, 32, generator=generator),
        "pooled_projections": torch.randn(2, 24, generator=generator),
        "timestep": torch.tensor([900.0, 250.0]),
    }


@pytest.fixture
def reference():
    return torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(2))


def test_the_published_config_has_the_published_size():
    with torch.device("meta"):
        model = SD3Transformer2DKontextModel(**PUBLISHED)
    state = model.state_dict()
    assert len(state) == 909
    assert sum(t.numel() for t in state.values()) == 2_469_663_936
    assert sum(p.numel() for p in model.parameters()) == 2_243_171_520
    assert all(t.is_meta for t in state.values())


def test_same_keys_as_the_parent(model, small_config):
    assert model.state_dict().keys() == SD3Transformer2DModel(**small_config).state_dict().keys()


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"skip_layers": [1]}, {"joint_attention_kwargs": {}}])
def test_without_a_reference_it_is_the_parent(model, small_config, inputs, options):
    parent = SD3Transformer2DModel(**small_config).eval()
    parent.load_state_dict(model.state_dict())
    assert torch.equal(model(**inputs, **options).sample, parent(**inputs, **options).sample)
    assert torch.equal(model(**inputs, **options, return_dict=False)[0], parent(**inputs, **options).sample)


@torch.no_grad()
def test_controlnet_residuals_without_a_reference_are_the_parents(model, small_config, inputs):
    parent = SD3Transformer2DModel(**small_config).eval()
    parent.load_state_dict(model.state_dict())
    residual = [torch.randn(2, 24, 128)]
    expected = parent(**inputs, block_controlnet_hidden_states=residual).sample
    assert torch.equal(model(**inputs, block_controlnet_hidden_states=residual).sample, expected)


def forward_noisy_first(model, inputs, reference):
    """Return the same velocity with the tokens in the order [noisy, reference], written from the description."""
    noisy, ref = inputs["hidden_states"], reference
    x = torch.cat([model.pos_embed(noisy), model.pos_embed(ref)], dim=1)
    count = x.shape[1] // 2
    temb = model.time_text_embed(inputs["timestep"], inputs["pooled_projections"])
    text = model.context_embedder(inputs["encoder_hidden_states"])
    for block in model.transformer_blocks:
        text, x = block(hidden_states=x, encoder_hidden_states=text, temb=temb)
    x = model.proj_out(model.norm_out(x[:, :count], temb))
    batch, channels, height, width = noisy.shape
    out = torch.empty_like(noisy)
    for token in range(count):
        top, left = 2 * (token // (width // 2)), 2 * (token % (width // 2))
        patch = x[:, token].reshape(batch, 2, 2, channels).permute(0, 3, 1, 2)
        out[:, :, top : top + 2, left : left + 2] = patch
    return out


@torch.no_grad()
def test_token_order_does_not_matter(model, inputs, reference):
    ours = model(**inputs, ref_hidden_states=reference).sample
    torch.testing.assert_close(ours, forward_noisy_first(model, inputs, reference), atol=1e-5, rtol=0)
    assert ours.std() > 0.1


@torch.no_grad()
def test_the_reference_matters(model, inputs, reference):
    plain = model(**inputs).sample
    edited = model(**inputs, ref_hidden_states=reference).sample
    other = model(**inputs, ref_hidden_states=reference.flip(0)).sample
    assert (plain - edited).abs().max() > 1e-2
    assert (edited - other).abs().max() > 1e-2


@torch.no_grad()
def test_the_reference_comes_by_either_way(model, inputs, reference):
    by_name = model(**inputs, ref_hidden_states=reference).sample
    kwargs = {"ref_hidden_states": reference}
    assert torch.equal(model(**inputs, joint_attention_kwargs=kwargs).sample, by_name)
    assert torch.equal(model(**inputs, joint_attention_kwargs=kwargs, return_dict=False)[0], by_name)
    assert list(kwargs) == ["ref_hidden_states"]  # the caller passes it again at the next step


@torch.no_grad()
def test_a_doubled_batch_is_two_separate_forwards(model, inputs, reference):
    """Classifier-free guidance: [negative, positive] texts, latents twice, the reference given once."""
    other_text, other_pooled = torch.randn(2, 5, 32), torch.randn(2, 24)
    doubled = model(
        hidden_states=inputs["hidden_states"].repeat(2, 1, 1, 1),
        encoder_hidden_states=torch.cat([other_text, inputs["encoder_hidden_states"]]),
        pooled_projections=torch.cat([other_pooled, inputs["pooled_projections"]]),
        timestep=inputs["timestep"].repeat(2),
        ref_hidden_states=reference,
    ).sample
    negative = {**inputs, "encoder_hidden_states": other_text, "pooled_projections": other_pooled}
    separate = [model(**i, ref_hidden_states=reference).sample for i in (negative, inputs)]
    torch.testing.assert_close(doubled, torch.cat(separate), atol=1e-5, rtol=0)
    assert (separate[0] - separate[1]).abs().max() > 1e-2


@torch.no_grad()
def test_one_reference_serves_all(model, inputs, reference):
    one = model(**inputs, ref_hidden_states=reference[:1]).sample
    assert torch.equal(one, model(**inputs, ref_hidden_states=reference[:1].repeat(2, 1, 1, 1)).sample)


@torch.no_grad()
def test_skipped_layers_with_a_reference(model, inputs, reference):
    full = model(**inputs, ref_hidden_states=reference).sample
    skipped = model(**inputs, ref_hidden_states=reference, skip_layers=[0]).sample
    assert (full - skipped).abs().max() > 1e-2


@torch.no_grad()
def test_controlnet_residuals_reach_the_noisy_tokens_only(model, inputs, reference):
    seen = []
    hook = model.transformer_blocks[1].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    residual = torch.randn(2, 24, 128)
    model(**inputs, ref_hidden_states=reference)
    model(**inputs, ref_hidden_states=reference, block_controlnet_hidden_states=[residual])
    hook.remove()
    assert torch.equal(seen[0][:, :24], seen[1][:, :24])
    torch.testing.assert_close(seen[1][:, 24:], seen[0][:, 24:] + residual)


@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (2, 16, 12, 8), (2, 8, 8, 12), (3, 16, 8, 12), (4, 16, 8, 12)])
def test_a_reference_that_does_not_fit(model, inputs, shape):
    with pytest.raises(
        InputError, match=r"reference latents: found .*expected \(2, 16, 8, 12\).*Resize the reference"
    ):
        model(**inputs, ref_hidden_states=torch.zeros(shape))


def gradients(model, inputs, reference):
    model.zero_grad()
    model.train()
    model(**inputs, ref_hidden_states=reference).sample.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_gives_the_same_gradients(model, inputs, reference):
    plain = gradients(model, inputs, reference)
    model.enable_gradient_checkpointing()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        model(**inputs, ref_hidden_states=reference)
    with_checkpointing = sum(saved)
    again = gradients(model, inputs, reference)
    assert plain.keys() == again.keys() and len(plain) > 50
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], atol=1e-7, rtol=1e-5)
    model.disable_gradient_checkpointing()
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        model(**inputs, ref_hidden_states=reference)
    assert with_checkpointing < 0.5 * sum(saved), "checkpointing keeps few activations on the reference path too"


def add_lora(model):
    projections = ["to_q", "to_k", "to_v", "to_out.0"]
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=projections, init_lora_weights=False))


def test_lora_reaches_both_attentions_and_trains(model, inputs, reference):
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    adapted = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert adapted and all("lora_" in name for name in adapted)
    assert {name.split(".")[2] for name in adapted} == {"attn", "attn2"}
    assert {name.split(".")[1] for name in adapted if ".attn2." in name} == {"0"}
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(adapted.values(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = (model(**inputs, ref_hidden_states=reference).sample - 1).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(p.abs().sum() > 0 for n, p in adapted.items() if "attn2" in n), "B leaves zero where it is trained"
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


@torch.no_grad()
@pytest.mark.parametrize("with_reference", [False, True])
def test_the_lora_scale_is_applied(model, inputs, reference, with_reference):
    """diffusers passes `joint_attention_kwargs={"scale": s}` for this; 0 must give the model without the LoRA."""
    options = {"ref_hidden_states": reference} if with_reference else {}
    base = model(**inputs, **options).sample
    add_lora(model)
    full = model(**inputs, **options).sample
    off = model(**inputs, **options, joint_attention_kwargs={"scale": 0.0}).sample
    assert (full - base).abs().max() > 1e-3
    torch.testing.assert_close(off, base, atol=1e-6, rtol=0)
    assert torch.equal(model(**inputs, **options).sample, full), "the scale holds for one call"


@torch.no_grad()
def test_half_precision_with_a_float32_reference(model, inputs, reference):
    half = {k: v.to(torch.bfloat16) if k != "timestep" else v for k, v in inputs.items()}
    out = model.to(torch.bfloat16)(**half, ref_hidden_states=reference).sample
    assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()
