"""The shipped workflows against ComfyUI's node descriptions, and in step with what `core` says."""

import json
from pathlib import Path

import pytest
from comfy_cli.link_integrity import broken_link_findings
from comfy_cli.workflow_to_api import convert_ui_to_api
from unipic2.core import micro, prompts

pytestmark = pytest.mark.comfyui

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
NAMES = [
    "micro_text_to_image",
    "micro_text_to_image_slg",
    "micro_edit",
    "micro_edit_fast",
    "micro_edit_full_size",
    "micro_edit_local",
    "micro_edit_batch",
    "micro_edit_lora",
    "micro_metaquery_text_to_image",
    "micro_metaquery_edit",
    "micro_metaquery_understand_edit",
    "unipic2_text_to_image",
    "unipic2_text_to_image_slg",
    "unipic2_edit",
    "unipic2_edit_fast",
    "unipic2_edit_full_size",
    "unipic2_edit_local",
    "unipic2_edit_batch",
    "unipic2_edit_lora",
    "unipic2_metaquery_text_to_image",
    "unipic2_metaquery_edit",
    "unipic2_metaquery_understand_edit",
]


@pytest.fixture(params=NAMES)
def workflow(request):
    return json.loads((FOLDER / f"{request.param}.json").read_text(encoding="utf-8"))


def api_nodes(workflow, comfyui):
    """Return class -> inputs as ComfyUI's `/prompt` gets them (only pictures are loaded by more than one node)."""
    prompt = convert_ui_to_api(workflow, comfyui[1]["object_info"])
    nodes = {node["class_type"]: node["inputs"] for node in prompt.values()}
    assert len(nodes) == len([node for node in prompt.values() if node["class_type"] != "LoadImage"]) + (
        "LoadImage" in nodes
    )
    return nodes


def test_every_file_is_tested():
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == sorted(NAMES)


def test_format_and_links(workflow):
    assert workflow["version"] == 0.4
    errors, warnings = broken_link_findings(workflow)
    assert (errors, warnings) == ([], [])
    ids = [node["id"] for node in workflow["nodes"]]
    assert len(set(ids)) == len(ids)
    assert workflow["last_node_id"] == max(ids)
    assert workflow["last_link_id"] == max(link[0] for link in workflow["links"])


def test_nodes_say_where_they_come_from(workflow):
    for node in workflow["nodes"]:
        if node["type"] != "MarkdownNote":
            assert node["properties"]["Node name for S&R"] == node["type"]
            ours = node["type"].startswith("UniPic2")
            assert node["properties"]["cnr_id"] == ("unipic2" if ours else "comfy-core")


def test_nodes_do_not_overlap(workflow):
    title = 30  # pixels of a node's title bar, above `pos`
    boxes = [(n["pos"][0], n["pos"][1] - title, n["pos"][0] + n["size"][0], n["pos"][1] + n["size"][1], n["type"])
             for n in workflow["nodes"]]  # fmt: skip
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a, b)


def test_converts_with_every_input_known_and_given(workflow, comfyui):
    info = comfyui[1]["object_info"]
    for name, given in api_nodes(workflow, comfyui).items():
        required = info[name]["input"].get("required", {})
        optional = info[name]["input"].get("optional", {})
        assert required.keys() <= given.keys(), name
        assert given.keys() <= required.keys() | optional.keys(), name


def test_sampling_values(workflow, comfyui):
    nodes = api_nodes(workflow, comfyui)
    sampler = nodes["KSampler"]
    assert (sampler["sampler_name"], sampler["scheduler"], sampler["denoise"]) == ("euler", "normal", 1.0)
    is_micro = "UniPic2MicroLoader" in nodes
    through_qwen = "UniPic2MetaQueryEncode" in nodes
    unguided = "UniPic2EditImageSize" in nodes and not through_qwen
    guidance = micro.EDIT_GUIDANCE_SCALE if unguided else micro.GUIDANCE_SCALE
    steps, cfg = (micro.NUM_INFERENCE_STEPS, guidance) if is_micro else (50, 3.5)
    texts = nodes["UniPic2MetaQueryEncode" if through_qwen else "UniPic2TextEncode"]
    assert (sampler["steps"], sampler["cfg"]) == (steps, cfg)
    if "EmptySD3LatentImage" in nodes:
        size = (nodes["EmptySD3LatentImage"]["width"], nodes["EmptySD3LatentImage"]["height"])
        assert size == ((micro.IMAGE_SIZE, micro.IMAGE_SIZE) if is_micro else (384, 512))
        assert texts["negative_prompt"] == prompts.DEFAULT_NEGATIVE_PROMPT
    else:
        size = nodes["UniPic2EditImageSize"]
        assert (size["longer_edge"], size["multiple"]) == (micro.IMAGE_SIZE if is_micro else 512, 32)
        negative = "" if is_micro else prompts.DEFAULT_EDIT_NEGATIVE_PROMPT
        assert texts["negative_prompt"] == negative


def test_stock_nodes_have_something_to_work_on(workflow, comfyui):
    """EasyCache is ignored by a model without editing; Skip Layer Guidance leaves out layers that there are."""
    nodes = api_nodes(workflow, comfyui)
    types = {str(node["id"]): node["type"] for node in workflow["nodes"]}
    model = types[nodes["KSampler"]["model"][0]]
    assert {"EasyCache", "SkipLayerGuidanceSD3"} & nodes.keys() <= {model}
    assert "EasyCache" not in nodes or "UniPic2EnableEditing" in nodes
    if "SkipLayerGuidanceSD3" in nodes:
        depth = micro.TRANSFORMER_CONFIG["num_layers"] if "UniPic2MicroLoader" in nodes else 24  # SD3.5-Medium's
        layers = nodes["SkipLayerGuidanceSD3"]["layers"].split(",")
        assert {int(layer) for layer in layers} <= set(range(depth))


def test_published_files_are_offered(workflow, comfyui):
    nodes = api_nodes(workflow, comfyui)
    offered = {}
    for node in workflow["nodes"]:
        for model in node["properties"].get("models", []):
            assert model["url"].startswith("https://huggingface.co/")
            assert model["url"].endswith(".safetensors")
            offered[model["name"]] = model["directory"]
    wanted = {}
    for name, directory in (
        ("UNETLoader", "diffusion_models"),
        ("TripleCLIPLoader", "text_encoders"),
        ("CLIPLoader", "text_encoders"),
        ("UniPic2ConnectorLoader", "model_patches"),
        ("VAELoader", "vae"),
    ):
        files = [value for value in nodes.get(name, {}).values() if str(value).endswith(".safetensors")]
        wanted.update(dict.fromkeys(files, directory))
    assert offered == wanted
    through_qwen = "UniPic2MetaQueryEncode" in nodes
    assert len(wanted) == (0 if "UniPic2MicroLoader" in nodes else 4 if through_qwen else 5)


def test_answers_come_from_the_file_of_load_clip(workflow, comfyui):
    """Its output layer, which ComfyUI's CLIP is without."""
    nodes = api_nodes(workflow, comfyui)
    if "UniPic2Understand" in nodes:
        micro = {"clip_name": "none (tied to the embedding)"}
        assert nodes["UniPic2Understand"]["lm_head"] == nodes.get("CLIPLoader", micro)["clip_name"]
        assert isinstance(nodes["UniPic2MetaQueryEncode"]["prompt"], list), "the answer is the instruction, or in it"
