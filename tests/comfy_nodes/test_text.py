"""Prompts in ComfyUI against transformers: the micro text encoder's states, and the tokens for SD3's encoders."""

import pytest
import torch
from transformers import CLIPTokenizer, T5TokenizerFast
from unipic2.cli.comfyui import resolve_install
from unipic2.core.micro import MAX_TOKENS
from unipic2.core.prompts import T5_TOKENS

from .conftest import PROMPTS

pytestmark = pytest.mark.comfyui


@pytest.mark.parametrize("name", PROMPTS)
def test_micro_text_states(comfyui, pipeline, name):
    tensors, _ = comfyui
    options = {"padding": "max_length", "max_length": MAX_TOKENS, "truncation": True, "return_tensors": "pt"}
    text = PROMPTS[name].replace("\\(", "(").replace("\\)", ")")  # ComfyUI's way to write a bracket
    tokens = pipeline.tokenizer(text, **options).input_ids
    with torch.no_grad():
        expected = pipeline.text_encoder(tokens, output_hidden_states=True)
    assert (tensors[f"text.{name}.states"] - expected.hidden_states[-2]).abs().max() <= 1e-5
    assert (tensors[f"text.{name}.pooled"] - expected.text_embeds).abs().max() <= 1e-5
    assert tensors[f"text.{name}.states"].shape == tensors[f"text.{name}.negative"].shape


@pytest.mark.parametrize("name", ["short", "empty", "brackets"])
def test_stock_clip_text_encode_gives_the_same(comfyui, name):
    tensors, _ = comfyui
    assert torch.equal(tensors[f"text.{name}.states"], tensors[f"text.{name}.stock_states"])
    assert torch.equal(tensors[f"text.{name}.pooled"], tensors[f"text.{name}.stock_pooled"])


def test_weights_work_as_in_the_stock_node(comfyui):
    tensors, _ = comfyui
    assert torch.equal(tensors["text.weighted"], tensors["text.weighted_stock"])
    assert not torch.equal(tensors["text.weighted"], tensors["text.short.states"])


def test_scheduled_clip_hooks_give_what_the_stock_node_gives(comfyui):
    """A LoRA in the first half of sampling, by Set CLIP Hooks: one conditioning for each half."""
    tensors, report = comfyui
    assert report["schedule.ours"] == report["schedule.stock"] == [[0.0, 0.5], [0.5, 1.0]]
    for half in range(2):
        assert torch.equal(tensors[f"schedule.ours.{half}"], tensors[f"schedule.stock.{half}"])
    without = tensors["text.short.states"]
    assert (tensors["schedule.ours.0"] - without).abs().max() > 1e-2
    assert (tensors["schedule.ours.1"] - without).abs().max() <= 1e-5


@pytest.fixture(scope="module")
def sd3_tokenizers(comfyui):
    folder = resolve_install().root / "comfy"
    clip = CLIPTokenizer.from_pretrained(folder / "sd1_tokenizer")
    return clip, T5TokenizerFast.from_pretrained(folder / "text_encoders" / "t5_tokenizer")


@pytest.mark.parametrize("name", ["short", "empty", "long"])
def test_sd3_tokens_are_those_of_the_published_pipeline(comfyui, sd3_tokenizers, name):
    clip, t5 = sd3_tokenizers
    tokens = comfyui[1][f"sd3_tokens.{name}"]
    options = {"padding": "max_length", "truncation": True}
    assert tokens["l"] == [clip(PROMPTS[name], max_length=77, **options).input_ids]
    assert tokens["t5xxl"] == [t5(PROMPTS[name], max_length=T5_TOKENS, **options).input_ids]
    # CLIP-G pads with 0, as its published tokenizer does with "!".
    words = clip(PROMPTS[name], max_length=77, truncation=True).input_ids
    assert tokens["g"] == [words + [0] * (77 - len(words))]


@pytest.mark.parametrize("name", ["short", "empty", "long"])
def test_sd3_positive_and_negative_have_one_length(comfyui, name):
    positive, negative = comfyui[1][f"sd3_shapes.{name}"]
    assert positive == negative == [1, 77 + T5_TOKENS, 4096]


def test_the_users_clip_keeps_its_own_padding(comfyui):
    assert comfyui[1]["sd3_option_left_behind"] == {}


def test_an_empty_negative_prompt_is_what_the_task_was_published_with(comfyui):
    """Nothing for text-to-image, for an edit our wording of the published default."""
    report = comfyui[1]
    (prompt, nothing), (edit_prompt, default) = report["sd3_tokens.text-to-image"], report["sd3_tokens.edit"]
    assert prompt == nothing == edit_prompt
    assert default["l"] == report["sd3_tokens.edit_negative"]["l"] != nothing["l"]
