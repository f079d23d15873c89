"""Samples per second of joint text-to-image and edit training, as ratios against two plain ways to do it.

    python benchmarks/pretraining.py [--steps 30] [--batch-size 16]

All three train the bundled micro model (transformer only, AdamW, bfloat16 autocast) on the same pictures, half of the
samples edits, in one run on one machine:

- encoders in the loop: a plain loop that decodes pictures and runs VAE and text encoder at every step;
- padded: latents and texts are ready, but each batch mixes the tasks and text-to-image samples carry empty reference
  tokens. The attention mask that they need besides is left out, in this way's favour;
- ours: `FlowMatchingTrainer` on a cache, batches of one task.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

import datasets
import numpy as np
import torch
from unipic2.core.flow import interpolate, shift_sigmas
from unipic2.core.micro import weights_dir
from unipic2.trainer import FlowMatchingConfig, FlowMatchingTrainer, StableDiffusion3KontextPipeline
from unipic2.trainer.data.buckets import aspect_buckets
from unipic2.trainer.data.cache import Cache, CachedPairs, build_cache, fingerprint
from unipic2.trainer.data.pairs import PairDataset
from unipic2.trainer.data.sources import open_source
from unipic2.trainer.micro.tasks import EDIT_KINDS, T2I_KINDS, sample_edit, sample_t2i
from unipic2.trainer.micro.world import render

CPU = torch.device("cpu")


def write_data(folder: Path, count: int) -> Path:
    """Write `count` edits and as many pictures as PNG, and a jsonl that lists them."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        edit = sample_edit(rng, EDIT_KINDS[i % 6])
        task, scene = sample_t2i(rng, T2I_KINDS[i % 6])
        pictures = {"s": render(edit.source), "t": render(edit.target), "p": render(scene)}
        for name, picture in pictures.items():
            picture.save(folder / f"{name}{i}.png")
        rows.append({"prompt": edit.prompt, "src_img": f"s{i}.png", "edited_img": f"t{i}.png"})
        rows.append({"prompt": task.prompt, "src_img": None, "edited_img": f"p{i}.png"})
    path = folder / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def load() -> StableDiffusion3KontextPipeline:
    pipe = StableDiffusion3KontextPipeline.from_pretrained(weights_dir(), torch_dtype=torch.float32)
    pipe.vae.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    pipe.transformer.train()
    return pipe


def step(pipe, optimizer, latents, reference, states, pooled) -> None:
    noise = torch.randn_like(latents)
    sigmas = shift_sigmas(torch.sigmoid(torch.randn(len(latents))), 3.0)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = pipe.transformer(
            hidden_states=interpolate(latents, noise, sigmas),
            timestep=1000 * sigmas,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            ref_hidden_states=reference,
            return_dict=False,
        )[0]
    (velocity.float() - (noise - latents)).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(pipe.transformer.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def optimizer_of(pipe) -> torch.optim.AdamW:
    return torch.optim.AdamW(pipe.transformer.parameters(), lr=1e-4, fused=True)


def encoded(pipe, samples: list[dict], name: str) -> torch.Tensor:
    return pipe.encode_bytes(torch.stack([sample[name] for sample in samples]))


def encoders_in_the_loop(pairs: PairDataset, steps: int, batch_size: int) -> float:
    pipe = load()
    optimizer = optimizer_of(pipe)
    rows = {task: cycle([i for i, e in enumerate(pairs.is_edit) if e == task]) for task in (False, True)}
    start = time.perf_counter()
    for number in range(steps):
        samples = [pairs[i] for i in islice(rows[bool(number % 2)], batch_size)]
        with torch.no_grad():
            latents = encoded(pipe, samples, "pixel_values")
            reference = encoded(pipe, samples, "ref_pixel_values") if number % 2 else None
            prompts = [s["prompt"] for s in samples]
            states, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
        step(pipe, optimizer, latents, reference, states, pooled)
    return steps * batch_size / (time.perf_counter() - start)


def padded(cached, steps: int, batch_size: int) -> float:
    pipe = load()
    optimizer = optimizer_of(pipe)
    rows = cycle(range(len(cached)))  # edits and pictures in turn
    start = time.perf_counter()
    for _ in range(steps):
        samples = [cached[i] for i in islice(rows, batch_size)]
        latents = torch.stack([s["latents"] for s in samples])
        reference = torch.stack([s.get("ref_latents", torch.zeros_like(s["latents"])) for s in samples])
        states, pooled = (torch.stack(part) for part in zip(*(s["text"] for s in samples), strict=True))
        step(pipe, optimizer, latents, reference, states, pooled)
    return steps * batch_size / (time.perf_counter() - start)


def ours(cached, steps: int, batch_size: int, folder: Path) -> float:
    args = FlowMatchingConfig(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=batch_size, learning_rate=1e-4,
        bf16=True, use_cpu=True, use_ema=False, preview_steps=0, save_strategy="no", report_to="none",
        logging_steps=steps, disable_tqdm=True,
    )  # fmt: skip
    trainer = FlowMatchingTrainer(load(), args, cached)
    return trainer.train().metrics["train_samples_per_second"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of a measurement (default 30)")
    parser.add_argument("--batch-size", type=int, default=16, help="samples of a batch (default 16)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each way, in turn (default 3)")
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pairs = PairDataset([open_source(str(write_data(folder, 96)))], aspect_buckets(64))
        cache = Cache(folder / "cache", fingerprint(weights_dir(), torch.float16, torch.float32))
        build_cache(pairs, cache, load(), torch.float16, CPU)
        cached = CachedPairs(pairs, cache)
        size = (arguments.steps, arguments.batch_size)
        ways = {
            "encoders in the loop": lambda: encoders_in_the_loop(pairs, *size),
            "padded": lambda: padded(cached, *size),
            "ours": lambda: ours(cached, *size, folder / "run"),
        }
        for way in ways.values():
            way()  # warm up
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.rounds):
            for name, way in ways.items():
                rates[name].append(way())
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, batch {size[1]}")
    base = statistics.median(rates["ours"])
    for name, values in rates.items():
        rate = statistics.median(values)
        print(f"{name:22s} {rate:7.1f} samples/s   ours is {base / rate:.2f} times as fast")


if __name__ == "__main__":
    main()
