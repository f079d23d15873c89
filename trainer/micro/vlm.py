"""Micro Qwen2.5-VL: the published classes at a small size, trained on questions about the micro world, then frozen."""

import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Trainer,
    TrainingArguments,
)

from ...core.micro import QWEN_TEXT_CONFIG, QWEN_VISION_CONFIG
from ...core.prompts import question_segments
from ...core.vision import understanding_pixels
from ..muon import MuonWithAdamW
from ..query_states import picture_inputs, token_ids, widened
from .questions import KINDS, Question, ask
from .world import render

_END = "<|endoftext|>"
_SPECIAL = (
    "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
_WORDS = 600  # questions of each kind that the vocabulary is learned from
_VOCABULARY = 512
_QUESTION_STREAM, _EVAL_STREAM = 6, 7  # keep the random numbers of training and evaluation apart


def build_vlm_tokenizer(folder: Path, seed: int = 0) -> Qwen2Tokenizer:
    """Learn byte-pair merges on questions, answers and prompts, and write a Qwen2.5 tokenizer to `folder`.

    Each word of the micro world becomes one token; any other text falls back to bytes.
    """
    rng = np.random.default_rng([seed, 4])
    asked = [ask(rng, kind) for kind in KINDS for _ in range(_WORDS)]
    texts = [f"user\n{q.text}\nassistant\n{q.answer}\nGenerate an image: {q.text}" for q in asked]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = Qwen2Tokenizer()._tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=_VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    words = dict.fromkeys([*alphabet, *("".join(pair) for pair in merges), _END, *_SPECIAL])
    tokenizer = Qwen2Tokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=merges, extra_special_tokens=list(_SPECIAL)
    )
    tokenizer.save_pretrained(folder)
    return Qwen2Tokenizer.from_pretrained(folder)


def build_vlm(tokenizer: Qwen2Tokenizer, seed: int, text: dict | None = None, vision: dict | None = None):
    """Return a random Qwen2.5-VL of the micro size for a tokenizer, float32; `text` and `vision` change its sizes."""
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start")}
    text = {**QWEN_TEXT_CONFIG, **(text or {})}
    config = Qwen2_5_VLConfig(
        text_config={
            **text,
            "vocab_size": len(tokenizer),
            "bos_token_id": None,
            "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**QWEN_VISION_CONFIG, "out_hidden_size": text["hidden_size"], **(vision or {})},
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


class QuestionDataset(torch.utils.data.Dataset):
    """`length` questions, the kinds in turn; each index always gives the same one."""

    def __init__(self, length: int, seed: int):
        self.length, self.seed = length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Question:
        rng = np.random.default_rng([self.seed, _QUESTION_STREAM, index])
        return ask(rng, KINDS[index % len(KINDS)])


class _Collator:
    """Turns questions into what transformers' Qwen2.5-VL is trained on, only answers count in the loss, or answers to.

    Rows are padded on the right; without their answers on the left, as transformers generates.
    """

    def __init__(self, vlm: Qwen2_5_VLForConditionalGeneration, tokenizer: Qwen2Tokenizer):
        self.vlm, self.tokenizer = vlm, tokenizer

    def __call__(self, questions: list[Question], answered: bool = True) -> dict[str, torch.Tensor]:
        config, end = self.vlm.config, "<|im_end|>"
        rows, labels = [], []
        pictures = [np.asarray(render(q.scene)) for q in questions if q.scene is not None]
        inputs = {}
        if pictures:
            pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
            inputs = dict(picture_inputs(config.vision_config, understanding_pixels(pixels)))
        count = int(inputs["image_grid_thw"][0].prod()) // config.vision_config.spatial_merge_size**2 if inputs else 0
        for q in questions:
            asked = token_ids(self.tokenizer, question_segments(q.text, q.scene is not None))
            asked = asked if q.scene is None else widened(asked, config.image_token_id, count)
            answer = token_ids(self.tokenizer, [q.answer, end]) if answered else []
            rows.append(asked + answer)
            labels.append([-100] * len(asked) + answer)
        width = max(map(len, rows))

        def padded(row: list[int], fill: int) -> list[int]:
            padding = [fill] * (width - len(row))
            return row + padding if answered else padding + row

        ids = torch.tensor([padded(row, self.tokenizer.pad_token_id) for row in rows])
        batch = {
            **inputs,
            "input_ids": ids,
            "attention_mask": torch.tensor([padded([1] * len(row), 0) for row in rows]),
            "mm_token_type_ids": (ids == config.image_token_id).int(),
        }
        return {**batch, "labels": torch.tensor([padded(row, -100) for row in labels])} if answered else batch


class _VLMTrainer(Trainer):
    """transformers' Trainer with Muon for the blocks' matrices, as the micro model has it."""

    def create_optimizer(self, model=None):
        """Return Muon with AdamW: the same rate for both."""
        args, trained = self.args, list(self.model.named_parameters())
        blocks = [p for name, p in trained if p.ndim == 2 and (".layers." in name or ".blocks." in name)]
        chosen = {id(p) for p in blocks}
        rest = [{"params": [p for _, p in trained if id(p) not in chosen], "weight_decay": 0.0}]
        self.optimizer = MuonWithAdamW(
            blocks, rest, muon_lr=args.learning_rate, weight_decay=args.weight_decay, lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2), fused=True,
        )  # fmt: skip
        return self.optimizer


def train_vlm(
    vlm: Qwen2_5_VLForConditionalGeneration, tokenizer: Qwen2Tokenizer, output_dir: Path, steps: int, seed: int,
    batch_size: int = 96, learning_rate: float = 2e-3,
) -> Qwen2_5_VLForConditionalGeneration:  # fmt: skip
    """Train on questions that never come twice, and return the model, frozen. Logs go to `output_dir`."""
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        adam_beta2=0.99,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(0.05 * steps),
        max_grad_norm=1.0,
        weight_decay=0.01,
        bf16=True,
        logging_steps=50,
        save_strategy="no",
        report_to=["tensorboard"],
        remove_unused_columns=False,
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
    )
    data = QuestionDataset(steps * batch_size, seed)
    collator = _Collator(vlm, tokenizer)
    trainer = _VLMTrainer(model=vlm.train(), args=arguments, train_dataset=data, data_collator=collator)
    trainer.train()
    return vlm.eval().requires_grad_(False)


