"""ComfyUI's VAE, references and KSampler against diffusers on the same weights and the same noise."""

import pytest
import torch

pytestmark = pytest.mark.comfyui

STEPS, CFG = 20, 3.0  # what comfyui_process.py samples with


@torch.no_grad()
def test_vae_encodes_like_diffusers(comfyui, pipeline, inputs):
    expected = pipeline.vae.encode(inputs["image"].movedim(-1, 1) * 2 - 1).latents
    assert expected.std() > 0.1
    # After SD3's latent format, which is what the transformer reads.
    assert (comfyui[0]["vae.model_latents"] - expected).abs().max() <= 1e-5


@torch.no_grad()
def test_vae_decodes_like_diffusers(comfyui, pipeline, inputs):
    expected = (pipeline.vae.decode(inputs["latents"]).sample / 2 + 0.5).clamp(0, 1)
    assert ((expected > 0) & (expected < 1)).float().mean() > 0.1
    assert (comfyui[0]["vae.decoded"] - expected.movedim(1, -1)).abs().max() <= 1e-5


def test_reference_holds_the_unscaled_latents_for_both_prompts(comfyui):
    tensors, report = comfyui
    assert torch.equal(tensors["reference"], tensors["vae.latents"])
    # Its own also for the sampler: full noise hides them, as `test_ksampler_equals_the_pipeline` shows.
    assert torch.equal(tensors["reference_latent"], tensors["reference"])
    assert report["reference_latent_keys"] == ["samples"]
    assert report["reference_keys"] == [1, 1]
    assert report["input_keys"] == [False, False], "the incoming conditioning was changed"


@pytest.mark.parametrize("case", ["t2i", "edit", "edit_batch"])
def test_ksampler_equals_the_pipeline(comfyui, pipeline, inputs, case):
    tensors, _ = comfyui
    noise = tensors[f"sampling.{case}.noise"]
    batch = noise.shape[0]
    image = None if case == "t2i" else inputs["image"][:batch].movedim(-1, 1)
    expected = pipeline(
        prompt=["make it blue"] * batch,
        negative_prompt=["a circle"] * batch,
        image=image,
        height=64,
        width=96,
        num_inference_steps=STEPS,
        guidance_scale=CFG,
        latents=noise,
        output_type="latent",
    ).images
    assert (noise - expected).abs().max() > 0.1
    assert (tensors[f"sampling.{case}.latents"] - expected).abs().max() <= 1e-4


@pytest.mark.parametrize(("case", "batch"), [("t2i", 1), ("edit", 1), ("edit_batch", 2)])
def test_both_prompts_run_in_one_forward(comfyui, case, batch):
    # Counted by a DIFFUSION_MODEL wrapper, so it also shows that such wrappers run.
    assert comfyui[1][f"sampling.{case}.batches"] == [2 * batch] * STEPS


def test_the_stock_easycache_node_saves_forwards(comfyui):
    assert 0 < comfyui[1]["easycache_runs"] < STEPS


def test_easycache_that_leaves_nothing_out_changes_nothing(comfyui):
    tensors, report = comfyui
    assert (tensors["sampling.easycache_exact"] - tensors["sampling.edit.latents"]).abs().max() <= 1e-6
    assert report["input_left_alone"], "what EasyCache writes into its input must not reach the sampler"


def test_the_stock_lazycache(comfyui):
    tensors, report = comfyui
    assert 0 < report["lazycache_runs.saves"] < report["lazycache_runs.exact"] == STEPS
    assert torch.isfinite(tensors["sampling.lazycache_saves"]).all()
    assert (tensors["sampling.lazycache_exact"] - tensors["sampling.edit.latents"]).abs().max() <= 1e-6


@pytest.mark.parametrize("name", ["dual", "perpendicular"])
def test_stock_guiders_of_three_prompts(comfyui, name):
    """Each of the three has the reference: with such values they do what KSampler does with two."""
    tensors, _ = comfyui
    assert (tensors[f"sampling.guider_{name}"] - tensors["sampling.edit.latents"]).abs().max() <= 1e-4


def test_an_interrupted_edit_leaves_the_model_as_it_was(comfyui):
    tensors, report = comfyui
    assert report["interrupted"] == 3
    assert torch.equal(tensors["sampling.after_interrupt"], tensors["sampling.edit.latents"])


