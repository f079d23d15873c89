"""Samples per second of MetaQuery's alignment stage, as ratios against the plain way.

    python benchmarks/metaquery.py [--steps 20] [--batch-size 32]
    python benchmarks/metaquery.py --shape 7b --steps 2 --batch-size 2 --rounds 1

All train queries and connector (random weights, bfloat16 autocast, transformer frozen) on the same prompts or edits,
which come again in every pass, in one run on one machine. `--shape 7b` has the widths, the queries and the picture's
256 tokens of the published model at 512x512 pixels, but two layers of each part, one in 12 to 16; two CPU cores take a
quarter of an hour for it:

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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import TrainerCallback
from unipic2.core.connector import StableDiffusion3Conditioner
from unipic2.core.micro import CONNECTOR_CONFIG, NUM_QUERIES, QWEN_TEXT_CONFIG, QWEN_VISION_CONFIG, TRANSFORMER_CONFIG
from unipic2.trainer import MetaQueryConfig, MetaQueryPipeline, MetaQueryTrainer, StableDiffusion3KontextPipeline
from unipic2.trainer.kontext_transformer import SD3Transformer2DKontextModel
from unipic2.trainer.micro.tasks import EDIT_KINDS, T2I_KINDS, sample_edit, sample_t2i
from unipic2.trainer.micro.vlm import build_vlm, build_vlm_tokenizer
from unipic2.trainer.micro.world import render


@dataclass(frozen=True)
class Shape:
    """Sizes of all parts."""

    pixels: int
    queries: int
    text: dict
    vision: dict
    connector: dict
    transformer: dict


SHAPES = {
    "micro": Shape(64, NUM_QUERIES, QWEN_TEXT_CONFIG, QWEN_VISION_CONFIG, CONNECTOR_CONFIG, TRANSFORMER_CONFIG),
    "7b": Shape(
        pixels=512,
        queries=256,
        text={
            **QWEN_TEXT_CONFIG, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 2,
            "num_attention_heads": 28, "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision={"hidden_size": 1280, "intermediate_size": 3420, "depth": 2, "num_heads": 16,
                "fullatt_block_indexes": [1]},
        connector={"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 2, "num_attention_heads": 24},
        transformer={
            **TRANSFORMER_CONFIG, "sample_size": 64, "num_layers": 2, "num_attention_heads": 24,
            "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
            "pos_embed_max_size": 64, "dual_attention_layers": (0,),
        },
    ),
}  # fmt: skip


class Samples(torch.utils.data.Dataset):
    """Prompts, or edits, the same in each pass."""

    def __init__(self, count: int, is_edit: bool, pixels: int):
        rng = np.random.default_rng(0)
        self.is_edit = [is_edit] * count
        self.samples = []
        for i in range(count):
            sample = {"latents": torch.randn(16, pixels // 8, pixels // 8)}
            if is_edit:
                task = sample_edit(rng, EDIT_KINDS[i % 6])
                sample["ref_latents"] = torch.randn_like(sample["latents"])
                picture = np.array(render(task.source).resize((pixels, pixels)))
                sample["source_pixels"] = torch.from_numpy(picture).permute(2, 0, 1).contiguous()
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


def pipeline(folder: Path, shape: Shape) -> MetaQueryPipeline:
    base = StableDiffusion3KontextPipeline.from_pretrained("micro-pretrained", torch_dtype=torch.float32)
    tokenizer = build_vlm_tokenizer(folder / "tokenizer")
    torch.manual_seed(0)
    transformer = SD3Transformer2DKontextModel(**shape.transformer)
    conditioner = StableDiffusion3Conditioner(
        shape.connector, shape.queries, shape.text["hidden_size"], shape.transformer["pooled_projection_dim"],
        shape.transformer["joint_attention_dim"],
    ).initialize(0)  # fmt: skip
    vlm = build_vlm(tokenizer, 0, shape.text, shape.vision).requires_grad_(False)
    return MetaQueryPipeline(transformer, base.scheduler, base.vae, vlm, tokenizer, conditioner)


class Plain(MetaQueryTrainer):
    """Hands the whole sequence to the loss."""

    def text_of(self, inputs, device):
        seen = inputs.get("seen")
        return self.pipeline.prefix(inputs["text"], None if seen is None else seen.float() / 255)


WAYS = {"plain": (Plain, 0.0), "prefixes": (MetaQueryTrainer, 0.0), "kept prefixes": (MetaQueryTrainer, 1.0)}


def rate(folder: Path, shape: Shape, data: Samples, way: str, steps: int, batch_size: int) -> float:
    """Return samples per second."""
    trainer, gib = WAYS[way]
    passes = len(data) // batch_size  # all prefixes are kept after these steps
    args = MetaQueryConfig(
        output_dir=str(folder / "run"), max_steps=passes + steps, per_device_train_batch_size=batch_size,
        learning_rate=1e-4, bf16=True, use_cpu=True, use_ema=False, preview_steps=0, save_strategy="no",
        report_to="none", logging_steps=1000, disable_tqdm=True, attention_backend="math", prefix_cache_gib=gib,
        caption_dropout=0.0, edit_caption_dropout=0.0, vision_dropout=0.0,
    )  # fmt: skip
    clock = Clock()
    trainer(pipeline(folder, shape), args, data, callbacks=[clock]).train()
    return steps * batch_size / (clock.ends[-1] - clock.ends[passes - 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of a measurement (default 20)")
    parser.add_argument("--batch-size", type=int, default=32, help="samples of a batch (default 32)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each way, in turn (default 3)")
    parser.add_argument("--shape", choices=SHAPES, default="micro", help="sizes of the model (default micro)")
    arguments = parser.parse_args()
    shape, size = SHAPES[arguments.shape], arguments.batch_size
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, batch {size}")
    for task in ("prompts", "edits"):
        data = Samples(2 * size, task == "edits", shape.pixels)
        rates: dict[str, list[float]] = {way: [] for way in WAYS}
        with tempfile.TemporaryDirectory() as name:
            for _ in range(arguments.rounds):
                for way, values in rates.items():
                    values.append(rate(Path(name), shape, data, way, arguments.steps, size))
        medians = {way: statistics.median(values) for way, values in rates.items()}
        for way, value in medians.items():
            ratios = [f"{value / medians[other]:.2f} times {other}" for other in ("plain", "prefixes")]
            print(f"{task:8s} {way:14s} {value:8.2f} samples/s, {', '.join(ratios)}", flush=True)


if __name__ == "__main__":
    main()
