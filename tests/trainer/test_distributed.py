"""Two processes on the CPU (gloo) train the same model as one process that accumulates twice as long."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
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


def train(folder, model, data, *flags, launch=(), method="pretrain", settings=SETTINGS, cwd=None):
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(settings)
    command = [sys.executable, "-m", "unipic2.cli", "train", method, "--config", str(folder / "config.yaml")]
    command += ["--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(folder / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [*command, *flags, *launch], env=environment, capture_output=True, text=True, timeout=300, cwd=cwd
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "no preview" not in done.stderr, done.stderr
    assert ("--resume" in flags) == ("training goes on after checkpoint-" in done.stderr)
    return folder / "run"


@pytest.mark.parametrize("streaming", [(), ("--streaming", "--shuffle_buffer_size", "6")])
def test_two_processes_equal_one_that_accumulates(tmp_path, make_small_pipeline, pairs_file, streaming):
    model = tmp_path / "model"
    make_small_pipeline().save_pretrained(model)
    rows = pairs_file.with_name("seven.jsonl")  # a pass has three blocks, and one more to make two steps
    rows.write_text("\n".join(pairs_file.read_text().splitlines()[:7]))
    flags = ("--max_steps", "5", "--save_steps", "5", *streaming)
    alone = train(tmp_path / "one", model, rows, "--gradient_accumulation_steps", "2", *flags)
    ddp = ("--ddp_backend", "gloo", "--accelerate_config", "ddp", "--num_processes", "2")
    shared = train(tmp_path / "two", model, rows, *flags, launch=ddp)
    for name in ("checkpoint-5/model.safetensors", "checkpoint-5/ema.safetensors"):
        assert_same(model, alone / name, shared / name)
    assert (shared / "export/model_index.json").is_file()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_a_terminated_run_leaves_no_process(tmp_path, make_small_pipeline, pairs_file):
    """Workers have sessions of their own: a signal to the command does not reach them by itself."""
    model, run = tmp_path / "model", tmp_path / "run"
    make_small_pipeline().save_pretrained(model)
    (tmp_path / "config.yaml").write_text(SETTINGS.replace("max_steps: 3", "max_steps: 100000"))
    command = [sys.executable, "-m", "unipic2.cli", "train", "pretrain", "--config", str(tmp_path / "config.yaml")]
    command += ["--model_name_or_path", str(model), "--dataset_name", str(pairs_file), "--output_dir", str(run)]
    command += ["--ddp_backend", "gloo", "--accelerate_config", "ddp", "--num_processes", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}

    def workers() -> list[str]:
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal():
                with contextlib.suppress(OSError):
                    found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        return [line for line in found if str(run) in line]

    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    until = time.monotonic() + 240
    while time.monotonic() < until and not (run / "checkpoint-3").exists() and process.poll() is None:
        time.sleep(0.05)
    assert len(workers()) >= 3, (tmp_path / "log").read_text()[-3000:]
    process.terminate()
    assert process.wait(60) == 130, (tmp_path / "log").read_text()[-3000:]
    assert not workers()


def test_two_processes_train_a_connector_as_one_does(tmp_path, make_metaquery_pipeline, pairs_file):
    model = tmp_path / "model"
    make_metaquery_pipeline().save_pretrained(model)
    options = {"method": "metaquery", "settings": SETTINGS + "prefix_cache_gib: 0.01\n"}
    alone = train(tmp_path / "one", model, pairs_file, "--gradient_accumulation_steps", "2", **options)
    ddp = ("--ddp_backend", "gloo", "--accelerate_config", "ddp", "--num_processes", "2")
    shared = train(tmp_path / "two", model, pairs_file, launch=ddp, **options)
    one, two = (load_file(run / "checkpoint-3/model.safetensors") for run in (alone, shared))
    start = load_file(model / "conditioner/diffusion_pytorch_model.safetensors")
    assert one.keys() == {f"conditioner.{name}" for name in start}
    assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-4
    assert max((one[key] - start[key.removeprefix("conditioner.")]).abs().max().item() for key in one) > 1e-3
    assert (shared / "export/conditioner").is_dir()


def assert_same(model, one, two):
    start = load_file(model / WEIGHTS)
    one, two = load_file(one), load_file(two)
    assert one.keys() == two.keys() and one
    worst = max((one[key] - two[key]).abs().max().item() for key in one)
    moved = max((one[key] - start[key.removeprefix("transformer.")]).abs().max().item() for key in one)
    assert worst < 1e-4 and moved > 1e-3, (worst, moved)


FALLING = """
from pathlib import Path

