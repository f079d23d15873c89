"""An edit by a server that keeps nothing between nodes. (`--lowvram` and `--novram` exclude `--cpu`.)"""

import numpy as np
import pytest
from PIL import Image
from unipic2.cli import main
from unipic2.cli.comfyui import Server, resolve_install
from unipic2.trainer.micro.evaluate import eval_edit_tasks
from unipic2.trainer.micro.world import render

pytestmark = pytest.mark.comfyui


def test_an_edit_is_the_same(tmp_path):
    task = eval_edit_tasks(1, 0)[0]
    source = tmp_path / "source.png"
    render(task.source).save(source)
    drawn = []
    for options in ((), ("--cache-none",)):
        out = tmp_path / f"out{len(drawn)}.png"
        with Server(resolve_install(), cpu=True, options=options) as server:
            arguments = ["run", "micro_edit", "--server", server.url, "--image", str(source), "--prompt", task.prompt]
            assert main([*arguments, "--seed", "1", "-o", str(out)]) == 0
        with Image.open(out) as image:
            drawn.append(np.asarray(image.convert("RGB"), int))
    assert drawn[0].std() > 5
    assert np.array_equal(*drawn)
