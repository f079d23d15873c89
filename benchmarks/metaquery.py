"""Samples per second of MetaQuery's alignment stage, as ratios against the plain way.

    python benchmarks/metaquery.py [--steps 20] [--batch-size 32]

All train queries and connector of the micro size (random weights, bfloat16 autocast, transformer frozen) on the same
prompts and edits, which come again in every pass, in one run on one machine:

- plain: Qwen2.5-VL runs over prompt, picture and queries at once, with gradients, as published trainers do it;
- prefixes: it runs over prompt and picture without gradients (in its own type, here float32), then over the queries
  alone;
- kept prefixes (`prefix_cache_gib`): it runs over the queries alone. Prefixes are all kept before the clock starts, as
  they are from the second pass on.
"""

import argparse
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import TrainerCallback
from unipic2.core.connector import StableDiffusion3Conditioner
from unipic2.core.micro import CONNECTOR_CONFIG, NUM_QUERIES, QWEN_TEXT_CONFIG, TRANSFORMER_CONFIG
from unipic2.trainer import MetaQueryConfig, MetaQueryPipeline, MetaQueryTrainer, StableDiffusion3KontextPipeline
from unipic2.trainer.micro.tasks import EDIT_KINDS, T2I_KINDS, sample_edit, sample_t2i
from unipic2.trainer.micro.vlm import build_vlm, build_vlm_tokenizer
from unipic2.trainer.micro.world import render


class Samples(torch.utils.data.Dataset):
    """As many prompts as edits, the same in each pass."""

    def __init__(self, count: int):
        rng = np.random.default_rng(0)
        self.is_edit = [False] * count + [True] * count
        self.samples = []
        for i in range(2 * count):
            sample = {"latents": torch.randn(16, 8, 8)}
            if self.is_edit[i]:
                task = sample_edit(rng, EDIT_KINDS[i % 6])
                sample["ref_latents"] = torch.randn(16, 8, 8)
                sample["source_pixels"] = torch.from_numpy(np.array(render(task.source))).permute(2, 0, 1).contiguous()
            else:
                task = sample_t2i(rng, T2I_KINDS[i % 6])[0]
            self.samples.append({"prompt": task.prompt, **sample})

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        return self.samples[index]


class Clock(TrainerCallback):
    """Notes when each step ends."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())


def pipeline(folder: Path) -> MetaQueryPipeline:
    base = StableDiffusion3KontextPipeline.from_pretrained("micro-pretrained", torch_dtype=torch.float32)
    tokenizer = build_vlm_tokenizer(folder / "tokenizer")
    conditioner = StableDiffusion3Conditioner(
        CONNECTOR_CONFIG, NUM_QUERIES, QWEN_TEXT_CONFIG["hidden_size"], TRANSFORMER_CONFIG["pooled_projection_dim"],
        TRANSFORMER_CONFIG["joint_attention_dim"],
    ).initialize(0)  # fmt: skip
    vlm = build_vlm(tokenizer, 0).requires_grad_(False)
    return MetaQueryPipeline(base.transformer, base.scheduler, base.vae, vlm, tokenizer, conditioner)


class Plain(MetaQueryTrainer):
    """Hands the whole sequence to the loss."""

    def text_of(self, inputs, device):
        seen = inputs.get("seen")
        return self.pipeline.prefix(inputs["text"], None if seen is None else seen.float() / 255)


WAYS = {"plain": (Plain, 0.0), "prefixes": (MetaQueryTrainer, 0.0), "kept prefixes": (MetaQueryTrainer, 1.0)}


def rate(folder: Path, data: Samples, way: str, steps: int, batch_size: int) -> float:
    trainer, gib = WAYS[way]
    passes = 2 * (len(data) // batch_size)  # both tasks' prefixes are kept after these steps
    args = MetaQueryConfig(
        output_dir=str(folder / "run"), max_steps=passes + steps, per_device_train_batch_size=batch_size,
        learning_rate=1e-4, bf16=True, use_cpu=True, use_ema=False, preview_steps=0, save_strategy="no",
        report_to="none", logging_steps=1000, disable_tqdm=True, attention_backend="math", prefix_cache_gib=gib,
        caption_dropout=0.0, edit_caption_dropout=0.0, vision_dropout=0.0,
    )  # fmt: skip
    clock = Clock()
    trainer(pipeline(folder), args, data, callbacks=[clock]).train()
    return steps * batch_size / (clock.ends[-1] - clock.ends[passes - 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of a measurement (default 20)")
    parser.add_argument("--batch-size", type=int, default=32, help="samples of a batch (default 32)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each way, in turn (default 3)")
    arguments = parser.parse_args()
    data = Samples(2 * arguments.batch_size)
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        for _ in range(arguments.rounds):
            for way, values in rates.items():
                values.append(rate(Path(name), data, way, arguments.steps, arguments.batch_size))
    medians = {way: statistics.median(values) for way, values in rates.items()}
    size = arguments.batch_size
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, batch {size}")
    for way, value in medians.items():
        print(f"{way:14s} {value:7.1f} samples/s, {value / medians['plain']:.2f} times as fast as plain")


if __name__ == "__main__":
    main()
