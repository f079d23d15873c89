"""`train grpo` and `train pdtr`: settings, own data, stages, measuring, reports, LoRA that goes on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback
from unipic2.core.checkpoint import read_header
from unipic2.core.errors import InputError
from unipic2.trainer import grpo, pdtr
from unipic2.trainer.cli import main
from unipic2.trainer.script import train_and_export
from unipic2.trainer.stages import parse_stages

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def config(tmp_path, make_small_pipeline, tone):
    """Return a function that writes a config and returns the flags."""
    make_small_pipeline().save_pretrained(tmp_path / "model")

    def write(**settings):
        content = {
            "model_name_or_path": str(tmp_path / "model"), "output_dir": str(tmp_path / "run"),
            "dataset_name": "micro", "estimator": "flow_grpo",
            "reward_funcs": [tone, "micro_soft", "preservation"], "use_cpu": True, "max_steps": 2,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 4, "num_generations": 2, "num_inference_steps": 3, "sde_window_size": 1,
            "preview_steps": 2, "preview_inference_steps": 2, "report_to": "none", "disable_tqdm": True,
            "save_steps": 2, "logging_steps": 1, "log_completions": True, "export_dtype": "float32", **settings,
        }  # fmt: skip
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
        return ["--config", str(tmp_path / "config.yaml")]

    return write


@pytest.fixture
def prompts_file(tmp_path):
    """Return a jsonl with prompts and edits of two sizes, without pictures to learn, and a column of its own."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(12):
        row = {"prompt": f"a red circle {i}", "source_image": None, "tag": "counting"}
        if i % 2:
            size = (64, 64) if i % 4 == 1 else (96, 48)
            Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(tmp_path / f"s{i}.png")
            row |= {"source_image": f"s{i}.png", "tag": "recolor"}
        rows.append(json.dumps(row))
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    return tmp_path / "prompts.jsonl"


STAGES = [{"edit_ratio": 1.0}, {"edit_ratio": 0.25, "reward_funcs": ["micro_strict", "tone.redness"]}]
OWN = {"dataset_name": "some.jsonl", "eval_dataset_name": "other.jsonl"}
SMALL = {"eval_n": 6, "eval_inference_steps": 2, "gate_steps": 1, "gate_n": 2}


# grpo


def test_grpo_from_the_command_line(config, tmp_path, capfd):
    assert main(["train", "grpo", *config()]) == 0
    run = tmp_path / "run"
    assert capfd.readouterr().out.endswith(f"{run / 'export'}\n")
    before, after = load_file(tmp_path / "model" / WEIGHTS), load_file(run / "export" / WEIGHTS)
    assert any((before[key] != after[key]).any() for key in before)
    history = json.loads((run / "log_history.json").read_text())
    assert "rewards/micro_soft/mean" in history[0] and history[0]["step"] == 1
    report = (run / "report.html").read_text()
    assert "Rewards" in report and "<h2>Samples</h2>" in report
    assert Image.open(run / "completions/step_000000.png").width > 100
    assert "reinforcement learning (flow_grpo)" in (run / "export/README.md").read_text()


@pytest.mark.parametrize("estimator", ["diffusion_nft", "awm"])
def test_other_estimators_by_name(config, tmp_path, capsys, estimator):
    assert main(["train", "grpo", *config(estimator=estimator, preview_steps=0)]) == 0
    assert f"sde_window_size: no effect with estimator {estimator}\n" in capsys.readouterr().err
    export = tmp_path / "run/export"
    assert estimator in (export / "README.md").read_text()
    weights = export / "transformer/diffusion_pytorch_model.safetensors"
    assert read_header(weights).metadata["unipic2.method"] == estimator


def test_own_prompts_with_a_reward_of_ones_own(config, tmp_path, prompts_file, monkeypatch):
    """Its function sees the data's other columns; sources have their bucket's size."""
    (tmp_path / "my_rewards.py").write_text(
        "def brightness(prompts, images, source_image, tag, **columns):\n"
        "    for image, source, kind in zip(images, source_image, tag):\n"
        "        assert (source is None) == (kind == 'counting')\n"
        "        assert source is None or source.size == image.size\n"
        "    return [sum(image.resize((1, 1)).getpixel((0, 0))) / 765 for image in images]\n"
    )
    monkeypatch.chdir(tmp_path)
    settings = {"dataset_name": str(prompts_file), "resolution": 64, "reward_funcs": "my_rewards.brightness"}
    assert main(["train", "grpo", *config(**settings, max_steps=6, max_aspect=2.5, save_steps=6)]) == 0
    history = json.loads((tmp_path / "run/log_history.json").read_text())
    assert all(0 < entry["rewards/brightness/mean"] < 1 for entry in history if "reward" in entry)
    assert (tmp_path / "run/previews/step_000002.png").is_file()


