"""The pack's nodes on GGUF files: a CLIP for MetaQuery, and the transformer, by the loaders of ComfyUI-GGUF.

    COMFYUI_GGUF_PATH=ComfyUI/custom_nodes/ComfyUI-GGUF pytest -m slow tests/e2e/test_gguf.py

The pack is another project's, so it is named, and its own requirement (`gguf`) is in ComfyUI's Python.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
from unipic2.cli.comfyui import resolve_install

HERE = Path(__file__).resolve().parent
GGUF_PATH = os.environ.get("COMFYUI_GGUF_PATH")


@pytest.mark.slow
@pytest.mark.comfyui
@pytest.mark.skipif(GGUF_PATH is None, reason="COMFYUI_GGUF_PATH names no ComfyUI-GGUF")
def test_quantized_files_give_what_their_weights_give(tmp_path):
    """A CLIP's states, and what is drawn by a transformer; both also with a LoRA, and with a picture."""
    install = resolve_install()
    pack = tmp_path / "ComfyUI-UniPic2"
    pack.symlink_to(HERE.parents[1], target_is_directory=True)
    (tmp_path / "work").mkdir()
    command = [install.python, HERE / "gguf_process.py", install.root, pack, Path(GGUF_PATH), tmp_path / "work"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    reports = json.loads(done.stdout.splitlines()[-1])
    assert reports["model"].pop("reference") > 0.1, "the picture is seen"
    for kind, names in (("clip", ("text", "picture")), ("model", ("text", "edit"))):
        report = reports[kind]
        assert report.pop("patcher") == "GGUFModelPatcher"
        assert set(report) == {f"{name}{lora}" for name in names for lora in ("", " with a LoRA")}
        assert all(found["difference"] < 2e-3 for found in report.values()), report
        assert all(found["change"] > 0.01 for name, found in report.items() if "LoRA" in name), report
