"""How the pack looks to ComfyUI and its users: loading, schema, picture sizes, refusals."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.comfyui

ROOT = Path(__file__).resolve().parents[2]

NODES = [
    "UniPic2Loader", "UniPic2MicroLoader", "UniPic2EnableEditing", "UniPic2TextEncode", "UniPic2EditImageSize",
    "UniPic2Reference", "UniPic2PasteBack", "UniPic2ConnectorLoader", "UniPic2MetaQueryEncode", "UniPic2Understand",
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


def sockets(info):
    """Return `{input: tooltip}` and `[(output, tooltip)]` of a node's description."""
    inputs = {name: options["tooltip"] for kind in info["input"].values() for name, (_, options) in kind.items()}
    return inputs, list(zip(info["output_name"], info["output_tooltips"], strict=True))


@pytest.mark.parametrize("name", NODES)
def test_every_node_has_a_help_page_that_explains_its_inputs(comfyui, name):
    info = comfyui[1]["object_info"][name]
    page = (ROOT / "web/docs" / f"{name}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {info['display_name']}\n")
    cells = re.findall(r"^\| ([^|]+) \|", page, flags=re.MULTILINE)
    explained = {word.strip() for cell in cells for word in cell.split(",")}
    assert sockets(info)[0].keys() <= explained
    assert f"web/docs/{name}.md" in (ROOT / "docs/nodes.md").read_text(encoding="utf-8")


def test_there_are_no_other_help_pages():
    assert sorted(path.stem for path in (ROOT / "web/docs").iterdir()) == sorted(NODES)


@pytest.mark.parametrize("name", NODES)
@pytest.mark.parametrize("language", ["en", "zh", "ja"])
def test_translations_are_complete(comfyui, language, name):
    texts = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    assert texts.keys() == set(NODES)
    info, found = comfyui[1]["object_info"][name], texts[name]
    inputs, outputs = sockets(info)
    assert found["inputs"].keys() == inputs.keys()
    assert list(found["outputs"]) == [str(i) for i in range(len(outputs))]
    if language == "en":
        assert (found["display_name"], found["description"]) == (info["display_name"], info["description"])
        assert {key: entry["tooltip"] for key, entry in found["inputs"].items()} == inputs
        assert [(entry["name"], entry["tooltip"]) for entry in found["outputs"].values()] == outputs
    else:
        entries = [found, *found["inputs"].values(), *found["outputs"].values()]
        said = [text for entry in entries for key, text in entry.items() if key in ("description", "tooltip")]
        assert all(re.search("[\u3040-\u30ff\u4e00-\u9fff]", text) for text in said)


def test_loader_offers_the_bundled_models_and_the_folders(comfyui):
    kind, options = comfyui[1]["object_info"]["UniPic2MicroLoader"]["input"]["required"]["model"]
    choices = options["options"] if kind == "COMBO" else kind
    assert choices[:3] == ["micro (bundled)", "micro-pretrained (bundled)", "micro-metaquery (bundled)"]
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
    "empty_mask": ("UniPic2 Reference, mask", "64x64 pixels above 0", "MaskEditor"),
    "masks": ("UniPic2 Reference, mask", "3 of them", "1 or 2"),
    "wrong_reference": ("reference latent", "(1, 4, 8, 8)", "16"),
    "too_large": ("picture to sample", "64x512 pixels", "at most 256x256"),
    "too_many": ("reference latent", "2 references for a batch of 1", "Rebatch Images"),
    "loader_shift": ("unshifted.safetensors, shift", "found 'none'", "a number above 0"),
    "loader_lora": ("UniPic2 Loader, lora.safetensors", "found LoRA", "LoraLoaderModelOnly"),
    "loader_absent": ("UniPic2 Loader, model", "'../random'"),
    "paste_other_original": ("UniPic2 Paste Back, original", "503x331", "Connect the same picture"),
    "paste_other_shape": ("UniPic2 Paste Back, image", "256x64 pixels"),
    "paste_batches": ("UniPic2 Paste Back, image", "2 in the batch", "1 or 3"),
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


def test_without_a_vae_comfyui_says_so(comfyui):
    assert "VAE is invalid" in comfyui[1]["errors"]["loader_no_vae"]


