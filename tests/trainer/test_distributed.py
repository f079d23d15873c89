"""Two processes on the CPU (gloo) train the same model as one process that accumulates twice as long."""

import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

SETTINGS = """
resolution: 64
max_steps: 3
per_device_train_batch_size: 2
learning_rate: 1.0e-3
lr_scheduler_type: constant
edit_ratio: 0.5
use_cpu: true
save_strategy: steps
save_steps: 3
logging_steps: 1
preview_steps: 0
report_to: none
export_dtype: float32
disable_tqdm: true
seed: 3
"""


def train(folder, model, data, *flags, launch=()):
    folder.mkdir()
    (folder / "config.yaml").write_text(SETTINGS)
    command = [sys.executable, "-m", "unipic2.cli", "train", "pretrain", "--config", str(folder / "config.yaml")]
    command += ["--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(folder / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    done = subprocess.run([*command, *flags, *launch], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


@pytest.mark.parametrize("streaming", [(), ("--streaming", "--shuffle_buffer_size", "6")])
def test_two_processes_equal_one_that_accumulates(tmp_path, make_small_pipeline, pairs_file, streaming):
    model = tmp_path / "model"
    make_small_pipeline().save_pretrained(model)
    alone = train(tmp_path / "one", model, pairs_file, "--gradient_accumulation_steps", "2", *streaming)
    ddp = ("--ddp_backend", "gloo", "--accelerate_config", "ddp", "--num_processes", "2")
    shared = train(tmp_path / "two", model, pairs_file, *streaming, launch=ddp)
    start = load_file(model / "transformer/diffusion_pytorch_model.safetensors")
    for name in ("checkpoint-3/model.safetensors", "checkpoint-3/ema.safetensors"):
        one, two = load_file(alone / name), load_file(shared / name)
        assert one.keys() == two.keys() and one
        worst = max((one[key] - two[key]).abs().max().item() for key in one)
        moved = max((one[key] - start[key.removeprefix("transformer.")]).abs().max().item() for key in one)
        assert worst < 1e-4 and moved > 1e-3, (worst, moved)
    assert (shared / "export/model_index.json").is_file()