def test_a_column_that_has_a_name_of_the_trainers_own(config, tmp_path):
    rows = [json.dumps({"prompt": f"a red circle {i}", "broken": False}) for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    settings = {"dataset_name": str(tmp_path / "rows.jsonl"), "resolution": 64, "reward_funcs": "tone.redness"}
    settings |= {"edit_ratio": 0.0, "max_steps": 1, "preview_steps": 0}
    assert main(["train", "grpo", *config(**settings)]) == 0


def test_an_export_after_a_rollback_says_the_step_of_its_weights(config, tmp_path):
    """Its metrics are of what was trained until then."""

    class Back(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            trainer.restore(trainer.trained_weights(), 2)

    script_args, args = grpo.parse(config(max_steps=3, save_strategy="no", preview_steps=0))
    trainer = grpo.make_trainer(script_args, args, resumed=False)
    trainer.add_callback(Back())
    train_and_export(trainer, script_args, args, None, "reinforcement learning")
    metadata = read_header(tmp_path / "run/export" / WEIGHTS).metadata
    rewards = {entry["step"]: entry["reward"] for entry in trainer.state.log_history if "reward" in entry}
    assert metadata["unipic2.step"] == "2" and trainer.state.global_step == 3
    assert json.loads(metadata["unipic2.metrics"])["reward"] == rewards[2] != rewards[3]
    assert "for 2 steps" in (tmp_path / "run/export/README.md").read_text()


def test_rows_without_the_task_that_is_asked_for(config, tmp_path, capsys):
    """Such as edits whose source's column has another name: they would be drawn as prompts."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    rows = [json.dumps({"prompt": "make it red", "image": "a.png"})] * 4
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    settings = {"dataset_name": str(tmp_path / "rows.jsonl"), "resolution": 64, "reward_funcs": "micro_soft"}
    with pytest.raises(InputError, match="edit_ratio: found 1.0, and no edits in the data.*--source_column"):
        grpo.make_trainer(*grpo.parse(config(**settings, edit_ratio=1.0)), resumed=False)
    grpo.make_trainer(*grpo.parse(config(**settings, edit_ratio=0.5)), resumed=False)
    said = capsys.readouterr().err
    assert "no edits in the data, so edit_ratio 0.5 has no effect" in said
    assert "its column image is not read; if rows are edits of those pictures, name it with --source_column" in said
    named = {**settings, "source_column": "image", "edit_ratio": 0.0}
    with pytest.raises(InputError, match="edit_ratio: found 0.0, and no prompts without a picture in the data"):
        grpo.make_trainer(*grpo.parse(config(**named)), resumed=False)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"reward_funcs": []}, "reward_funcs: found none, expected one or more of micro_soft"),
        ({"reward_funcs": ["micro_sfot"]}, "reward_funcs: found 'micro_sfot', expected one of micro_soft"),
        ({"reward_funcs": ["nowhere.at_all"]}, "reward_funcs: found nowhere.at_all: No module"),
        ({"reward_funcs": ["json.nothing"]}, "reward_funcs: found json.nothing: module 'json' has no"),
        ({"reward_funcs": ["edit_judge"]}, "judge_base_url: found nothing"),
        ({"reward_weights": [1.0]}, "reward_weights: found 1 for 3 rewards"),
        ({"train_text_encoder": True}, "train_text_encoder: found true"),
        ({"lora_name_or_path": "x"}, "lora_name_or_path: found no use_peft"),
        ({"num_genrations": 4}, "Did you mean num_generations"),
        ({"num_prompts": 0}, "num_prompts: found 0"),
        ({"train_timesteps": 9, "estimator": "awm"}, "train_timesteps: found 9, expected at most"),
        ({"nft_beta": 0.0}, "nft_beta: found 0"),
        ({"eta": 0.0}, "eta: found 0"),
        ({"sde_window_range": []}, "sde_window_range: found"),
        ({"estimator": "awm", "epsilon_high": 0.1}, "epsilon_high: found 0.1 for awm"),
    ],
)
def test_what_cannot_be_meant(config, settings, said):
    with pytest.raises(InputError, match=said):
        grpo.parse(config(**settings))


@pytest.mark.parametrize("name", ["grpo_micro", "grpo_sd35m_lora", "pdtr_micro", "pdtr_sd35m_lora"])
def test_ready_settings_can_be_read(name):
    path = Path(grpo.__file__).parent / "configs" / f"{name}.yaml"
    argv = ["--config", str(path), *(["--bf16", "false"] if "sd35m" in name else ["--model_name_or_path", "x"])]
    if name.startswith("grpo"):
        assert grpo.parse(argv)[1].num_generations == 12
    else:
        stages = parse_stages(argv, pdtr.parse, pdtr._OF_THE_RUN, lora_goes_on=True)
        assert [pdtr.own_tasks(args) for _, args in stages] == [("edit",), ("t2i",)]


def test_a_finished_run_trains_no_further(config, tmp_path):
    """Also where its last step is within a pass over the data."""
    argv = ["train", "grpo", *config(resume=True)]
    assert main(argv) == 0
    before = (tmp_path / "run/export" / WEIGHTS).read_bytes()
    assert main(argv) == 0
    assert (tmp_path / "run/export" / WEIGHTS).read_bytes() == before
    assert not (tmp_path / "run/checkpoint-3").exists()


def test_a_run_goes_on_only_as_itself(config, tmp_path):
    assert main(["train", "grpo", *config()]) == 0
    with pytest.raises(InputError, match="checkpoints of an earlier run"):
        main(["train", "grpo", *config()])
    with pytest.raises(InputError, match="estimator of a resumed run: found awm"):
        main(["train", "grpo", *config(resume=True, estimator="awm", max_steps=4)])


def test_rows_that_no_reward_can_use_are_said_at_once(config, tmp_path, monkeypatch):
    class Judge:
        columns = ("include",)

        def __call__(self, prompts, images, **columns):
            return [0.0] * len(prompts)

        def check_column(self, name, values):
            seen.append((name, list(values)))

    seen = []
    rows = [{"prompt": "a cup", "include": '[{"class": "cup"}]'}, {"prompt": "a dog", "include": None}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "judging.py").write_text("judge = None")
    monkeypatch.syspath_prepend(tmp_path)
    import judging

    judging.judge = Judge()
    settings = {"dataset_name": str(tmp_path / "rows.jsonl"), "resolution": 64, "reward_funcs": "judging.judge"}
    grpo.make_trainer(*grpo.parse(config(**settings, edit_ratio=0.0)), resumed=False)
    ((name, values),) = seen
    assert name == "include" and values == [(f"row 0 of {tmp_path / 'rows.jsonl'}", '[{"class": "cup"}]')]


# pdtr


def test_pdtr_measures_both_tasks_around_each_stage(config, tmp_path, capfd):
    argv = ["train", "pdtr", *config(stages=STAGES, resume=True, **SMALL)]
    assert main(argv) == 0
    run = tmp_path / "run"
    out, err = capfd.readouterr()
    assert out.endswith(f"{run / 'export'}\n") and "[gate] step 1:" in err
    found = json.loads((run / "interference.json").read_text())
    assert list(found) == ["start", "1-edit", "2-t2i"]
    for stage, tasks in found.items():
        assert list(tasks) == ["t2i", "edit"] and all(t["n"] == 6 and len(t["kinds"]) == 6 for t in tasks.values())
        assert ("change" in tasks["t2i"]) == (stage != "start")
    report = (run / "report.html").read_text()
    for part in (
        "Interference",
        "Stage 1-edit",
        "<h3>Gate</h3><table><tr><td>step<td>t2i<td>edit",
        "Stage 2-t2i",
        "<svg",
        "Settings of 2-t2i",
        "Best and worst",
    ):
        assert part in report, part
    assert report.count("data:image/png") == 5, "three sheets of measurings, one of samples for each stage"
    card = (run / "export/README.md").read_text()
    assert "PDTR" in card and "| 1-edit |" in card
    kept = {path: path.read_bytes() for path in run.rglob("*.safetensors")}
    assert main(argv) == 0
    err = capfd.readouterr().err
    assert err.count("done before") == 2 and "[measuring]" not in err
    assert all(path.read_bytes() == content for path, content in kept.items())


def test_a_lora_goes_on_from_stage_to_stage(config, tmp_path):
    """And is measured with it: a second stage that learns nothing hands on what the first one learned."""
    settings = {"use_peft": True, "lora_r": 2, "lora_alpha": 64, "learning_rate": 0.1, **SMALL, "gate_steps": 0}
    stages = [{"edit_ratio": 1.0}, {"edit_ratio": 0.0, "learning_rate": 0.0}]
    assert main(["train", "pdtr", *config(stages=stages, **settings)]) == 0
    name = "pytorch_lora_weights.safetensors"
    first, last = (load_file(tmp_path / "run" / folder / name) for folder in ("stage-1/export", "export"))
    assert any(tensor.abs().max() > 0 for key, tensor in first.items() if "lora_B" in key)
    assert first.keys() == last.keys() and all((first[key] == last[key]).all() for key in first)
    start, found = (tmp_path / f"run/measured/{name}" for name in ("start.png", "1-edit.png"))
    assert start.read_bytes() != found.read_bytes(), "drawn with the LoRA"
    found = json.loads((tmp_path / "run/measured/1-edit.json").read_text())
    assert found["tasks"] == json.loads((tmp_path / "run/measured/2-t2i.json").read_text())["tasks"]


def test_a_run_goes_on_in_its_second_stage_wherever_its_folder_is(config, tmp_path, capfd):
    """The second stage starts from a folder of the run itself."""
    settings = {"stages": [{"edit_ratio": 1.0}, {"edit_ratio": 0.0, "max_steps": 4}], "resume": True, **SMALL}
    assert main(["train", "pdtr", *config(**settings)]) == 0
    expected = (tmp_path / "run/export" / WEIGHTS).read_bytes()
    for finished in ("stage-2/export", "stage-2/checkpoint-4", "export"):
        shutil.rmtree(tmp_path / "run" / finished)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    capfd.readouterr()
    assert main(["train", "pdtr", *config(**settings, output_dir=str(tmp_path / "elsewhere"))]) == 0
    assert "training goes on after checkpoint-2" in capfd.readouterr().err
    assert (tmp_path / "elsewhere/export" / WEIGHTS).read_bytes() == expected


def test_what_was_measured_otherwise_is_measured_again(config, tmp_path, capfd):
    settings = {"stages": [{"edit_ratio": 1.0}], "resume": True, **SMALL}
    assert main(["train", "pdtr", *config(**settings)]) == 0
    capfd.readouterr()
    assert main(["train", "pdtr", *config(**settings | {"eval_n": 7})]) == 0
    assert capfd.readouterr().err.count("7 of each task") == 2
    found = json.loads((tmp_path / "run/interference.json").read_text())
    assert found["start"]["t2i"]["n"] == found["1-edit"]["t2i"]["n"] == 7


def test_a_lora_of_another_scale_is_not_taken(config, tmp_path):
    assert main(["train", "grpo", *config(use_peft=True, lora_r=2, lora_alpha=4)]) == 0
    start = {"use_peft": True, "lora_name_or_path": str(tmp_path / "run/export"), "output_dir": str(tmp_path / "two")}
    assert main(["train", "grpo", *config(**start, lora_r=2, lora_alpha=4)]) == 0
    for other in ({"lora_r": 2, "lora_alpha": 8}, {"lora_r": 4, "lora_alpha": 4}):
        with pytest.raises(InputError, match="another rank, scale or other targets"):
            main(["train", "grpo", *config(**start | {"output_dir": str(tmp_path / "three")}, **other)])


def test_pdtr_on_own_data_measures_by_rewards(config, tmp_path, prompts_file, capfd):
    settings = {"dataset_name": str(prompts_file), "eval_dataset_name": str(prompts_file), "resolution": 64}
    settings |= {"reward_funcs": "preservation", "strict_reward": 0.2, "gate_action": "warn", "max_aspect": 2.5}
    assert main(["train", "pdtr", *config(stages=[{"edit_ratio": 1.0}], **settings, **SMALL)]) == 0
    found = json.loads((tmp_path / "run/interference.json").read_text())
    assert found["start"]["edit"]["n"] == 6 and 0 < found["start"]["edit"]["soft"] < 1
    assert found["start"]["edit"]["kinds"].keys() == {"recolor"} and "t2i" not in found["start"], "no reward is for it"
    assert found["start"]["edit"]["preserved"] == found["start"]["edit"]["soft"] and "drift" in found["1-edit"]["edit"]
    assert "eval_reward_funcs names others" in capfd.readouterr().err


def test_pdtr_measures_by_rewards_that_it_does_not_train_on(config, tmp_path, prompts_file, tone, capfd):
    settings = {"dataset_name": str(prompts_file), "eval_dataset_name": str(prompts_file), "resolution": 64}
    settings |= {"reward_funcs": "preservation", "eval_reward_funcs": tone, "eval_reward_weights": 2.0}
    settings |= {"strict_reward": -1.0, "edit_strict_reward": 1.0, "gate_action": "warn", "max_aspect": 2.5}
    assert main(["train", "pdtr", *config(stages=[{"edit_ratio": 1.0}], **settings, **SMALL)]) == 0
    found = json.loads((tmp_path / "run/interference.json").read_text())
    for tasks in found.values():
        assert tasks["t2i"]["strict"] == 1 and tasks["edit"]["strict"] == 0, "each by its own bar"
        assert -1 <= tasks["t2i"]["soft"] <= 1 and tasks["edit"]["preserved"] != tasks["edit"]["soft"]
    said = capfd.readouterr().err
    assert "start: t2i: all samples reach the bar, so no rise can be seen; its rewards are" in said
    assert "1-edit: edit: no sample reaches the bar, so no fall can be seen" in said
    assert said.count("; set strict_reward\n") == said.count("; set edit_strict_reward\n") == 2
    report = (tmp_path / "run/report.html").read_text()
    assert "By kind" in report and "edit: recolor" in report and "<td>kept" in report
    assert "eval_reward_funcs names others" not in said


def test_without_stages_edits_come_first(config, tmp_path, capsys):
    flags = [
        "--model_name_or_path",
        str(tmp_path / "model"),
        "--dataset_name",
        "micro",
        "--reward_funcs",
        "micro_soft",
    ]
    for argv in (config(max_steps=4, save_steps=4), flags):
        stages = parse_stages(argv, pdtr.parse, pdtr._OF_THE_RUN, lora_goes_on=True, default=pdtr.DEFAULT_STAGES)
        assert [pdtr.own_tasks(args) for _, args in stages] == [("edit",), ("t2i",)]
        assert [Path(args.output_dir).name for _, args in stages] == ["stage-1", "stage-2"]
    with pytest.raises(SystemExit):
        pdtr.main(["--help"])
    assert "--gate_max_drop" in capsys.readouterr().out


def test_the_micro_world_is_measured_on_its_own_held_out_samples(config):
    """Also where it is named: rows to train on are drawn anew each time, so that nothing could be compared."""
    script_args, _ = pdtr.parse(config(eval_dataset_name="micro"))
    assert script_args.eval_dataset_name is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"stages": []}, r"stages: found \[\], expected a list of mappings"),
        ({"stages": [{"eval_n": 3}]}, r"stages\[0\]: found eval_n"),
        ({"stages": [{"gate_action": "hope"}]}, r"stages\[0\]: gate_action: found 'hope'"),
        ({"stages": [{"gate_max_drop": 2}]}, r"stages\[0\]: gate_max_drop: found 2"),
        ({"stages": [{"gate_target": 85}]}, r"stages\[0\]: gate_target: found 85"),
        ({"stages": [{"lora_r": 8}]}, r"stages\[0\]: found lora_r"),
        ({"stages": STAGES, "dataset_name": "some.jsonl"}, "eval_dataset_name: found nothing"),
        ({"stages": STAGES, **OWN, "eval_dataset_name": "micro"}, "eval_dataset_name: found micro, expected rows of"),
        ({"stages": [{"num_generations": "many"}]}, r"stages\[0\]: training settings: found argument --num_gen"),
        ({"stages": STAGES, "eval_reward_funcs": ["ocr"]}, "eval_reward_funcs: found ocr, expected none"),
        ({"stages": STAGES, **OWN, "eval_reward_weights": [1.0]}, "eval_reward_weights: found 1 for 0 rewards"),
        ({"stages": STAGES, **OWN, "eval_reward_funcs": "edit_judge"}, "judge_base_url: found nothing"),
        ({"stages": STAGES, **OWN, "eval_reward_funcs": "ocrr"}, "eval_reward_funcs: reward_funcs: found 'ocrr'"),
    ],
)
def test_stages_that_cannot_be_meant(config, settings, said):
    with pytest.raises(InputError, match=said):
        pdtr.main(config(**settings))
