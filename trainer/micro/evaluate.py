"""Scores of a micro model on held-out prompts and edits, judged by the verifier."""

from collections import defaultdict

import numpy as np
import torch
from PIL import Image

from ...core.micro import GUIDANCE_SCALE, IMAGE_SIZE, NUM_INFERENCE_STEPS
from ..kontext_pipeline import StableDiffusion3KontextPipeline
from .tasks import EDIT_KINDS, T2I_KINDS, EditTask, T2ITask, sample_edit, sample_t2i
from .verifier import Verdict, verify_edit, verify_t2i
from .world import render

_EVAL_STREAM = 5  # keeps evaluation's random numbers apart from training's


def eval_t2i_tasks(count: int, seed: int) -> list[T2ITask]:
    """Return held-out prompts, the six kinds in turn."""
    rng = np.random.default_rng([seed, _EVAL_STREAM, 0])
    return [sample_t2i(rng, T2I_KINDS[i % len(T2I_KINDS)], held_out=True)[0] for i in range(count)]


def eval_edit_tasks(count: int, seed: int) -> list[EditTask]:
    """Return held-out edits, the six kinds in turn."""
    rng = np.random.default_rng([seed, _EVAL_STREAM, 1])
    return [sample_edit(rng, EDIT_KINDS[i % len(EDIT_KINDS)], held_out=True) for i in range(count)]


def draw(
    pipeline: StableDiffusion3KontextPipeline,
    tasks: list[T2ITask] | list[EditTask],
    seed: int,
    num_inference_steps: int = NUM_INFERENCE_STEPS,
    guidance_scale: float = GUIDANCE_SCALE,
    batch_size: int = 64,
) -> list[Image.Image]:
    """Return one 64x64 picture for each task; each has a noise seed of its own (`seed` + its place in the list)."""
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for start in range(0, len(tasks), batch_size):
        chunk = tasks[start : start + batch_size]
        images += pipeline(
            [task.prompt for task in chunk],
            image=[render(task.source) for task in chunk] if isinstance(chunk[0], EditTask) else None,
            height=IMAGE_SIZE,
            width=IMAGE_SIZE,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(chunk))],
        ).images
    return images


def judge(images: list[Image.Image], tasks: list[T2ITask] | list[EditTask]) -> list[Verdict]:
    """Return the verdict on each picture."""
    return [
        verify_edit(image, task) if isinstance(task, EditTask) else verify_t2i(image, task)
        for image, task in zip(images, tasks, strict=True)
    ]


def summarize(tasks: list[T2ITask] | list[EditTask], verdicts: list[Verdict]) -> dict:
    """Return `strict`, `soft`, `n` and the same for each kind."""
    kinds = defaultdict(list)
    for task, verdict in zip(tasks, verdicts, strict=True):
        kinds[task.kind].append(verdict)
    return {**_means(verdicts), "kinds": {kind: _means(list_) for kind, list_ in kinds.items()}}


def _means(verdicts: list[Verdict]) -> dict:
    n = len(verdicts)
    strict, soft = sum(v.strict for v in verdicts) / n, sum(v.soft for v in verdicts) / n
    return {"strict": round(strict, 6), "soft": round(soft, 6), "n": n}


def evaluate(pipeline: StableDiffusion3KontextPipeline, count: int, seed: int, **sampling) -> tuple[dict, dict]:
    """Draw and judge `count` held-out prompts and as many edits.

    Returns:
        The results (`{"t2i": {...}, "edit": {...}, "n", "seed"}`) and the pictures with their tasks and verdicts,
        `{"t2i": (tasks, images, verdicts), "edit": ...}`.
    """
    results: dict = {"n": count, "seed": seed}
    drawn = {}
    for name, tasks in (("t2i", eval_t2i_tasks(count, seed)), ("edit", eval_edit_tasks(count, seed))):
        images = draw(pipeline, tasks, seed, **sampling)
        verdicts = judge(images, tasks)
        results[name] = summarize(tasks, verdicts)
        drawn[name] = (tasks, images, verdicts)
    return results, drawn
