"""Workflow files: finding them, converting them, naming nodes, setting inputs."""

import json

import pytest
from unipic2.cli import workflow as wf
from unipic2.core.errors import InputError


@pytest.fixture
def prompt(ui, object_info):
    return wf.to_prompt(ui, object_info, "draw.json")[0]


def test_bundled_names(tmp_path, monkeypatch):
    monkeypatch.setattr(wf, "BUNDLED", tmp_path)
    (tmp_path / "micro_edit.json").write_text("{}")
    assert wf.find_workflow("micro_edit") == wf.find_workflow("micro_edit.json") == tmp_path / "micro_edit.json"
    with pytest.raises(InputError, match="one of the bundled: micro_edit. Did you mean micro_edit?"):
        wf.find_workflow("micro_edti")
    with pytest.raises(InputError, match="found a folder"):
        wf.find_workflow(str(tmp_path))


def test_subgraphs_and_bypassed_nodes_are_converted(ui, object_info):
    group = "12345678-1234-1234-1234-123456789abc"
    sampler = ui["nodes"][1]
    inner = {**sampler, "id": 5, "inputs": [{"name": "image", "type": "IMAGE", "link": 11}]}
    inner["outputs"] = [{"name": "IMAGE", "type": "IMAGE", "links": [12]}]
    definition = {
        "id": group,
        "name": "Group",
        "inputNode": {"id": -10},
        "outputNode": {"id": -20},
        "inputs": [{"id": "a", "name": "image", "type": "IMAGE", "linkIds": [11]}],
        "outputs": [{"id": "b", "name": "IMAGE", "type": "IMAGE", "linkIds": [12]}],
        "nodes": [inner],
        "links": [
            {"id": 11, "origin_id": -10, "origin_slot": 0, "target_id": 5, "target_slot": 0, "type": "IMAGE"},
            {"id": 12, "origin_id": 5, "origin_slot": 0, "target_id": -20, "target_slot": 0, "type": "IMAGE"},
        ],
    }
    ui["definitions"] = {"subgraphs": [definition]}
    ui["nodes"][1] = {**sampler, "type": group, "title": "Group", "widgets_values": []}
    prompt, _ = wf.to_prompt(ui, object_info, "x")
    kinds = {node["class_type"]: node_id for node_id, node in prompt.items()}
    assert set(kinds) == {"LoadImage", "KSampler", "SaveImage"}
    assert prompt[kinds["SaveImage"]]["inputs"]["images"] == [kinds["KSampler"], 0]
    assert wf.split_assignment(prompt, f"{kinds['KSampler']}.steps=3") == (kinds["KSampler"], "steps", "3")
    inner["mode"] = 4
    prompt, _ = wf.to_prompt(ui, object_info, "x")
    assert prompt["3"]["inputs"]["images"] == ["1", 0]


@pytest.mark.parametrize(
    ("properties", "remedy"),
    [
        ({"cnr_id": "comfy-core", "ver": "0.40.0"}, "belongs to ComfyUI itself (saved with 0.40.0): update ComfyUI"),
        ({"aux_id": "someone/pack"}, "comes with the node pack someone/pack"),
        ({}, "Install the node pack that has NewNode"),
    ],
)
def test_unknown_nodes_say_what_brings_them(ui, object_info, properties, remedy):
    ui["nodes"][1].update(type="NewNode", properties=properties)
    with pytest.raises(InputError) as error:
        wf.to_prompt(ui, object_info, "x")
    assert "NewNode (node 2)" in str(error.value) and remedy in str(error.value)


def test_unknown_nodes_of_this_pack_and_near_names(object_info):
    for kind, remedy in (("UniPic2TextEncode", "come with this package"), ("KSamplr", "Did you mean KSampler?")):
        with pytest.raises(InputError) as error:
            wf.to_prompt({"1": {"class_type": kind, "inputs": {}}}, object_info, "x")
        assert remedy in str(error.value)


def test_find_node(prompt):
    assert [wf.find_node(prompt, name) for name in ("2", "Sampler", "KSampler")] == ["2", "2", "2"]
    prompt["9"] = {"class_type": "KSampler", "inputs": {}, "_meta": {"title": "Second"}}
    with pytest.raises(InputError, match='2 of them: node 2 "Sampler" .KSampler., node 9 "Second"'):
        wf.find_node(prompt, "KSampler")
    prompt["9"]["_meta"]["title"] = "a.b (c)"
    assert wf.split_assignment(prompt, "a.b (c).model.seed=x=y") == ("9", "model.seed", "x=y")


