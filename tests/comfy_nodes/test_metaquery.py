"""MetaQuery in ComfyUI against the trainer's pipeline: conditioning, answers, older cores, refusals."""

import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from unipic2.cli.comfyui import resolve_install
from unipic2.core.checkpoint import read_header
from unipic2.core.files import VLM_LORA_FILE
from unipic2.core.prompts import POSITIONS
from unipic2.trainer import vlm_lora
from unipic2.trainer.query_states import build_prefix, query_states

from .conftest import METAQUERY_PROMPTS, VISION_SIZES

pytestmark = pytest.mark.comfyui

PICTURES = ["none", *(f"vision.{width}x{height}" for width, height in VISION_SIZES)]


def expected(metaquery, inputs, prompt, picture, positions):
    """What the trainer's path says of a prompt, alone or with a batch of two pictures."""
    metaquery.positions = positions
    pixels = None if picture == "none" else inputs[picture].movedim(-1, 1)
    with torch.no_grad():
        return metaquery.encode_conditions([prompt] * (1 if pixels is None else 2), pixels)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("prompt", range(len(METAQUERY_PROMPTS)))
def test_conditioning_is_the_trainers(comfyui, metaquery, inputs, prompt, picture, positions):
    tensors, _ = comfyui
    for side, number in (("positive", prompt), ("negative", prompt - 1)):
        states, pooled = expected(metaquery, inputs, METAQUERY_PROMPTS[number], picture, positions)
        at = f"metaquery.{prompt}.{picture}.{positions}.{side}"
        assert states.std() > 0.01
        assert (tensors[f"{at}.states"] - states).abs().max() <= 1e-4
        assert (tensors[f"{at}.pooled"] - pooled).abs().max() <= 1e-4


def test_the_cases_differ(comfyui):
    """Else equal numbers would say little: by prompt, by picture, and by how its tokens are numbered."""
    tensors, _ = comfyui
    base = tensors["metaquery.0.vision.64x64.1d.positive.states"]
    for other in ("1.vision.64x64.1d.positive", "0.vision.96x64.1d.positive", "0.vision.64x64.mrope.positive"):
        assert (base - tensors[f"metaquery.{other}.states"]).abs().max() > 1e-3
    assert (base[0] - base[1]).abs().max() > 1e-3


@pytest.mark.parametrize(("written", "same_as"), [("mrope", "mrope"), ("1d", "1d"), (None, "1d")])
def test_pictures_are_numbered_as_the_connector_was_trained(comfyui, written, same_as):
    tensors, _ = comfyui
    assert torch.equal(
        tensors[f"metaquery.auto.{written}"], tensors[f"metaquery.0.vision.64x64.{same_as}.positive.states"]
    )


def test_the_clip_is_left_as_it_was(comfyui):
    """A picture of ComfyUI's own nodes is read as before ours were used."""
    tensors, _ = comfyui
    assert torch.equal(tensors["metaquery.stock_picture"], tensors["metaquery.stock_picture_before"])


def test_weights_that_come_late_are_read_too(comfyui):
    """ComfyUI on NVIDIA makes layers without weights; what is expected of a file must not be asked of them."""
    tensors, _ = comfyui
    if "dynamic.text" not in tensors:
        pytest.skip("this ComfyUI has no dynamic VRAM")
    assert (tensors["dynamic.forward"] - tensors["forward.64x64x1.t2i"]).abs().max() <= 1e-5
    assert (tensors["dynamic.metaquery"] - tensors["metaquery.0.vision.96x64.1d.positive.states"]).abs().max() <= 1e-4


def test_older_cores_tokens_are_put_in_order(comfyui):
    tensors, _ = comfyui
    usual = tensors["metaquery.0.vision.256x288.1d.positive.states"]
    assert (tensors["metaquery.older"] - usual).abs().max() <= 1e-4


def test_eight_bit_weights_are_accepted(comfyui, metaquery, inputs):
    """Qwen2.5-VL's weights as float8: near the full weights' states, not at them."""
    states, _ = expected(metaquery, inputs, "x", "vision.64x64", "1d")
    difference = (comfyui[0]["metaquery.fp8"] - states).abs().mean() / states.abs().mean()
    assert 1e-4 < difference < 0.3


def test_a_lora_of_the_language_model_by_the_stock_loader(comfyui, qwen_lora, metaquery, inputs):
    tensors, _ = comfyui
    same = (inputs, METAQUERY_PROMPTS[0], "vision.96x64", "1d")
    with_lora, without = (expected(pipe, *same)[0] for pipe in (qwen_lora[0], metaquery))
    assert (with_lora - without).abs().max() > 1e-2
    assert (tensors["metaquery.with_lora"] - with_lora).abs().max() <= 1e-4
    assert (tensors["metaquery.without_lora"] - without).abs().max() <= 1e-4


@pytest.mark.parametrize("keyframes", ["without_keyframes", "of_one_strength"])
def test_clip_hooks_of_one_strength_work(comfyui, keyframes):
    """The same LoRA by Set CLIP Hooks; its conditioning takes the hooks along to the model."""
    tensors, report = comfyui
    assert (tensors[f"hooks.{keyframes}"] - tensors["metaquery.with_lora"]).abs().max() <= 1e-5
    assert report[f"hooks.{keyframes}"]


