"""`unipic2 run` on a real ComfyUI with stock nodes: conversion, upload, events, outputs, metadata, errors."""

import json

import pytest
from PIL import Image
from unipic2.cli import main
from unipic2.cli.comfyui import Server, resolve_install

pytestmark = pytest.mark.comfyui


def node(node_id, kind, inputs, outputs, values, **more):
    """Return a node as the frontend saves it; `inputs` and `outputs` map names to links."""
    return {
        "id": node_id,
        "type": kind,
        "mode": 0,
        "inputs": [{"name": name, "type": "IMAGE", "link": link} for name, link in inputs.items()],
        "outputs": [{"name": name, "type": name, "links": links} for name, links in outputs.items()],
        "properties": {"cnr_id": "comfy-core"},
        "widgets_values": values,
        **more,
    }


def scale_and_invert() -> dict:
    nodes = [
        node(1, "LoadImage", {}, {"IMAGE": [1], "MASK": None}, ["example.png", "image"]),
        node(2, "ImageScale", {"image": 1}, {"IMAGE": [2]}, ["nearest-exact", 4, 4, "disabled"], title="Resize"),
        node(3, "ImageInvert", {"image": 2}, {"IMAGE": [3]}, []),
        node(4, "SaveImage", {"images": 3}, {}, ["ComfyUI"]),
    ]
    links = [[i, i, 0, i + 1, 0, "IMAGE"] for i in (1, 2, 3)]
    return {"version": 0.4, "last_node_id": 4, "last_link_id": 3, "nodes": nodes, "links": links}


@pytest.fixture(scope="module")
def url():
    with Server(resolve_install(), pack=None) as server:
        yield server.url


def run(*arguments) -> int:
    return main(["run", *map(str, arguments)])


def test_a_picture_crosses(url, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "draw.json").write_text(json.dumps(scale_and_invert()))
    picture = Image.new("RGB", (2, 1), (255, 0, 10))
    picture.putpixel((1, 0), (0, 255, 20))
    picture.save("in.png")
    assert run("draw.json", "--server", url, "--image", "in.png", "--set", "Resize.width=8") == 0
    assert capsys.readouterr().out == "draw.png\n"
    result = Image.open("draw.png")
    assert result.size == (8, 4) and result.mode == "RGB"
    assert result.getpixel((3, 3)) == (0, 255, 245) and result.getpixel((4, 0)) == (255, 0, 235)
    embedded = json.loads(result.info["prompt"])
    assert embedded["2"]["inputs"]["width"] == 8 and "workflow" not in result.info


def test_unchanged_workflow_is_embedded_and_batches_are_numbered(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workflow = scale_and_invert()
    workflow["nodes"][0] = node(1, "EmptyImage", {}, {"IMAGE": [1]}, [8, 8, 2, 255])
    (tmp_path / "draw.json").write_text(json.dumps(workflow))
    assert run("draw.json", "--server", url, "-o", "out.png") == 0
    for name in ("out_00001.png", "out_00002.png"):
        result = Image.open(name)
        assert result.getpixel((0, 0)) == (255, 255, 0)
        assert json.loads(result.info["workflow"]) == workflow


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "Invalid image file: example.png). Give the picture with --image 1=FILE."),
        (["--set", "Resize.upscale_method=best"], "'best' not in ['nearest-exact'"),
        (["--set", "Resize.width=-1"], 'node 2 "Resize" (ImageScale), input width: Value -1 smaller than min'),
        (["--set", "ImageScale.widht=1"], "Did you mean width?"),
    ],
)
def test_what_the_server_refuses(url, tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "draw.json").write_text(json.dumps(scale_and_invert()))
    Image.new("RGB", (2, 2)).save("in.png")
    image = ["--image", "in.png"] if options else []
    assert run("draw.json", "--server", url, *image, *options) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and "Traceback" not in err