@torch.no_grad()
def question_accuracy(
    vlm: Qwen2_5_VLForConditionalGeneration, tokenizer: Qwen2Tokenizer, count: int, seed: int
) -> tuple[dict, list[tuple[Question, str]]]:
    """Answer `count` new questions, greedily, the kinds in turn.

    Returns:
        `{"accuracy", "n", "kinds": {kind: accuracy}}`, where an answer counts if it is right word for word, and the
        questions with the answers given.
    """
    rngs = (np.random.default_rng([seed, _EVAL_STREAM, i]) for i in range(count))
    questions = [ask(rng, KINDS[i % len(KINDS)], held_out=True) for i, rng in enumerate(rngs)]
    collator = _Collator(vlm, tokenizer)
    length = max(len(token_ids(tokenizer, [q.answer])) for q in questions) + 1
    # One kind at a time: of one length or nearly, so that little is padded.
    order = sorted(range(count), key=lambda i: i % len(KINDS))
    found: dict[int, str] = {}
    for start in tqdm(range(0, count, 64), desc="questions", unit_scale=64, unit="question"):
        part = order[start : start + 64]
        for i, text in zip(part, _answer(vlm, tokenizer, collator, [questions[i] for i in part], length), strict=True):
            found[i] = text
    answers = [found[i] for i in range(count)]
    kinds = defaultdict(list)
    for question, text in zip(questions, answers, strict=True):
        kinds[question.kind].append(text == question.answer)
    right = [r for part in kinds.values() for r in part]
    scores = {
        "accuracy": round(sum(right) / count, 4),
        "n": count,
        "kinds": {kind: round(sum(part) / len(part), 4) for kind, part in kinds.items()},
    }
    return scores, list(zip(questions, answers, strict=True))


def _answer(vlm, tokenizer, collator, questions: list[Question], length: int) -> list[str]:
    """Return greedy answers."""
    inputs = {name: value.to(vlm.device) for name, value in collator(questions, answered=False).items()}
    vlm.model.rope_deltas = None
    out = vlm.generate(**inputs, max_new_tokens=length, do_sample=False)
    vlm.model.rope_deltas = None
    texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]
