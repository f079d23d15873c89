"""The patched MODEL in ComfyUI against the trainer's transformer, on the same random float32 weights."""

import pytest
import torch
from unipic2.core.flow import shift_sigmas

from .conftest import FORWARD_CASES

pytestmark = pytest.mark.comfyui

CASES = [f"{width}x{height}x{batch}" for width, height, batch in FORWARD_CASES]
TOLERANCE = 1e-5


@torch.no_grad()
def reference_forward(transformer, inputs, case, edit, **options):
    if edit:
        options["ref_hidden_states"] = inputs[f"{case}.reference"]
    return transformer(
        inputs[f"{case}.x"],
        encoder_hidden_states=inputs[f"{case}.context"],
        pooled_projections=inputs[f"{case}.pooled"],
        timestep=inputs[f"{case}.timestep"],
        **options,
    ).sample


def difference(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("task", ["t2i", "edit"])
def test_forward_equals_the_trainer(comfyui, pipeline, inputs, case, task):
    expected = reference_forward(pipeline.transformer, inputs, case, edit=task == "edit")
    assert expected.std() > 0.1
    assert difference(comfyui[0][f"forward.{case}.{task}"], expected) <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_without_reference_it_is_stock_bit_for_bit(comfyui, case):
    tensors, _ = comfyui
    assert torch.equal(tensors[f"forward.{case}.t2i"], tensors[f"forward.{case}.stock"])
    assert difference(tensors[f"forward.{case}.edit"], tensors[f"forward.{case}.stock"]) > 0.01


def test_the_model_that_was_patched_is_unchanged(comfyui):
    tensors, _ = comfyui
    case = sorted(CASES)[0]
    assert torch.equal(tensors["forward.stock_again"], tensors[f"forward.{case}.stock"])


def test_patching_twice_is_patching_once(comfyui):
    tensors, _ = comfyui
    assert torch.equal(tensors["forward.twice"], tensors[f"forward.{sorted(CASES)[0]}.edit"])


def test_controlnet_residuals_reach_only_the_noisy_tokens(comfyui, pipeline, inputs):
    case = "96x64x1"
    # diffusers leaves out the last block's residual, so two are given to three blocks and the third is a filler.
    residuals = [inputs["control"][0], inputs["control"][1], torch.zeros_like(inputs["control"][0])]
    options = {"block_controlnet_hidden_states": residuals}
    expected = reference_forward(pipeline.transformer, inputs, case, edit=True, **options)
    assert difference(comfyui[0]["control.edit"], expected) <= TOLERANCE
    assert difference(comfyui[0]["control.edit"], comfyui[0][f"forward.{case}.edit"]) > 0.01


def test_an_exported_single_file_through_the_stock_loader(comfyui, pipeline, inputs):
    expected = reference_forward(pipeline.transformer, inputs, "96x64x1", edit=True)
    assert difference(comfyui[0]["single.edit"], expected) <= TOLERANCE


@pytest.mark.parametrize("order", ["before", "behind"])
def test_an_exported_lora_through_the_stock_loader(comfyui, lora, inputs, order):
    """Every attention and feed-forward, with a scale that is not 1."""
    expected = reference_forward(lora[0].transformer, inputs, "96x64x1", edit=True)
    assert difference(comfyui[0][f"lora.{order}"], expected) <= TOLERANCE
    assert difference(expected, comfyui[0]["forward.96x64x1.edit"]) > 1e-3


def test_low_vram(comfyui):
    """Weights that are brought in layer by layer, with a LoRA on them, and a reference."""
    is_low, layers = comfyui[1]["low_vram"]
    assert is_low and layers > 10
    assert difference(comfyui[0]["lora.low_vram"], comfyui[0]["lora.behind"]) <= TOLERANCE


def test_a_lora_with_unknown_keys_is_reported(comfyui):
    """ComfyUI names what it could not place, and loads the rest."""
    assert any("not loaded" in line and "transformer_blocks.99." in line for line in comfyui[1]["lora_unknown"])
    assert difference(comfyui[0]["lora.unknown"], comfyui[0]["lora.behind"]) == 0


@pytest.mark.parametrize("name", ["unet", "checkpoint"])
def test_stock_loaders_and_enable_editing(comfyui, pipeline, inputs, name):
    expected = reference_forward(pipeline.transformer, inputs, "96x64x1", edit=True)
    assert difference(comfyui[0][f"stock.{name}"], expected) <= TOLERANCE


def test_a_published_folder_among_the_stock_models_is_one_entry(comfyui, pipeline, inputs):
    assert comfyui[1]["loader_whole"] == ["whole"]
    expected = reference_forward(pipeline.transformer, inputs, "96x64x1", edit=True)
    assert difference(comfyui[0]["loader.whole"], expected) <= TOLERANCE


def test_merged_by_the_stock_node_saved_and_loaded(comfyui):
    tensors, _ = comfyui
    half = tensors["merge.half"]
    assert (half - tensors["forward.96x64x1.edit"]).abs().max() > 1e-3
    for name in ("direct", "saved"):
        assert (half - tensors[f"merge.{name}"]).abs().max() <= 1e-5, name


def test_the_stock_compilation_runs_the_editing_transformer(comfyui):
    tensors, report = comfyui
    assert report["compiled_nodes"] > 100
    assert (tensors["compile.plain"] - tensors["compile.compiled"]).abs().max() <= 1e-4


def test_a_clone_with_another_model_runs_that_model(comfyui):
    tensors, report = comfyui
    assert report["clone_runs_its_own_model"]
    assert torch.equal(tensors["clone.edit"], tensors[f"forward.{sorted(CASES)[0]}.edit"])


def test_memory_estimate_counts_the_reference(comfyui):
    without, with_reference = comfyui[1]["memory"]
    assert with_reference == pytest.approx(2 * without)
    without, with_reference, *_ = comfyui[1]["memory_before_loading"]
    assert with_reference == pytest.approx(2 * without, rel=0.01), "ComfyUI asks before it has loaded the model"


def test_memory_estimate_counts_a_reference_for_each_picture_that_it_serves(comfyui):
    """By batches of pictures and references: the forward repeats a reference, or leaves some out."""
    one, one_by_one, two, two_by_one, two_by_two = comfyui[1]["memory_before_loading"]
    assert two == pytest.approx(2 * one, rel=0.01)
    assert two_by_one == two_by_two == pytest.approx(2 * one_by_one, rel=0.01)


def test_an_area_sees_its_part_of_the_reference(comfyui):
    tensors = comfyui[0]
    reference = tensors["area.reference"]
    assert torch.equal(tensors["area.seen"], reference[..., reference.shape[-1] // 2 :])
    assert torch.equal(tensors["area.whole"], reference.repeat(2, 1, 1, 1))


@pytest.mark.parametrize("name", ["micro", "file"])
def test_comfyui_can_load_a_model_again(comfyui, name):
    """For TorchCompileModel, hooks and further GPUs, where weights cannot stay on the disk."""
    tensors, report = comfyui
    if "reloaded_clip" not in report:
        pytest.skip("this ComfyUI never asks")
    assert torch.equal(tensors[f"reloaded.{name}"], tensors["forward.96x64x1.edit"]) and report["reloaded_clip"]


@pytest.mark.parametrize("form", ["random", "sharded", "single", "comfyui", "checkpoint"])
def test_the_loader_takes_every_form(comfyui, form):
    tensors, report = comfyui
    assert (tensors[f"loader.{form}"] - tensors["forward.96x64x1.edit"]).abs().max() <= 1e-6
    assert report["loader_left_files"], "loading changed the files"


@pytest.mark.parametrize("form", ["sharded", "checkpoint"])
def test_the_loader_brings_the_vae(comfyui, form):
    tensors, _ = comfyui
    assert (tensors[f"loader.{form}.vae"] - tensors["vae.latents"]).abs().max() <= 1e-6


def test_loaders_sample_with_the_shift_that_was_trained(comfyui):
    """Files: none named, 1.5, one by size. A folder's scheduler, by both loaders: 2, one by size, SD3's own 3."""
    _, report = comfyui
    expected = [3.0, 1.5, 3.0, 2.0, 2.0, 3.0, 3.0, 3.0, 3.0]
    assert [shift for shift, _ in report["shifts"]] == expected
    half = [shift_sigmas(torch.tensor(0.5), shift).item() for shift in expected]
    assert [sigma for _, sigma in report["shifts"]] == pytest.approx(half)


@pytest.mark.parametrize("form", ["fp8", "single8", "comfyui8"])
def test_the_loader_takes_fp8(comfyui, form):
    """By its choice, and in files of both kinds of keys, which the stock Load Diffusion Model opens as well."""
    tensors, report = comfyui
    assert report["loader_fp8"] == "torch.float8_e4m3fn"
    exact, found = tensors["forward.96x64x1.edit"], tensors[f"loader.{form}"]
    assert 1e-4 < (found - exact).abs().mean() < 0.2 * exact.abs().mean()
    if form != "fp8":
        assert (tensors[f"stock.{form}"] - found).abs().max() <= 1e-6
