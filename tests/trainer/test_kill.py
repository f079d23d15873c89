"""kill -9 at any point, or no room for a checkpoint: the same command goes on, and ends at the same weights."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

STEPS = 12


def command(model, data, run):
    argv = [sys.executable, "-m", "unipic2.cli", "train", "pretrain", "--model_name_or_path", str(model)]
    argv += ["--dataset_name", str(data), "--output_dir", str(run), "--resume", "--use_cpu", "--resolution", "64"]
    argv += f"--max_steps {STEPS} --per_device_train_batch_size 2 --learning_rate 1e-3 --seed 4".split()
    argv += "--save_strategy steps --save_steps 2 --save_total_limit 1 --logging_steps 1 --preview_steps 0".split()
    return [*argv, "--report_to", "none", "--disable_tqdm", "true", "--export_dtype", "float32"]


def start(model, data, run):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(run.parent / "cache")}
    log = (run.parent / f"{run.name}.log").open("a")
    return subprocess.Popen(command(model, data, run), env=environment, stdout=log, stderr=log)


def kill_during_a_save(process, run):
    """Wait for a checkpoint's folder that has no state file yet, the last one to be written."""
    known = set(run.glob("checkpoint-*"))
    while process.poll() is None:
        if any(not (folder / "trainer_state.json").exists() for folder in set(run.glob("checkpoint-*")) - known):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()


def kill_after(process, run, seconds):
    """Wait for training to move, then a while."""
    known = set(run.glob("checkpoint-*"))
    while process.poll() is None and not set(run.glob("checkpoint-*")) - known:
        time.sleep(0.002)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_a_killed_run_ends_where_an_uninterrupted_one_does(tmp_path, make_small_pipeline, pairs_file):
    model, whole, killed = (tmp_path / name for name in ("model", "whole", "killed"))
    make_small_pipeline().save_pretrained(model)
    assert start(model, pairs_file, whole).wait(300) == 0, (tmp_path / "whole.log").read_text()[-3000:]
    rng, steps = random.Random(0), []
    for kill in ("save", "later", "save", "later", "save"):
        process = start(model, pairs_file, killed)
        if kill == "save":
            kill_during_a_save(process, killed)
        else:
            kill_after(process, killed, rng.uniform(0, 0.05))
        assert process.returncode == -signal.SIGKILL, "it was done before it was killed"
        steps.append(sorted(int(f.name.rpartition("-")[2]) for f in killed.glob("checkpoint-*")))
    assert start(model, pairs_file, killed).wait(300) == 0, (tmp_path / "killed.log").read_text()[-3000:]
    assert (tmp_path / "killed.log").read_text().count("training goes on after checkpoint-") >= 3, steps
    state = json.loads((killed / f"checkpoint-{STEPS}/trainer_state.json").read_text())
    assert state["global_step"] == STEPS
    for name in (f"checkpoint-{STEPS}/model.safetensors", f"checkpoint-{STEPS}/ema.safetensors"):
        one, other = load_file(whole / name), load_file(killed / name)
        assert one.keys() == other.keys() and all((one[key] == other[key]).all() for key in one), steps
    exported = "export/transformer/diffusion_pytorch_model.safetensors"
    assert (whole / exported).read_bytes() == (killed / exported).read_bytes()


LIMITED = """
import resource, sys
from unipic2.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limits on file sizes")
def test_no_room_for_a_checkpoint(tmp_path, make_small_pipeline, pairs_file):
    """The limit lets the weights through and stops the optimizer's file, which is twice as large."""
    model, run = tmp_path / "model", tmp_path / "run"
    make_small_pipeline().save_pretrained(model)
    first = [*command(model, pairs_file, run), "--max_steps", "2"]
    subprocess.run(first, check=True, capture_output=True, timeout=300)
    kept = run / "checkpoint-2/model.safetensors"
    before, limit = kept.read_bytes(), int(1.5 * kept.stat().st_size)
    assert (run / "checkpoint-2/optimizer.pt").stat().st_size > limit
    limited = [sys.executable, "-c", LIMITED, str(limit), *command(model, pairs_file, run)[3:]]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=300)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert last.startswith(f"error: writing {run / 'checkpoint-4'}: found ") and "Free some space" in last
    assert kept.read_bytes() == before
    subprocess.run(command(model, pairs_file, run), check=True, capture_output=True, timeout=300)
    assert (run / f"checkpoint-{STEPS}").is_dir()