def test_published_sizes_have_the_names_that_such_a_lora_has(comfyui, tmp_path):
    """Of 7B by ComfyUI's own CLIP; of 3B by the name in its source."""
    text = {"num_hidden_layers": 1, "intermediate_size": 8, "num_key_value_heads": 1, "vocab_size": 8}
    for width, heads, name in ((3584, 28, "qwen25_7b"), (2048, 16, "qwen25_3b")):
        config = Qwen2_5_VLConfig(
            text_config={**text, "hidden_size": width, "num_attention_heads": heads},
            vision_config={"depth": 1, "hidden_size": 16, "num_heads": 1, "intermediate_size": 8},
        )
        vlm = Qwen2_5_VLForConditionalGeneration(config)
        vlm_lora.add_lora(vlm, 1, 2, seed=0)
        vlm_lora.save_lora(vlm, tmp_path / name)
        keys = {key.rsplit(".lora_", 1)[0] for key in read_header(tmp_path / name / VLM_LORA_FILE).shapes}
        keys = {key for key in keys if not key.endswith(".alpha")}
        assert len(keys) == 4 and all(key.startswith(f"text_encoders.{name}.") for key in keys)
        if width == 3584:
            assert keys <= set(comfyui[1]["qwen_7b_lora_keys"])
    source = resolve_install().root / "comfy/text_encoders/omnigen2.py"
    assert 'name="qwen25_3b"' in source.read_text(encoding="utf-8")


def test_load_clips_own_qwen_gives_the_same(comfyui, metaquery):
    """ComfyUI's class and tokenizer for Qwen-Image, whose template for it must stay out."""
    prefix = "stock_qwen."
    state = {key.removeprefix(prefix): t for key, t in comfyui[0].items() if key.startswith(prefix)}
    folder = resolve_install().root / "comfy/text_encoders/qwen25_tokenizer"
    tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=state["embed_tokens.weight"].shape[0], hidden_size=128, intermediate_size=64,
            num_hidden_layers=2, num_attention_heads=1, num_key_value_heads=1, rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        ),
        vision_config=dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=1, out_hidden_size=128),
        tie_word_embeddings=True,
    )  # fmt: skip
    vlm = Qwen2_5_VLForConditionalGeneration(config).eval()
    vlm.model.language_model.load_state_dict(state)
    with torch.no_grad():
        before = build_prefix(vlm, tokenizer, ["a red circle"])
        states, _ = metaquery.conditioner(query_states(vlm, metaquery.conditioner.meta_queries, before))
    assert states.std() > 0.01
    assert (comfyui[0]["metaquery.stock"] - states).abs().max() <= 1e-4


def generating(comfyui) -> dict:
    """Return the report of a ComfyUI that can answer; older ones cannot."""
    if not comfyui[1]["generates"]:
        pytest.skip("COMFYUI_PATH is a ComfyUI from before text generation for Qwen2.5-VL")
    return comfyui[1]


def test_answers_are_the_trainers(comfyui, metaquery, inputs):
    """Greedy, from random weights: any slip in tokens, positions or pictures shows."""
    report = generating(comfyui)
    answers = {}
    for picture in PICTURES:
        image = None
        if picture != "none":
            image = Image.fromarray((inputs[picture][0] * 255).round().byte().numpy())
        answers[picture] = metaquery.answer(METAQUERY_PROMPTS[0], image, max_new_tokens=6)
    assert report["answers"] == answers and len(set(answers.values())) > 1


def test_answers_by_the_output_layer_of_a_file(comfyui):
    """One turned upside down says something else; one with its scale says the same; and nothing of it stays."""
    report = generating(comfyui)
    tied, other, again, scaled = report["by_head"]
    assert tied == again == scaled != other
    assert not report["head_left_behind"]
    assert report["warm"][0] == report["warm"][1] != report["warm"][2]


def test_connectors_of_models_are_offered(comfyui):
    assert comfyui[1]["connectors"] == ["metaquery"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_qwen", ["MetaQuery Encode, clip", "found nothing", "qwen_image"]),
        ("other_clip", ["MetaQuery Encode, clip", "another text encoder", "Qwen2.5-VL"]),
        ("other_width", ["width 128", "3584"]),
        ("no_connector", ["MetaQuery Encode, connector", "Load Connector"]),
        ("blind", ["without vision", "qwen_2.5_vl_7b"]),
        *((f"blind_{left}", ["without vision"]) for left in ("none", "turned", "zeros", "nan", "huge", "file")),
        ("scheduled_hooks", ["MetaQuery Encode, clip", "a CLIP whose hooks have a schedule", "schedule_clip"]),
        ("odd_picture", ["96x48 pixels", "multiples of 32"]),
        ("small_picture", ["32x32 pixels"]),
        ("unknown_connector", ["'absent'", "'metaquery'", "model_patches"]),
        ("blind_answer", ["Understand, clip", "3B"]),
        ("no_generation", ["Understand: found a ComfyUI that has no text generation", "Update ComfyUI"]),
        ("narrow", ["lm_head narrow.safetensors", "shape (3, 128)"]),
        ("none", ["no lm_head.weight"]),
        ("qwen_as_text_encoder", ["a text encoder of another model"]),
    ],
)
def test_what_does_not_fit_is_named(comfyui, name, words):
    if name in ("narrow", "none"):
        generating(comfyui)
    if name == "blind_file" and name not in comfyui[1]["errors"]:
        pytest.skip("this ComfyUI does not note which file a CLIP is from")
    message = comfyui[1]["errors"][name]
    assert message.startswith("InputError: ")
    for word in words:
        assert word in message
