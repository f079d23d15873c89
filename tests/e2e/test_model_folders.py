"""Models in a folder that `extra_model_paths.yaml` names, on a real ComfyUI."""

import json
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from PIL import Image
from unipic2.cli import main
from unipic2.cli.comfyui import Server, resolve_install
from unipic2.trainer import StableDiffusion3KontextPipeline
from unipic2.trainer.micro.evaluate import eval_edit_tasks
from unipic2.trainer.micro.world import render

pytestmark = pytest.mark.comfyui


def test_they_are_offered_and_draw(tmp_path):
    models, source = tmp_path / "models", tmp_path / "source.png"
    pipeline = StableDiffusion3KontextPipeline.from_pretrained("micro-pretrained", torch_dtype=torch.float16)
    pipeline.save_pretrained(models / "unipic2" / "mine")
    pipeline.save_pretrained(models / "diffusion_models" / "theirs")
    task = eval_edit_tasks(1, 0)[0]
    render(task.source).save(source)
    drawn = []
    with Server(resolve_install(), cpu=True, models=[models]) as server:
        offered = {}
        for node in ("UniPic2Loader", "UniPic2MicroLoader"):
            info = json.load(urlopen(f"{server.url}/object_info/{node}"))[node]
            offered[node] = info["input"]["required"]["model"][1]["options"]
        assert "mine" in offered["UniPic2Loader"] and "theirs" in offered["UniPic2Loader"]
        assert "mine" in offered["UniPic2MicroLoader"]
        for name in ("mine", "micro-pretrained (bundled)", "micro (bundled)"):
            out = tmp_path / f"out{len(drawn)}.png"
            arguments = ["run", "micro_edit", "--server", server.url, "--image", str(source), "--prompt", task.prompt]
            arguments += ["--seed", "1", "-o", str(out), "--set", f"UniPic2MicroLoader.model={name}"]
            assert main(arguments) == 0
            with Image.open(out) as image:
                drawn.append(np.asarray(image.convert("RGB"), int))
    mine, same, other = drawn
    assert mine.std() > 5 and np.array_equal(mine, same) and not np.array_equal(mine, other)
