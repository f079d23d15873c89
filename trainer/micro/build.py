"""The untrained micro pipeline: tokenizer, text encoder and transformer around a codec."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from ...core.micro import MAX_TOKENS, SHIFT, TEXT_ENCODER_CONFIG, TRANSFORMER_CONFIG
from ..kontext_pipeline import StableDiffusion3KontextPipeline
from ..kontext_transformer import SD3Transformer2DKontextModel
from .tasks import EDIT_KINDS, T2I_KINDS, sample_edit, sample_t2i

_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"
_VOCABULARY = 1024
_TOKEN_STD, _POSITION_STD = 0.3, 0.1


def build_tokenizer(folder: Path, seed: int = 0) -> CLIPTokenizer:
    """Learn byte-pair merges on micro prompts and write a CLIP tokenizer (`vocab.json`, `merges.txt`) to `folder`.

    Each word of the micro world becomes one token; any other text falls back to smaller pieces, as in CLIP.
    """
    rng = np.random.default_rng([seed, 4])
    prompts = [sample_t2i(rng, kind)[0].prompt for kind in T2I_KINDS for _ in range(300)]
    prompts += [sample_edit(rng, kind).prompt for kind in EDIT_KINDS for _ in range(300)]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=_WORD_END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=_VOCABULARY, end_of_word_suffix=_WORD_END, show_progress=False)
    tokenizer.train_from_iterator(prompts, trainer)
    merges = [tuple(m) for m in json.loads(tokenizer.to_str())["model"]["merges"]]
    # CLIP's own order: all bytes, all bytes that end a word, the merges, the two special tokens.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(a + _WORD_END for a in alphabet), *("".join(m) for m in merges), _START, _END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False, indent=0), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
    settings = {**special, "model_max_length": MAX_TOKENS, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def build_pipeline(vae: AutoencoderTiny, tokenizer: CLIPTokenizer, seed: int) -> StableDiffusion3KontextPipeline:
    """Return a pipeline with a random transformer and text encoder, float32."""
    torch.manual_seed(seed)
    text_config = CLIPTextConfig(
        **TEXT_ENCODER_CONFIG,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    text_encoder = CLIPTextModelWithProjection(text_config)
    # CLIP's own 0.02 is far below what the first blocks add, and the words would be slow to come through.
    nn.init.normal_(text_encoder.text_model.embeddings.token_embedding.weight, std=_TOKEN_STD)
    nn.init.normal_(text_encoder.text_model.embeddings.position_embedding.weight, std=_POSITION_STD)
    transformer = SD3Transformer2DKontextModel(**TRANSFORMER_CONFIG)
    # adaLN-zero (DiT, arXiv 2212.09748): each block starts as the identity and the output at zero.
    for name, module in transformer.named_modules():
        if name.endswith((".norm1.linear", ".norm1_context.linear", "norm_out.linear")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    return StableDiffusion3KontextPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
