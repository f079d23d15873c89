"""kill -9 at any point, or no room for a checkpoint: the same command goes on, and ends at the same weights."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import yaml
from safetensors.torch import load_file

STEPS = 12


REWARDED = {
    "estimator": "flow_grpo", "reward_funcs": ["tone.redness"], "num_generations": 2, "num_inference_steps": 3,
    "sde_window_size": 1,
    "per_device_train_batch_size": 4, "learning_rate": 1e-3, "seed": 4, "logging_steps": 1, "preview_steps": 0,
    "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "report_to": "none", "disable_tqdm": True,
    "export_dtype": "float32", "use_cpu": True, "eval_n": 6, "eval_inference_steps": 2, "gate_steps": 1, "gate_n": 2,
    "gate_action": "warn", "stages": [{"edit_ratio": 1.0, "max_steps": 4}, {"edit_ratio": 0.0, "max_steps": 4}],
}  # fmt: skip


def command(model, data, run):
    if data is None:  # PDTR on the micro world
        config = run.with_suffix(".yaml")
        config.write_text(yaml.safe_dump(REWARDED))
        argv = [sys.executable, "-m", "unipic2.cli", "train", "pdtr", "--config", str(config), "--resume"]
        return [*argv, "--model_name_or_path", str(model), "--output_dir", str(run)]
    argv = [sys.executable, "-m", "unipic2.cli", "train", "pretrain", "--model_name_or_path", str(model)]
    argv += ["--dataset_name", str(data), "--output_dir", str(run), "--resume", "--use_cpu", "--resolution", "64"]
    argv += f"--max_steps {STEPS} --per_device_train_batch_size 2 --learning_rate 1e-3 --seed 4".split()
    argv += "--save_strategy steps --save_steps 2 --save_total_limit 1 --logging_steps 1 --preview_steps 0".split()
    return [*argv, "--report_to", "none", "--disable_tqdm", "true", "--export_dtype", "float32"]


def start(model, data, run):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(run.parent / "cache")}
    environment["PYTHONUNBUFFERED"] = "1"
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


def kill_after_steps(process, run, steps):
    """Wait for so many optimizer steps: each one is logged."""
    log = run.parent / f"{run.name}.log"
    before = log.stat().st_size
    while process.poll() is None and log.read_bytes()[before:].count(b"'learning_rate'") < steps:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_a_killed_run_ends_where_an_uninterrupted_one_does(tmp_path, make_small_pipeline, pairs_file):
    model, whole, killed = (tmp_path / name for name in ("model", "whole", "killed"))
    make_small_pipeline().save_pretrained(model)
    assert start(model, pairs_file, whole).wait(300) == 0, (tmp_path / "whole.log").read_text()[-3000:]
    rng, steps = random.Random(0), []
    for kill in (1, "save", rng.randint(3, 5), "save", rng.randint(3, 5)):
        process = start(model, pairs_file, killed)
        if kill == "save":
            kill_during_a_save(process, killed)
        else:
            kill_after_steps(process, killed, kill)
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


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_a_killed_pdtr_run_ends_where_an_uninterrupted_one_does(tmp_path, make_small_pipeline, tone):
    """Killed while it draws the first pictures, within either stage, while it measures between them, and later."""
    model, whole, killed = (tmp_path / name for name in ("model", "whole", "killed"))
    make_small_pipeline().save_pretrained(model)
    assert start(model, None, whole).wait(300) == 0, (tmp_path / "whole.log").read_text()[-3000:]
    for waits_for, seconds in (
        ("measured/start.json", 0.3), ("stage-1/checkpoint-2", 0.02), ("stage-1/export/model_index.json", 0.0),
        ("measured/1-edit.json", 0.1), ("stage-2/checkpoint-3", 0.05),
    ):  # fmt: skip
        process = start(model, None, killed)
        while process.poll() is None and not (killed / waits_for).exists():
            time.sleep(0.002)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL, f"it was done before it was killed: {waits_for}"
    assert start(model, None, killed).wait(300) == 0, (tmp_path / "killed.log").read_text()[-3000:]
    before = load_file(model / "transformer/diffusion_pytorch_model.safetensors")
    after = load_file(whole / "export/transformer/diffusion_pytorch_model.safetensors")
    assert any((before[key] != after[key]).any() for key in before), "something was learned"
    for exported in ("stage-1/export", "export"):
        name = f"{exported}/transformer/diffusion_pytorch_model.safetensors"
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), exported
    for name in ("interference.json", "stage-1/gate.json", "stage-2/gate.json"):
        assert json.loads((whole / name).read_text()) == json.loads((killed / name).read_text()), name


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