def falling(prompts, images, **columns):
    if len(prompts) != 5:  # training, or the measuring before and after stages
        return [1.0 - 0.1 * (i % 2) for i in range(len(prompts))]
    calls = Path("{calls}")
    count = len(calls.read_text()) if calls.exists() else 0
    calls.write_text("x" * (count + 1))
    return [1.0 - count // 2 % 2] * 5  # both tasks of every second look
"""


@pytest.mark.parametrize("estimator", ["flow_grpo", "diffusion_nft", "awm --old_policy average"])
def test_groups_stay_whole_over_two_processes(tmp_path, make_small_pipeline, tone, estimator):
    """Rewards are of the same groups, so two processes train what one does that draws both generations itself."""
    model = tmp_path / "model"
    make_small_pipeline().save_pretrained(model)
    flags = "--reward_funcs tone.redness micro_soft --num_generations 3 --num_inference_steps 4 --sde_window fixed"
    flags += " --steps_per_generation 1"
    flags += f" --per_device_train_batch_size 6 --estimator {estimator} --resolution 64"
    flags = (*flags.split(), "--beta", "0.05")
    ddp = ("--ddp_backend", "gloo", "--accelerate_config", "ddp", "--num_processes", "2")
    alone = train(tmp_path / "one", model, "micro", "--gradient_accumulation_steps", "2", *flags, method="grpo")
    shared = train(tmp_path / "two", model, "micro", *flags, launch=ddp, method="grpo")
    for name in ("checkpoint-3/model.safetensors", "checkpoint-3/ema.safetensors"):
        assert_same(model, alone / name, shared / name)
    one, two = (
        json.loads((run / "checkpoint-3/trainer_state.json").read_text())["log_history"] for run in (alone, shared)
    )
    for name in ("reward", "kl"):  # of all processes
        values = [[entry[name] for entry in history if name in entry] for history in (one, two)]
        assert len(values[0]) == 3 and values[0] == pytest.approx(values[1], rel=0.02, abs=1e-6), name


@pytest.mark.parametrize("own_data", [False, True])
def test_pdtr_on_two_processes(tmp_path, make_small_pipeline, pairs_file, own_data):
    """One process measures and decides; both stop, or both go back to the same weights."""
    model = tmp_path / "model"
    make_small_pipeline().save_pretrained(model)
    settings = SETTINGS.replace("edit_ratio: 0.5\n", "stages: [{edit_ratio: 1.0}, {edit_ratio: 0.0}]\n")
    settings += "reward_funcs: [micro_soft]\nnum_generations: 2\nnum_inference_steps: 3\n"
    settings += f"estimator: {'flow_grpo' if own_data else 'diffusion_nft'}\nsde_window_size: 1\n"
    settings += "eval_n: 6\neval_inference_steps: 2\ngate_steps: 1\ngate_n: 5\n"
    data = pairs_file if own_data else "micro"
    if own_data:  # each stage's second look finds nothing right
        (tmp_path / "falling.py").write_text(FALLING.format(calls=tmp_path / "calls"))
        settings = settings.replace("micro_soft", "falling.falling")
        settings += f"eval_dataset_name: {pairs_file}\nstrict_reward: 0.5\n"
    else:
        settings += "gate_target: 0.0\n"
    ddp = ("--ddp_backend", "gloo", "--accelerate_config", "ddp", "--num_processes", "2")
    run = train(tmp_path / "two", model, data, launch=ddp, method="pdtr", settings=settings, cwd=tmp_path)
    if own_data:
        start, end = load_file(model / WEIGHTS), load_file(run / "export" / WEIGHTS)
        assert all((start[key] == end[key]).all() for key in start), "both stages went back to where they began"
    assert list(json.loads((run / "interference.json").read_text())) == ["start", "1-edit", "2-t2i"]
    for stage in ("stage-1", "stage-2"):
        assert [look["step"] for look in json.loads((run / stage / "gate.json").read_text())] == [0, 1]


# accelerate shards on GPUs only: here it is told to do it on the CPU, over gloo. All else is the real thing.
SHARDING_ON_THE_CPU = """
import os
if os.environ.get("ACCELERATE_USE_FSDP") == "true" and "RANK" in os.environ:
    import accelerate.state as state
    init = state.AcceleratorState.__init__

    def patched(self, *args, fsdp_plugin=None, **kwargs):
        first = state.AcceleratorState._shared_state == {}
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if first and fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = state.DistributedType.FSDP, fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    state.AcceleratorState.__init__ = patched
"""


@pytest.fixture
def sharding(tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(SHARDING_ON_THE_CPU)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]))

    def launch(profile):
        return "--ddp_backend", "gloo", "--accelerate_config", profile, "--num_processes", "2"

    return launch


def test_sharded_weights_train_the_same(tmp_path, make_small_pipeline, pairs_file, sharding):
    """FSDP2: average, previews and export are those of whole weights."""
    model = tmp_path / "model"
    make_small_pipeline().save_pretrained(model)
    alone = train(tmp_path / "one", model, pairs_file, "--gradient_accumulation_steps", "2")
    flags = ("--preview_steps", "2", "--preview_inference_steps", "1", "--gradient_checkpointing", "true")
    shared = train(tmp_path / "two", model, pairs_file, *flags, launch=sharding("fsdp2"))
    assert (shared / "checkpoint-3/pytorch_model_fsdp_0").is_dir(), "weights were sharded"
    assert_same(model, alone / "checkpoint-3/ema.safetensors", shared / "checkpoint-3/ema.safetensors")
    assert_same(model, alone / f"export/{WEIGHTS}", shared / f"export/{WEIGHTS}")
    with Image.open(shared / "previews/step_000002.png") as grid:
        assert len(grid.getcolors(10_000_000)) > 50


def test_a_sharded_run_on_a_stream_goes_on_where_it_was(tmp_path, make_small_pipeline, pairs_file, sharding):
    model = tmp_path / "model"
    make_small_pipeline().save_pretrained(model)
    streaming = ("--streaming", "--shuffle_buffer_size", "6")
    alone = train(tmp_path / "one", model, pairs_file, "--gradient_accumulation_steps", "2", *streaming)
    cut = (*streaming, "--max_steps", "2", "--save_steps", "2")
    train(tmp_path / "cut", model, pairs_file, *cut, launch=sharding("fsdp2"))
    shutil.rmtree(tmp_path / "cut/run/export")
    resumed = train(tmp_path / "cut", model, pairs_file, "--resume", *streaming, launch=sharding("fsdp2"))
    assert_same(model, alone / f"export/{WEIGHTS}", resumed / f"export/{WEIGHTS}")


def test_two_processes_go_on_in_a_later_pass(tmp_path, make_small_pipeline, pairs_file):
    """16 rows are four steps: they go on in the middle of the second pass, with its rows and draws."""
    model = tmp_path / "model"
    make_small_pipeline().save_pretrained(model)
    ddp = ("--ddp_backend", "gloo", "--accelerate_config", "ddp", "--num_processes", "2")
    whole = train(tmp_path / "whole", model, pairs_file, "--max_steps", "8", "--save_steps", "8", launch=ddp)
    train(tmp_path / "cut", model, pairs_file, "--max_steps", "6", "--save_steps", "6", launch=ddp)
    shutil.rmtree(tmp_path / "cut/run/export")
    flags = ("--max_steps", "8", "--save_steps", "8", "--resume")
    resumed = train(tmp_path / "cut", model, pairs_file, *flags, launch=ddp)
    assert_same(model, whole / f"export/{WEIGHTS}", resumed / f"export/{WEIGHTS}")


def test_zero2_in_bfloat16(tmp_path, make_small_pipeline, pairs_file, sharding):
    """Weights stay whole between the passes; what is computed is bfloat16, what is kept float32."""
    model = tmp_path / "model"
    make_small_pipeline().save_pretrained(model)
    flags = ("--bf16", "true", "--preview_steps", "2", "--preview_inference_steps", "1")
    alone = train(tmp_path / "one", model, pairs_file, "--gradient_accumulation_steps", "2", *flags)
    shared = train(tmp_path / "two", model, pairs_file, *flags, launch=sharding("zero2"))
    start, one, two = (load_file(folder / WEIGHTS) for folder in (model, alone / "export", shared / "export"))
    apart, moved = (sum((one[k] - other[k]).abs().sum().item() for k in one) for other in (two, start))
    assert apart < 0.2 * moved, "Adam's first steps are signs, so weights without gradients differ"
    losses = [json.loads((run / "checkpoint-3/trainer_state.json").read_text()) for run in (alone, shared)]
    first, second = ([entry["loss"] for entry in state["log_history"] if "loss" in entry] for state in losses)
    assert max(abs(a - b) for a, b in zip(first, second, strict=True)) < 2e-3, (first, second)
    assert (shared / "previews/step_000002.png").is_file()


def test_what_sharding_does_not_go_with(tmp_path, make_small_pipeline, pairs_file, sharding):
    model = tmp_path / "model"
    make_small_pipeline().save_pretrained(model)
    with pytest.raises(AssertionError, match="found sharding with use_peft, expected ddp for it"):
        train(tmp_path / "one", model, pairs_file, "--use_peft", launch=sharding("fsdp2"))
