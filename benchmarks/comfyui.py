"""Strict accuracy of the micro model as ComfyUI draws it, beside the trainer's own drawing of the same noise.

    python benchmarks/comfyui.py [--n 1024] [--seed 1234] [--guidance-scale 1]

`unipic2 run` queues the bundled workflows `micro_text_to_image` and `micro_edit` on a ComfyUI server, once for each
held-out prompt and edit. By default they are those that `unipic2 train pdtr` measures, without guidance as there, so
that the figures are those of the model's card. COMFYUI_PATH names an install; without it one is made.
"""

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from unipic2.cli import main as unipic2
from unipic2.cli.comfyui import Server, resolve_install
from unipic2.core.micro import weights_dir
from unipic2.trainer import StableDiffusion3KontextPipeline
from unipic2.trainer.interference import paired_difference, share_interval
from unipic2.trainer.micro.evaluate import draw, eval_edit_tasks, eval_t2i_tasks, judge
from unipic2.trainer.micro.tasks import EditTask
from unipic2.trainer.micro.world import render

WORKFLOWS = {"t2i": ("micro_text_to_image", eval_t2i_tasks), "edit": ("micro_edit", eval_edit_tasks)}


def run_workflow(server: Server, name: str, task, seed: int, folder: Path, source=None, *options: str) -> Image.Image:
    """Draw one task by `unipic2 run` and return the picture.

    Args:
        server: what draws it.
        name: the workflow.
        task: whose prompt is drawn.
        seed: of the noise.
        folder: where the pictures are for so long.
        source: the picture that an edit starts from.
        options: more of `unipic2 run`.

    Raises:
        SystemExit: it was not drawn; with what the command said.
    """
    out, given = folder / "out.png", folder / "source.png"
    argv = ["run", name, "--server", server.url, "--prompt", task.prompt, "--seed", str(seed), "-o", str(out)]
    argv += options
    if source is not None:
        source.save(given)
        argv += ["--image", str(given)]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = unipic2(argv)
    if status:
        raise SystemExit(said.getvalue())
    with Image.open(out) as image:
        picture = image.convert("RGB")
    out.unlink()  # so that a run that saved none is not given this one
    return picture


def distance(images: Sequence[Image.Image], others: Sequence[Image.Image]) -> float:
    """Return how far pictures are from others, pixel by pixel, of 255."""
    pairs = zip(images, others, strict=True)
    return np.mean([np.abs(np.asarray(a, int) - np.asarray(b, int)).mean() for a, b in pairs])


def measure(
    server: Server, pipeline: StableDiffusion3KontextPipeline, name: str, n: int, seed: int, guidance_scale: float
) -> dict:
    """Return `comfyui` and `trainer`, 1 for each right picture and 0 else (n,), `apart`, 0 to 255, and `seconds`."""
    workflow, sample = WORKFLOWS[name]
    tasks = sample(n, seed)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        ours = [
            run_workflow(
                server, workflow, task, seed + place, Path(folder),
                render(task.source) if isinstance(task, EditTask) else None,
                "--set", f"KSampler.cfg={guidance_scale}",
            )
            for place, task in enumerate(tasks)
        ]  # fmt: skip
        seconds = (time.perf_counter() - started) / n
    theirs = draw(pipeline, tasks, seed, guidance_scale=guidance_scale)
    return {
        "comfyui": np.array([float(verdict.strict) for verdict in judge(ours, tasks)]),
        "trainer": np.array([float(verdict.strict) for verdict in judge(theirs, tasks)]),
        "apart": distance(ours, theirs),
        "seconds": seconds,
    }


def told(found: dict) -> str:
    """Return the figures of `measure` as text."""
    ours, theirs = found["comfyui"], found["trainer"]
    (low, high), (change, (least, most)) = share_interval(ours), paired_difference(theirs, ours)
    return (
        f"ComfyUI {ours.mean():.3f} ({low:.3f} to {high:.3f}), trainer {theirs.mean():.3f}, difference {change:+.4f} "
        f"({least:+.4f} to {most:+.4f}), {int((ours != theirs).sum())} of {len(ours)} judged otherwise; mean pixel "
        f"distance {found['apart']:.3f} of 255; {found['seconds']:.2f} s a picture"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1024, help="prompts, and edits (default 1024)")
    parser.add_argument("--seed", type=int, default=1234, help="of samples and noise (default 1234)")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="default 1: none")
    arguments = parser.parse_args()
    pipeline = StableDiffusion3KontextPipeline.from_pretrained(weights_dir(), torch_dtype=torch.float32)
    with Server(resolve_install(), cpu=True) as server:
        for name in WORKFLOWS:
            found = measure(server, pipeline, name, arguments.n, arguments.seed, arguments.guidance_scale)
            print(f"{name}: {told(found)}", flush=True)


if __name__ == "__main__":
    main()
