"""Benchmarks that train: their settings are ones that the trainer takes, and the short ones run."""

import re

import pytest
import yaml
from unipic2.trainer import grpo, pdtr, pretrain
from unipic2.trainer.stages import parse_stages

from ..benchmark_file import FOLDER, benchmark


@pytest.mark.parametrize("updates", [100, 25])
def test_orders_of_stages_make_as_many_steps(tmp_path, updates):
    module = benchmark("progressive")
    for order, count in {"edit,t2i": 2, "t2i,edit": 2, "edit": 1, "t2i": 1, "joint": 1}.items():
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(module.settings(order, updates, 64, 3)))
        argv = ["--config", str(tmp_path / "c.yaml"), "--model_name_or_path", "micro-pretrained"]
        stages = [args for _, args in parse_stages([*argv, "--output_dir", str(tmp_path)], pdtr.parse)]
        assert len(stages) == count and sum(args.max_steps for args in stages) == updates
        assert sum(args.edit_ratio * args.max_steps for args in stages) == pytest.approx(
            {"edit": updates, "t2i": 0}.get(order, 0.4 * updates), abs=0.5
        )


def test_ways_of_reinforcement_learning_are_settings_that_parse(tmp_path):
    module = benchmark("reinforcement")
    assert set(module.METHODS) == {"published", "cps", "nft", "nft_current", "awm"}
    for method in module.METHODS:
        _, args = grpo.parse(module.flags(method, 3, "edit", str(tmp_path)))
        assert args.edit_ratio == 1 and args.seed == 3
        assert args.guidance_scale == (1.5 if method == "published" else 1)


def test_later_methods_of_a_race_have_times_the_minutes_of_the_first(monkeypatch, capsys):
    module, limits = benchmark("reinforcement"), []
    curves = {1: [(0.0, 0.5, 0.9), (2.0, 0.7, 0.9), (3.0, 0.9, 0.9)], 2: [(0.0, 0.5, 0.9), (8.0, 0.8, 0.9)]}

    def race(method, seed, minutes, *rest):
        limits.append((method, seed, minutes))
        return curves[seed] if method == "nft" else [(0.0, 0.5, 0.9), (minutes, 0.6, 0.8)]

    monkeypatch.setattr(module, "race", race)
    argv = "reinforcement --target 0.85 --minutes 7 --times 5 --methods nft published cps --seeds 1 2"
    monkeypatch.setattr("sys.argv", argv.split())
    module.main()
    assert limits == [
        ("nft", 1, 7), ("published", 1, 15), ("cps", 1, 15),
        ("nft", 2, 7), ("published", 2, 7), ("cps", 2, 7),
    ]  # fmt: skip
    assert "nft: minutes to 0.85: 3.0, never; best 0.850" in capsys.readouterr().out


def test_contrastive_runs_are_settings_that_parse(tmp_path):
    _, args = pretrain.parse(benchmark("contrastive").flags(0.05, 2, 400, 16, str(tmp_path)))
    assert (args.contrastive_weight, args.max_steps, args.seed) == (0.05, 400, 2)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_the_benchmark_of_a_training_step_runs(train, monkeypatch, capsys):
    monkeypatch.syspath_prepend(FOLDER)  # as it is for a script
    flags = ["--shape", "micro", "--train", train, "--steps", "2", "--batch-size", "2", "--peak-tflops", "1"]
    monkeypatch.setattr("sys.argv", ["training_step", *flags])
    benchmark("training_step").main()
    found = re.search(
        r"(\S+) s/step.*peak memory (\S+) GB\n(\S+) TFLOP/step, .* MFU (\S+) of 1$", capsys.readouterr().out, re.S
    )
    assert float(found[1]) > 0 and float(found[2]) > 0 and float(found[3]) > 0 and float(found[4]) > 0


@pytest.mark.parametrize(("name", "said"), [("pretraining", 3), ("metaquery", 6)])
def test_benchmarks_of_steps_run(name, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [name, "--steps", "1", "--batch-size", "2", "--rounds", "1"])
    benchmark(name).main()
    assert capsys.readouterr().out.count("samples/s") == said