@pytest.mark.parametrize("name", ["batch", "width"])
def test_an_edit_in_context_windows(comfyui, name):
    """Stock Context Windows: each window sees its own references, or its own part of them."""
    tensors, report = comfyui
    found = report[f"windows.{name}"]
    if isinstance(found, str):
        assert "InputError: context windows: found an edit in them, expected ComfyUI 0.18" in found
        return
    assert found == {"batch": [12, 12], "width": [6, 6]}[name]
    seen, references = tensors[f"windows.{name}.seen"], tensors[f"windows.{name}.references"]
    assert (seen - references).abs().max() <= 1e-6
    if name == "batch":
        assert (tensors["windows.batch"] - tensors["sampling.edit_batch.latents"]).abs().max() <= 1e-5


@pytest.mark.parametrize("way", ["", "_differential"])
def test_a_local_edit_keeps_the_rest(comfyui, way):
    """The stock sampler, and with stock DifferentialDiffusion before it."""
    tensors, _ = comfyui
    local, picture = tensors[f"sampling.local{way}"], tensors["vae.latents"][:1]
    inside = torch.zeros(8, 12, dtype=torch.bool)
    inside[2:6, 4:8] = True
    assert (local - picture).abs()[..., ~inside].max() < 1e-5
    assert (local - picture).abs()[..., inside].mean() > 0.1


def test_the_stock_inpainting_conditioning_is_a_local_edit(comfyui):
    tensors, _ = comfyui
    assert (tensors["sampling.inpaint"] - tensors["sampling.local"]).abs().max() <= 1e-5


def test_the_stock_mask_behind_a_reference_keeps_the_picture(comfyui):
    tensors, _ = comfyui
    local, picture = tensors["sampling.stock_mask"], tensors["vae.latents"][:1]
    outside = torch.ones(8, 12, dtype=torch.bool)
    outside[1:7, 3:9] = False  # stock masks shrink softly
    assert (local - picture).abs()[..., outside].max() < 1e-5
    assert (local - picture).abs()[..., 3:5, 5:7].mean() > 0.1


def test_an_edit_with_a_stock_controlnet(comfyui):
    tensors, report = comfyui
    plain = tensors["sampling.edit.latents"]
    assert (tensors["sampling.control_nothing"] - plain).abs().max() <= 1e-5
    something = tensors["sampling.control_something"]
    assert (something - plain).abs().max() > 1e-2 and torch.isfinite(something).all()
    assert report["control_nothing"] == report["control_something"] == [24]


def test_two_references_one_behind_the_other(comfyui):
    tensors, report = comfyui
    assert report["two_references"] == [[[8, 12], [8, 8]]] * 2
    assert tensors["sampling.two_references"].shape == (1, 16, 8, 8)
    assert torch.isfinite(tensors["sampling.two_references"]).all()


def test_a_mask_of_all_there_is_edits_it_all(comfyui):
    tensors, _ = comfyui
    assert (tensors["sampling.local_all"] - tensors["sampling.edit.latents"]).abs().max() <= 1e-5


def test_a_thin_stroke_on_a_picture_of_another_size_is_kept_whole(comfyui):
    mask = comfyui[0]["mask.stroke"]
    assert mask.shape == (1, 1, 8, 12) and mask[0, 0, 2].eq(1).all() and mask.sum() == 12


def test_the_stock_skip_layer_guidance_edits(comfyui):
    tensors, report = comfyui
    runs, steps = report["slg_runs"]
    assert runs == steps, "the block runs for both prompts at once, and not in the pass that leaves it out"
    plain, nothing, skipping = (tensors[f"sampling.slg{name}"] for name in ("_plain", "_nothing", ""))
    assert (nothing - plain).abs().max() <= 1e-5
    assert (skipping - plain).abs().max() > 1e-3 and torch.isfinite(skipping).all()


def test_what_would_be_worse_without_a_word_is_told(comfyui):
    report = comfyui[1]
    (half,) = report["told.half"]
    assert "negative has no reference, positive has one" in half
    assert not report["told.none"] and not report["told.both"]
    assert len(report["told.combined"]) == 1 and "combined in positive" in report["told.combined"][0]
    (mask,) = report["told.mask"]
    assert "the mask (64x96) has another shape than the picture (96x64)" in mask
    (shift,) = report["told.shifted"]
    assert "shifted.safetensors: trained with shift" in shift and "sampled with 3" in shift
    assert not report["told.single"]
    assert report["told.encoders"] == ["UniPic2 Text Encode: no T5-XXL is loaded; UniPic2 was trained with all three."]


def test_a_taesd_preview(comfyui):
    assert comfyui[1]["preview"] == ["TAESDPreviewerImpl", 96, 64]
    assert comfyui[1]["previews"] == [[step, 3, 96, 64] for step in (1, 2, 3)], "one in each step of a KSampler"