def shift(result, original):
    """Return by how many pixels (x, y) `result` lies beside `original`, by least squares over the gradients."""
    a, b = (picture[0].mean(-1).double() for picture in (original, result))
    gy, gx = torch.gradient(a)
    inside = (slice(16, -16), slice(16, -16))
    gradients = torch.stack([-gx[inside].flatten(), -gy[inside].flatten()], dim=1)
    return torch.linalg.lstsq(gradients, (b - a)[inside].flatten()[:, None]).solution[:, 0]


def test_the_shift_is_measured(inputs):
    photo = inputs["photo"]
    moved = torch.roll(photo, (1, -1), (1, 2))
    assert (shift(moved, photo) - torch.tensor([-1.0, 1.0])).abs().max() < 0.05


@pytest.mark.parametrize("way", ["", ".enlarged"])
@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
def test_an_edit_comes_back_where_it_was(comfyui, inputs, fit, way):
    back, photo = comfyui[0][f"paste.{fit}{way}"], inputs["photo"]
    assert back.shape == photo.shape
    assert shift(back, photo).abs().max() < 0.05
    assert (back - photo).abs().max() < 0.05


@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
def test_a_mask_holds_the_edit_to_its_place(comfyui, inputs, fit):
    photo = inputs["photo"]
    (width, height), source, target = comfyui[1][f"paste.{fit}"]
    assert width % 32 == height % 32 == 0
    assert (fit == "crop") == (source != [0, 0, 503, 331])
    assert (fit == "pad") == (target != [0, 0, width, height])
    masked = comfyui[0][f"paste.{fit}.masked"]
    assert masked.shape == (2, *photo.shape[1:])
    assert not masked[:, 60:140, 100:200].any()
    outside = torch.ones(photo.shape[1:3], dtype=torch.bool)
    outside[60:140, 100:200] = False
    assert torch.equal(masked[1][outside], photo[0][outside])
    drawn = comfyui[0][f"paste.{fit}.drawn_mask"][0]  # as the model saw it, so a few pixels of the original apart
    near = torch.zeros_like(outside)
    near[55:145, 95:205] = True
    assert torch.equal(drawn[~near], photo[0][~near]) and drawn[65:135, 105:195].max() < 1e-5
    feathered = comfyui[0][f"paste.{fit}.feathered"][0] / photo[0].clamp_min(1e-3)
    assert feathered[60:140, 100:200].max() < 1e-5, "all that is masked is the edit"
    assert (feathered[100, 95] - 0.45).abs().max() < 0.15  # half way through the fade
    assert (feathered[100, 88] - 1).abs().max() < 1e-5
    small = comfyui[0][f"paste.{fit}.mask"]
    assert small.shape == (1, height, width)
    left, top, right, bottom = target
    scale = (right - left) / (source[2] - source[0]), (bottom - top) / (source[3] - source[1])
    assert abs(small.sum() - 80 * 100 * scale[0] * scale[1]) < 0.01 * small.sum()
    assert small[0, top + round((100 - source[1]) * scale[1]), left + round((150 - source[0]) * scale[0])] == 1


def test_cropped_edges_fade(comfyui, inputs):
    """A black edit of the middle: no seam where it was cut off, and none drawn where the picture itself ends."""
    tensors, report = comfyui
    (left, top, right, bottom), (width, height) = report["paste.crop_edges"]
    assert (top, bottom) == (0, height) and 0 < left < right < width
    shares = (tensors["paste.crop_edges"] / inputs["photo"].clamp(min=1e-3))[0].mean(-1)
    assert shares[[0, -1], left + 9 : right - 9].max() < 1e-5
    share = shares[height // 2]
    assert share[:left].sub(1).abs().max() < 1e-5 and share[right:].sub(1).abs().max() < 1e-5
    assert share[left + 9 : right - 9].max() < 1e-5
    fade = share[left : left + 8]
    assert (fade.diff() < 0).all() and fade[0] > 0.9 and fade[-1] < 0.1


def test_padding_is_not_in_the_mask(comfyui):
    _, _, (left, top, right, bottom) = comfyui[1]["paste.pad"]
    whole = comfyui[0]["paste.whole_mask"]
    assert whole.sum() == (right - left) * (bottom - top) < whole.numel()
