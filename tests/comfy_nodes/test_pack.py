"""How the pack looks to ComfyUI and its users: loading, schema, picture sizes, refusals."""

import sys

import pytest
import torch

pytestmark = pytest.mark.comfyui

NODES = [
    "UniPic2MicroLoader", "UniPic2EnableEditing", "UniPic2TextEncode", "UniPic2EditImageSize", "UniPic2Reference",
    "UniPic2ConnectorLoader", "UniPic2MetaQueryEncode", "UniPic2Understand",
]  # fmt: skip


def test_loads_by_path_with_its_nodes_in_menu_order(comfyui):
    _, report = comfyui
    assert report["loaded"] is True
    assert report["nodes"] == NODES


def test_loading_imports_nothing_but_the_pack(comfyui):
    outside = [name for name in comfyui[1]["new_modules"] if "/ComfyUI-UniPic2" not in name]
    # ComfyUI itself reads our pyproject.toml, with the standard library.
    assert [name for name in outside if name.split(".")[0] not in sys.stdlib_module_names] == []
    assert not any(".trainer" in name or ".cli" in name for name in comfyui[1]["new_modules"])


def test_registers_its_model_folder(comfyui, models_folder):
    folders = comfyui[1]["folders"]
    assert str(models_folder) in folders, "a folder of the user's extra_model_paths.yaml was lost"
    assert any(folder.endswith("models/unipic2") for folder in folders)


@pytest.mark.parametrize("name", NODES)
def test_every_node_and_socket_is_explained(comfyui, name):
    info = comfyui[1]["object_info"][name]
    assert info["display_name"].startswith("UniPic2 ")
    assert info["category"] == "UniPic2"
    assert len(info["description"]) > 40
    for inputs in info["input"].values():
        for socket, (_, options) in inputs.items():
            assert len(options.get("tooltip", "")) > 20, socket
    assert all(info["output_tooltips"])


def test_loader_offers_the_bundled_models_and_the_folders(comfyui):
    kind, options = comfyui[1]["object_info"]["UniPic2MicroLoader"]["input"]["required"]["model"]
    choices = options["options"] if kind == "COMBO" else kind
    assert choices[:2] == ["micro (bundled)", "micro-pretrained (bundled)"]
    assert "random" in choices


REFUSALS = {
    "architecture": ("UniPic2 Enable Editing, model", "SD15", "expected SD3"),
    "odd_size": ("UniPic2 Reference, image", "90x60", "96x64", "UniPic2 Edit Image Size"),
    "no_vae": ("UniPic2 Reference, vae",),
    "wrong_vae": ("UniPic2 Reference, vae", "(2, 4, 8, 12)", "(2, 16, 8, 12)"),
    "empty_batch": ("UniPic2 Edit Image Size, image", "(0, 64, 96, 3)"),
    "empty_picture": ("UniPic2 Edit Image Size, image", "(2, 64, 0, 3)"),
    "two_channels": ("UniPic2 Edit Image Size, image", "2 channels"),
    "short_edge": ("UniPic2 Edit Image Size, longer_edge", "32", "64"),
    "no_clip": ("UniPic2 Text Encode, clip",),
    "wrong_clip": ("UniPic2 Text Encode, clip", "l, t5xxl", "CLIP-G"),
    "unknown_model": ("UniPic2 Micro Loader, model", "'absent'", "'random'"),
    "wrong_reference": ("reference latent", "(1, 4, 8, 8)", "16"),
    "folder_truncated": ("transformer/diffusion_pytorch_model.safetensors", "The file was cut off"),
    "folder_no_vae": ("no_vae/vae", "no safetensors file"),
    "folder_wrong_config": ("num_layers in", "transformer/config.json", "found 4", "expected 3"),
    "folder_wrong_tensors": ("1 missing tensors", "transformer_blocks.1.attn.to_q.weight"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_the_thing_and_the_remedy(comfyui, case):
    message = comfyui[1]["errors"][case]
    assert message.startswith("InputError: ")
    assert [part for part in REFUSALS[case] if part not in message] == []


def test_edit_size_keeps_the_shape_and_repeats_grey(comfyui):
    tensors, report = comfyui
    assert report["size"] == [64, 32]
    grey = tensors["size.grey"]
    assert grey.shape == (1, 32, 64, 3)
    assert torch.equal(grey[..., 0], grey[..., 2])
    # A ramp stays the ramp: pixel centres of 64 columns over 200.
    expected = (torch.arange(64) + 0.5) / 64 * 200 / 199 - 0.5 / 199
    assert (grey[0, 16, 2:-2, 0] - expected[2:-2]).abs().max() < 2e-3


def test_edit_size_lays_transparency_on_white(comfyui):
    picture = comfyui[0]["size.rgba"]  # black, alpha from 0 (left) to 1 (right)
    expected = 1 - torch.linspace(0, 1, 64)
    assert picture.shape == (1, 64, 64, 3)
    assert (picture[0, 10, :, 1] - expected).abs().max() < 1e-6


def test_edit_size_does_not_alias(comfyui):
    checker = comfyui[0]["size.checker"]  # a one-pixel checkerboard, shrunk eightfold: flat grey
    assert (checker[0, 4:-4, 4:-4] - 0.5).abs().max() < 0.02


def test_edit_size_leaves_a_fitting_picture_alone(comfyui, inputs):
    assert torch.equal(comfyui[0]["size.same"], inputs["image"])
