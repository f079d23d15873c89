"""Settings of `unipic2 train pretrain`: YAML, flags, and what is said about wrong ones."""

import json

import pytest
from unipic2.core.errors import InputError
from unipic2.trainer import FlowMatchingConfig
from unipic2.trainer.pretrain import micro_previews, parse


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("timestep_sampling", "logitnormal", "expected one of logit_normal, uniform"),
        ("export_dtype", "fp16", "expected one of float32, float16, bfloat16"),
        ("caption_dropout", 1.1, "expected a share from 0 to 1"),
        ("edit_caption_dropout", -0.1, "expected a share from 0 to 1"),
        ("edit_ratio", 50, "expected a share from 0 to 1"),
        ("edit_ratio", float("nan"), "expected a share from 0 to 1"),
        ("shift", 0, "expected a number above 0"),
        ("shift", -3.0, "expected a number above 0"),
        ("shift", float("nan"), "expected a number above 0"),
        ("ema_decay", 1.5, "expected"),
        ("logit_std", -1.0, "expected"),
        ("muon_learning_rate", 0.0, "expected a number above 0"),
    ],
)
def test_bad_values_are_named(tmp_path, field, value, expected):
    with pytest.raises(InputError, match=f"^{field}: found .*{expected}"):
        FlowMatchingConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **{field: value})


@pytest.fixture
def config_file(tmp_path):
    def write(text):
        (tmp_path / "config.yaml").write_text(text)
        return ["--config", str(tmp_path / "config.yaml"), "--output_dir", str(tmp_path / "out"), "--use_cpu"]

    return write


def test_yaml_and_flags(config_file):
    argv = config_file("model_name_or_path: m\nshift: 2.5\nlearning_rate: 1e-3\nnum_scenes: 7\nmax_steps: 3\n")
    script_args, args = parse([*argv, "--max_steps", "9"])
    assert (script_args.num_scenes, args.shift, args.learning_rate, args.max_steps) == (7, 2.5, 1e-3, 9)
    assert isinstance(args, FlowMatchingConfig) and script_args.dataset_name == "micro"


def test_the_shipped_config_parses(config_file):
    from unipic2.trainer import pretrain

    path = pretrain.Path(pretrain.__file__).parent / "configs" / "pretrain_micro.yaml"
    argv = config_file("")
    _, args = parse(["--config", str(path), *argv[2:], "--model_name_or_path", "m"])
    assert args.max_steps > 0 and args.train_text_encoder and args.edit_ratio == 0.35


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("learing_rate", "learning_rate"), ("caption_droput", "caption_dropout"), ("shfit", "shift"),
     ("num_scene", "num_scenes")],
)  # fmt: skip
def test_unknown_names_bring_the_nearest(config_file, key, nearest):
    argv = config_file(f"model_name_or_path: m\n{key}: 1\n")
    with pytest.raises(InputError, match=f"Did you mean .*{nearest}.* instead of {key}"):
        parse(argv)
    argv = config_file("model_name_or_path: m\n")
    with pytest.raises(InputError, match=f"Did you mean .*{nearest}.* instead of {key}"):
        parse([*argv, f"--{key}", "1"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("shift: 0\nmodel_name_or_path: m", "shift"),
        ("edit_ratio: [1, 2]\nmodel_name_or_path: m", "training settings"),
        ("shift: 3.0", "model_name_or_path: found nothing"),
        ("model_name_or_path: m\ndataset_name: laion", "dataset_name: found 'laion', expected micro"),
        ("- a\n- b", "mapping"),
        ("", "mapping"),
        ("shift: [1\nmodel_name_or_path", "config"),  # not YAML
    ],
)
def test_bad_config_files(config_file, text, expected):
    with pytest.raises(InputError, match=expected):
        parse(config_file(text))


def test_config_files_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match=r"none\.yaml: found no such file"):
        parse(["--config", str(tmp_path / "none.yaml")])
    with pytest.raises(InputError, match="config"):
        parse(["--config", str(tmp_path)])
    with pytest.raises(InputError, match="config"):
        parse(["--model_name_or_path", "m", "--config"])


def test_values_of_the_wrong_type(config_file, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(config_file("model_name_or_path: m\nshift: many\n"))
    assert stop.value.code == 2 and "shift" in capsys.readouterr().err


def test_micro_previews_draw_the_same_grid(pipeline, tmp_path):
    args = FlowMatchingConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", preview_inference_steps=1, preview_guidance_scale=1.0
    )
    first, again = (micro_previews(args)(pipeline, 0) for _ in range(2))
    assert first.tobytes() == again.tobytes() and len(first.getcolors(10_000_000)) > 50


def test_settings_survive_json(tmp_path):
    args = FlowMatchingConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", shift=2.0)
    assert json.loads(args.to_json_string())["shift"] == 2.0
