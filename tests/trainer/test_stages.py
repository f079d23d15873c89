"""Stages: one after another, each from what the last one exported, all checked before the first."""

import json

import pytest
import yaml
from safetensors.torch import load_file
from unipic2.core.errors import InputError
from unipic2.trainer.pretrain import cache, main, parse
from unipic2.trainer.stages import parse_stages

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def config(tmp_path, make_small_pipeline, pairs_file):
    """Return a function that writes a config with stages and returns the flags."""
    make_small_pipeline().save_pretrained(tmp_path / "model")

    def write(stages, **settings):
        content = {
            "model_name_or_path": str(tmp_path / "model"), "dataset_name": str(pairs_file), "resolution": 64,
            "output_dir": str(tmp_path / "run"), "use_cpu": True, "max_steps": 2, "learning_rate": 1e-2,
            "per_device_train_batch_size": 2, "preview_steps": 0, "report_to": "none", "disable_tqdm": True,
            "save_steps": 2, "stages": stages, **settings,
        }  # fmt: skip
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
        return ["--config", str(tmp_path / "config.yaml")]

    return write


def test_each_stage_starts_from_the_last(config, tmp_path, capfd):
    argv = config([{"resolution": 64}, {"resolution": 96, "max_steps": 4}], resume=True, export_dtype="float16")
    assert main(argv) == 0
    run = tmp_path / "run"
    assert capfd.readouterr().out.endswith(f"{run / 'export'}\n")
    first, second, result = (load_file(run / f / WEIGHTS) for f in ("stage-1/export", "stage-2/export", "export"))
    key = "transformer_blocks.0.attn.to_q.weight"
    assert first[key].dtype.itemsize == 4 and second[key].dtype.itemsize == 2
    assert all((second[name] == result[name]).all() for name in result)
    starts = ["model_name_or_path" in json.loads((run / f"stage-{n}/run.json").read_text()) for n in (1, 2)]
    assert starts == [True, False], "where the run's folder is makes no other run of it"
    assert (run / "stage-1/checkpoint-2").is_dir() and (run / "stage-2/checkpoint-4").is_dir()
    assert (tmp_path / "run/stage-2/report.html").is_file()
    before = (tmp_path / "run/export" / WEIGHTS).read_bytes()
    assert main(argv) == 0
    said = capfd.readouterr().err
    assert "[stage 1 of 2] done before\n" in said and "[stage 2 of 2] done before\n" in said
    assert (tmp_path / "run/export" / WEIGHTS).read_bytes() == before


def test_a_finished_stage_that_is_asked_for_with_other_settings_says_so(config, tmp_path, capfd):
    stages = [{"max_steps": 1}, {"learning_rate": 2e-3}]
    assert main(config(stages, resume=True, hub_token="a secret")) == 0
    capfd.readouterr()
    assert "secret" not in (tmp_path / "run/stage-1/settings.json").read_text()
    changed = [{"max_steps": 3}, {"learning_rate": 1e-3, "logging_steps": 1, "save_steps": 7}]
    assert main(config(changed, resume=True)) == 0
    said = capfd.readouterr().err
    folders = [tmp_path / f"run/stage-{n}" for n in (1, 2)]
    assert (
        f"[stage 1 of 2] done before, with max_steps 1 (now 3); to train it anew delete {folders[0]} and later" in said
    )
    assert f"done before, with learning_rate 0.002 (now 0.001); to train it anew delete {folders[1]} " in said


def test_a_later_stage_starts_where_the_earlier_one_ended(config, tmp_path):
    """A second stage that learns nothing hands on the first one's weights."""
    assert main(config([{"max_steps": 2}, {"learning_rate": 0.0, "ema_decay": 0.0}], export_dtype="float32")) == 0
    first, result = (load_file(tmp_path / "run" / f / WEIGHTS) for f in ("stage-1/export", "export"))
    start = load_file(tmp_path / "model" / WEIGHTS)
    assert all((first[key] == result[key]).all() for key in result)
    assert any((first[key] != start[key]).any() for key in start)


def test_stages_draw_other_samples_unless_told(config, tmp_path):
    """A second stage of the same task would else train on the samples and the noise of the first."""
    stages = [{"max_steps": 2}, {"max_steps": 2}, {"max_steps": 2, "data_seed": 3}]
    seeds = [args.draw_seed for _, args in parse_stages(config(stages, seed=3), parse)]
    assert seeds == [3, 4, 3]
    assert main(config([stages[0], stages[2]], seed=3, learning_rate=0.0, logging_steps=1)) == 0
    first, again = (json.loads((tmp_path / f"run/stage-{n}/log_history.json").read_text()) for n in (1, 2))
    assert [entry["loss"] for entry in first[:2]] == [entry["loss"] for entry in again[:2]]
    fresh = {"seed": 3, "learning_rate": 0.0, "logging_steps": 1, "output_dir": str(tmp_path / "other")}
    assert main(config(stages[:2], **fresh)) == 0
    other = json.loads((tmp_path / "other/stage-2/log_history.json").read_text())
    assert [entry["loss"] for entry in first[:2]] != [entry["loss"] for entry in other[:2]]


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([{"max_steps": 1}, {"resolutoin": 64}], r"stages\[1\]: training settings: .*resolutoin"),
        ([{"max_steps": 1}, {"shift": -1}], r"stages\[1\]: shift: found -1"),
        ([{"output_dir": "x"}], r"stages\[0\]: found output_dir, expected other settings"),
        ([], "stages: found \\[\\], expected a list of mappings"),
        ({"resolution": 64}, "stages: found .*, expected a list of mappings"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_stage(config, tmp_path, stages, said):
    with pytest.raises(InputError, match=said):
        main(config(stages))
    assert not (tmp_path / "run").exists()


def test_no_stages_with_lora(config):
    with pytest.raises(InputError, match=r"stages\[0\]: use_peft: found true"):
        main(config([{"max_steps": 1}], use_peft=True))


def test_a_cache_is_made_ahead_for_all_stages(config, tmp_path, capsys):
    """Training in stages then finds every row at every size, from the exports of earlier stages, too."""
    stages = [{"resolution": 64}, {"resolution": 96}]
    argv = config(stages, cache_dir=str(tmp_path / "cache"))
    assert cache(argv) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'cache'}: 16 rows\n" * 2 and not (tmp_path / "run").exists()
    shards = sorted((tmp_path / "cache").glob("shard-*"))
    assert main(argv) == 0
    assert sorted((tmp_path / "cache").glob("shard-*")) == shards
