"""Both micro workflows through `unipic2 run` on a real ComfyUI server, judged by the verifier.

ComfyUI and the trainer draw the same noise from the same seed, so beside the accuracies the pictures themselves
are compared with the trainer's own sampling of the same weights.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from unipic2.cli import main
from unipic2.cli.comfyui import Server, resolve_install
from unipic2.core.micro import EDIT_GUIDANCE_SCALE, weights_dir
from unipic2.trainer import StableDiffusion3KontextPipeline
from unipic2.trainer.micro.evaluate import draw, eval_edit_tasks, eval_t2i_tasks, judge
from unipic2.trainer.micro.world import render

pytestmark = pytest.mark.comfyui

COUNT = 24  # four of each kind
SEED = 4321


@pytest.fixture(scope="module")
def server():
    with Server(resolve_install(), cpu=True) as running:
        yield running


@pytest.fixture(scope="module")
def pipeline():
    return StableDiffusion3KontextPipeline.from_pretrained(weights_dir(), torch_dtype=torch.float32)


def run_workflow(server, name, task, seed, folder, source=None):
    """Draw one task with `unipic2 run` and return the saved picture."""
    out = folder / f"{name}_{seed}.png"
    arguments = ["run", name, "--server", server.url, "--prompt", task.prompt, "--seed", str(seed), "-o", str(out)]
    if source is not None:
        path = folder / f"source_{seed}.png"
        source.save(path)
        arguments += ["--image", str(path)]
    assert main(arguments) == 0
    with Image.open(out) as image:
        return image.convert("RGB")


def compare(comfyui, trainer, tasks, at_least):
    """Assert that the two sets of pictures score alike, well, and look alike."""
    ours = np.mean([verdict.strict for verdict in judge(comfyui, tasks)])
    theirs = np.mean([verdict.strict for verdict in judge(trainer, tasks)])
    distances = [np.abs(np.asarray(a, int) - np.asarray(b, int)).mean() for a, b in zip(comfyui, trainer, strict=True)]
    print(f"strict: ComfyUI {ours:.3f}, trainer {theirs:.3f}; mean pixel distance {np.mean(distances):.3f} of 255")
    assert abs(ours - theirs) <= 0.1
    assert ours >= at_least
    assert np.mean(distances) < 2.0


def test_text_to_image(server, pipeline, tmp_path):
    tasks = eval_t2i_tasks(COUNT, SEED)
    comfyui = [run_workflow(server, "micro_text_to_image", task, SEED + i, tmp_path) for i, task in enumerate(tasks)]
    compare(comfyui, draw(pipeline, tasks, SEED), tasks, at_least=0.5)


def test_edit(server, pipeline, tmp_path):
    tasks = eval_edit_tasks(COUNT, SEED)
    comfyui = [
        run_workflow(server, "micro_edit", task, SEED + i, tmp_path, render(task.source))
        for i, task in enumerate(tasks)
    ]
    trainer = draw(pipeline, tasks, SEED, guidance_scale=EDIT_GUIDANCE_SCALE)
    compare(comfyui, trainer, tasks, at_least=0.6)