@pytest.mark.parametrize(
    ("text", "spec", "value"),
    [
        ("7", ["INT", {}], 7),
        ("7", ["STRING", {}], "7"),
        ('"7"', ["STRING", {}], "7"),
        ("true", ["STRING", {}], "true"),
        ("true", ["BOOLEAN", {}], True),
        ("False", ["BOOLEAN", {}], False),
        ("0", ["BOOLEAN", {}], False),
        ("512", [["512", "1024"], {}], "512"),
        ("512", ["COMBO", {"options": ["512"]}], "512"),
        ("euler", [["euler"], {}], "euler"),
        ("[1, 2]", None, [1, 2]),
        ("", ["STRING", {}], ""),
    ],
)
def test_values(text, spec, value):
    assert wf.parse_value(text, spec) == value


def test_a_switch_takes_no_other_words():
    with pytest.raises(InputError, match="found 'off' for a switch, expected true or false"):
        wf.parse_value("off", ["BOOLEAN", {}])


def test_prompts_are_as_long_as_their_node_reads():
    """CLIP and T5 would lose most of it; Qwen2.5-VL reads 8192 tokens."""
    spec = {"input": {"required": {"prompt": ["STRING", {}]}}}
    text = "red " * 2500
    for kind in ("UniPic2TextEncode", "UniPic2MetaQueryEncode"):
        prompt = {"1": {"class_type": kind, "inputs": {"prompt": "x"}}}
        if kind == "UniPic2TextEncode":
            with pytest.raises(InputError, match="10,000 characters, expected at most 4,000. .*shorten it"):
                wf.set_prompt(prompt, text, {kind: spec})
        else:
            wf.set_prompt(prompt, text, {kind: spec})
            assert prompt["1"]["inputs"]["prompt"] == text


@pytest.mark.parametrize(
    ("kind", "inputs", "linked", "found"),
    [
        ("LoadImage", {}, 0, False),
        ("LoadImage", {}, 1, True),
        ("LoadImageMask", {"channel": "alpha"}, 0, True),
        ("LoadImageMask", {"channel": "red"}, 0, False),
    ],
)
def test_whose_transparency_is_read(kind, inputs, linked, found):
    nodes = {"1": {"class_type": kind, "inputs": inputs}, "2": {"class_type": "X", "inputs": {"x": ["1", linked]}}}
    assert wf.reads_transparency(nodes, "1") == found


def test_set_input(prompt, object_info):
    prompt["8"] = {"class_type": "EmptyImage", "inputs": {}}
    prompt["2"]["inputs"]["steps"] = ["8", 0]
    remark = wf.set_input(prompt, "2", "steps", 5, object_info)
    assert prompt["2"]["inputs"]["steps"] == 5 and "was connected to node 8 (EmptyImage)" in remark
    # A bare list would be read as a link.
    wf.set_input(prompt, "2", "cfg", [1, 2], object_info)
    assert prompt["2"]["inputs"]["cfg"] == {"__value__": [1, 2]}


def test_prompt_and_seed(prompt, object_info):
    encode = {"class_type": "TextEncode", "inputs": {"prompt": "a", "text": "b"}}
    prompt["7"] = json.loads(json.dumps(encode))
    assert wf.set_prompt(prompt, "7", object_info) is None and prompt["7"]["inputs"]["prompt"] == "7"
    prompt["8"] = encode
    with pytest.raises(InputError, match="2 nodes with one"):
        wf.set_prompt(prompt, "a", object_info)
    prompt["9"] = {"class_type": "KSampler", "inputs": {"seed": ["8", 0]}}
    remarks = wf.set_seed(prompt, 2**64 - 1, object_info)
    assert len(remarks) == 1 and prompt["2"]["inputs"]["seed"] == prompt["9"]["inputs"]["seed"] == 2**64 - 1
    with pytest.raises(InputError, match="no input named seed"):
        wf.set_seed({"7": encode}, 1, object_info)


def test_model_sources(ui):
    ui["nodes"][1]["properties"] = {"models": [{"name": "a.safetensors", "url": "https://x/a", "directory": "vae"}]}
    assert "https://x/a into models/vae" in wf.model_sources(ui)["a.safetensors"]
