"""Settings of `unipic2 train pretrain`: YAML, flags, and what is said about wrong ones."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from unipic2.core.checkpoint import read_header
from unipic2.core.errors import InputError
from unipic2.trainer import FlowMatchingConfig, FlowMatchingTrainer, StableDiffusion3KontextPipeline
from unipic2.trainer.cli import main
from unipic2.trainer.pretrain import load_dataset, parse, pretrain
from unipic2.trainer.previews import micro_previews, pair_previews


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("timestep_sampling", "logitnormal", "expected one of logit_normal, uniform"),
        ("export_dtype", "fp16", "expected one of float32, float16, bfloat16"),
        ("save_only_model", True, "expected false, or no run can go on"),
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
    assert isinstance(args, FlowMatchingConfig) and script_args.dataset_name == ["micro"]


def test_the_shipped_config_parses(config_file):
    from unipic2.trainer import pretrain

    path = pretrain.Path(pretrain.__file__).parent / "configs" / "pretrain_micro.yaml"
    argv = config_file("")
    _, args = parse(["--config", str(path), *argv[2:], "--model_name_or_path", "m"])
    assert args.max_steps > 0 and args.train_text_encoder and args.edit_ratio == 0.5


@pytest.mark.parametrize("name", ["pretrain_sd35m_lora", "pretrain_sd35m_full"])
def test_the_configs_for_published_checkpoints_parse(name, tmp_path, monkeypatch):
    """Up to the data, which they leave to the user."""
    from unipic2.trainer import pretrain

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        pretrain, "load_pipeline", lambda given, args, lora, **options: (given.model_name_or_path, args, lora)
    )
    reached = []
    monkeypatch.setattr(pretrain, "load_dataset", lambda *given: reached.append(given) or 1 / 0)
    path = pretrain.Path(pretrain.__file__).parent / "configs" / f"{name}.yaml"
    with pytest.raises(ZeroDivisionError):
        pretrain.main(["--config", str(path), "--use_cpu"])
    script_args, args, (model, _, lora) = reached[0]
    full = "stabilityai/stable-diffusion-3.5-medium"  # the paper's first stage
    assert model == ("Skywork/UniPic2-SD3.5M-Kontext-2B" if lora else full) and lora == name.endswith("lora")
    assert args.bf16 and args.gradient_checkpointing and script_args.cache_dtype == "bfloat16"


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
        ("edit_ratio: [1, 2]\nmodel_name_or_path: m", r"edit_ratio: found \[1, 2\], expected a number"),
        ("shift: 3.0", "model_name_or_path: found nothing"),
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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("shift: many", "training settings: found argument --shift: invalid float value: 'many'. See `unipic2 train"),
        ("max_steps: 1e3", "training settings: found argument --max_steps.*: invalid int value: '1e3'"),
        ("max_steps: 12.0", "max_steps: found 12.0, expected a whole number"),
        ("max_steps: true", "max_steps: found true, expected a whole number"),
        ("learning_rate: null", "learning_rate: found null, expected a number"),
        ("learning_rate: [1, 2]", r"learning_rate: found \[1, 2\], expected a number"),
        ("use_cpu: 2", "use_cpu: found 2, expected true or false"),
        ("dataset_name: null", "dataset_name: found null, expected words"),
        ("dataset_name: 5", "dataset_name: found 5, expected words"),
        ("export_dtype: null", "export_dtype: found null, expected a word"),
    ],
)
def test_values_of_the_wrong_type(config_file, capsys, text, said):
    """One line says it, not the usage of all settings."""
    with pytest.raises(InputError, match=said):
        parse(config_file(f"model_name_or_path: m\n{text}\n"))
    assert "usage" not in capsys.readouterr().err


def test_values_of_types_that_fit(config_file, tmp_path):
    text = f"model_name_or_path: m\noutput_dir: {tmp_path}\nlearning_rate: 1e-4\nmax_grad_norm: 1\nseed: 3\nuse_cpu: 1"
    _, args = parse(config_file(text + "\ndata_seed: null\nmax_steps: '5'\n"))
    assert (args.learning_rate, args.max_grad_norm, args.seed, args.data_seed, args.max_steps) == (1e-4, 1, 3, None, 5)


def test_micro_previews_draw_the_same_grid(pipeline, tmp_path):
    args = FlowMatchingConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", preview_inference_steps=1, preview_guidance_scale=1.0
    )
    first, again = (micro_previews(args)(pipeline, 0) for _ in range(2))
    assert first.tobytes() == again.tobytes() and len(first.getcolors(10_000_000)) > 50


def test_settings_survive_json(tmp_path):
    args = FlowMatchingConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", shift=2.0)
    assert json.loads(args.to_json_string())["shift"] == 2.0


@pytest.fixture
def pairs(tmp_path):
    """Return a jsonl of edits and one of pictures, in two shapes."""
    rng = np.random.default_rng(0)
    edits, pictures = [], []
    for i in range(8):
        size = (64, 96, 3) if i % 2 else (64, 64, 3)
        for kind in "abc":
            Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(tmp_path / f"{kind}{i}.png")
        edits.append({"instruction": "make the red circle blue", "src_img": f"a{i}.png", "edited_img": f"b{i}.png"})
        pictures.append({"caption": "two squares", "image": f"c{i}.png"})
    for name, rows in (("edits", edits), ("pictures", pictures)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return [str(tmp_path / "edits.jsonl"), str(tmp_path / "pictures.jsonl")]


def run(tmp_path, make_small_pipeline, pairs, *flags):
    model = tmp_path / "model"
    if not model.exists():
        make_small_pipeline().save_pretrained(model)
    argv = ["--model_name_or_path", str(model), "--dataset_name", *pairs, "--output_dir", str(tmp_path / "run")]
    argv += "--use_cpu --resolution 64 --max_steps 4 --per_device_train_batch_size 2 --learning_rate 1e-2".split()
    argv += "--report_to none --logging_steps 1 --disable_tqdm true --preview_inference_steps 1".split()
    return model, pretrain(*parse([*argv, *flags]))


def test_training_on_pictures_of_ones_own(tmp_path, make_small_pipeline, pairs):
    """Edits and pictures from two files in two sizes, masks off: the transformer moves, all else stays."""
    model, export = run(tmp_path, make_small_pipeline, pairs, "--preview_steps", "4", "--save_strategy", "no")
    before, after = (load_file(f / "transformer/diffusion_pytorch_model.safetensors") for f in (model, export))
    assert any((before[key] - after[key].float()).abs().max() > 1e-2 for key in before)
    encoders = [load_file(f / "text_encoder/model.safetensors") for f in (model, export)]
    assert all(torch.equal(encoders[0][key], encoders[1][key]) for key in encoders[0])
    with Image.open(tmp_path / "run/previews/step_000004.png") as grid:
        assert len(grid.getcolors(10_000_000)) > 50 and grid.height > 2 * 96
    StableDiffusion3KontextPipeline.from_pretrained(export)


def test_a_lora_is_exported_resumed_and_kept_small(tmp_path, make_small_pipeline, pairs):
    flags = ["--use_peft", "--lora_r", "2", "--lora_target_modules", "attention", "ff"]
    flags += ["--save_strategy", "steps", "--save_steps", "2", "--preview_steps", "0"]
    model, export = run(tmp_path, make_small_pipeline, pairs, *flags)
    weights = sorted(p.name for p in export.iterdir() if p.suffix != ".md")
    assert weights == ["comfyui_lora.safetensors", "pytorch_lora_weights.safetensors"]
    whole = load_file(export / "comfyui_lora.safetensors")
    assert any(whole[key].abs().max() > 0 for key in whole if "lora_B" in key)
    said = read_header(export / "comfyui_lora.safetensors").metadata
    expected = {"format": "pt", "unipic2.method": "flow matching", "unipic2.step": "4"}
    assert said.items() >= {**expected, "unipic2.lora_r": "2", "unipic2.lora_alpha": "32"}.items()
    assert {t.dtype for t in whole.values()} == {torch.float16}, "export_dtype is the LoRA's, too"
    one = tmp_path / "merged.safetensors"
    assert main(["export", "--model", str(model), "--lora", str(export), "--out", str(one)]) == 0
    merged, base, layer = (
        load_file(one),
        load_file(model / "transformer/diffusion_pytorch_model.safetensors"),
        "transformer_blocks.0.attn.to_q",
    )
    up, down = (whole[f"transformer.{layer}.lora_{part}.weight"].float() for part in "BA")
    expected = base[f"{layer}.weight"].float() + 32 / 2 * up @ down
    assert merged.keys() == base.keys() and merged[f"{layer}.weight"].dtype == base[f"{layer}.weight"].dtype
    torch.testing.assert_close(merged[f"{layer}.weight"].float(), expected, atol=2e-3, rtol=1e-2)
    changed = {key for key in base if not torch.equal(merged[key], base[key])}
    assert changed and all(".attn" in key or ".ff" in key for key in changed)
    assert read_header(one).metadata["unipic2.method"] == "flow matching"
    with pytest.raises(InputError, match="--lora .*nothing.safetensors: found no such file"):
        main(["export", "--model", str(model), "--lora", str(tmp_path / "nothing.safetensors"), "--out", str(one)])
    with pytest.raises(InputError, match="--lora .*comfyui_lora.safetensors: found Invalid LoRA"):
        main(["export", "--model", str(model), "--lora", str(export / "comfyui_lora.safetensors"), "--out", str(one)])
    saved = load_file(tmp_path / "run/checkpoint-4/model.safetensors")
    assert saved and all("lora_" in key for key in saved)
    for name in ("checkpoint-4", "export"):
        (tmp_path / "run" / name).rename(tmp_path / f"first-{name}")
    run(tmp_path, make_small_pipeline, pairs, *flags, "--resume")
    again = load_file(export / "comfyui_lora.safetensors")
    assert all((whole[key] == again[key]).all() for key in whole)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--dataset_name", "micro", "more.jsonl"], "dataset_name: found micro, more.jsonl, expected micro alone"),
        (["--dataset_name", "gone.jsonl"], "dataset gone.jsonl: found no such file"),
        (["--resolution", "100"], "resolution: found 100, expected a multiple of 32"),
        (["--use_peft", "--lora_r", "0"], "lora_r: found 0"),
        (["--use_peft", "--lora_target_modules", "to_z"], "lora_target_modules: found 'to_z'"),
        (["--use_peft", "--trainable", "attention"], "use_peft: found trainable: attention too, expected LoRAs alone"),
        (["--use_peft", "--train_text_encoder"], "use_peft: found train_text_encoder too"),
        (["--resolution", "512"], "resolution: found buckets of up to 672 pixels, expected at most 192"),
        (["--max_broken", "-1"], "max_broken: found -1.0, expected a share from 0 to 1"),
        (["--same_color_edits", "1.5"], "same_color_edits: found 1.5, expected a share from 0 to 1"),
        (["--trainable", "head"], "trainable: found 'head', expected one of full, attention"),
    ],
)
def test_what_cannot_be_trained(tmp_path, make_small_pipeline, pairs, flags, said):
    with pytest.raises(InputError, match=said):
        run(tmp_path, make_small_pipeline, pairs, *flags)


def test_a_run_is_not_mixed_up_with_another(tmp_path, make_small_pipeline, pairs):
    flags = ["--preview_steps", "0", "--save_strategy", "steps", "--save_steps", "2"]
    run(tmp_path, make_small_pipeline, pairs, *flags)
    with pytest.raises(InputError, match="output_dir .*: found checkpoints of an earlier run.*resume: true"):
        run(tmp_path, make_small_pipeline, pairs, *flags)
    with pytest.raises(InputError, match="seed of a resumed run: found 9, expected 42"):
        run(tmp_path, make_small_pipeline, pairs, *flags, "--resume", "--seed", "9")
    with pytest.raises(InputError, match="rows of a resumed run|dataset_name of a resumed run"):
        run(tmp_path, make_small_pipeline, pairs[:1], *flags, "--resume")
    with pytest.raises(InputError, match="found other weights than those that are trained now"):
        run(tmp_path, make_small_pipeline, pairs, *flags, "--resume", "--trainable", "attention", "--max_steps", "6")
    run(tmp_path, make_small_pipeline, pairs, *flags, "--resume", "--max_steps", "6")


@pytest.mark.parametrize("first", ["true", "false"])
def test_a_run_with_an_average_is_not_mixed_up_with_one_without(tmp_path, make_small_pipeline, pairs, first):
    flags = ["--preview_steps", "0", "--save_strategy", "steps", "--save_steps", "2", "--use_ema"]
    other = {"true": "false", "false": "true"}[first]
    run(tmp_path, make_small_pipeline, pairs, *flags, first)
    kept = sorted(path.name for path in (tmp_path / "run").iterdir())
    with pytest.raises(InputError, match="checkpoints of an earlier run"):
        run(tmp_path, make_small_pipeline, pairs, *flags, other)
    with pytest.raises(InputError, match=f"use_ema of a resumed run: found {other.title()}, expected {first.title()}"):
        run(tmp_path, make_small_pipeline, pairs, *flags, other, "--resume", "--max_steps", "6")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == kept


def test_an_export_says_how_it_was_made(tmp_path, make_small_pipeline, pairs, capsys):
    flags = ["--preview_steps", "0", "--save_strategy", "no", "--shift", "1.5", "--max_broken", "0.125"]
    _, export = run(tmp_path, make_small_pipeline, pairs, *flags)
    found = read_header(export / "transformer/diffusion_pytorch_model.safetensors").metadata
    assert (found["unipic2.method"], found["unipic2.step"], found["unipic2.shift"]) == ("flow matching", "4", "1.5")
    assert set(json.loads(found["unipic2.metrics"])) == {"loss", "loss/t2i", "loss/edit"}
    assert len(found["unipic2.config_sha256"]) == 64 and str(tmp_path) not in str(found)
    page = (export.parent / "report.html").read_text()
    assert "max_broken<td>0.125" in page and "edits.jsonl" in page and "Picture tokens per second" in page
    capsys.readouterr()
    assert main(["export", "--model", str(export), "--out", str(tmp_path / "one.safetensors")]) == 0
    assert "trained with shift 1.5: put ModelSamplingSD3" in capsys.readouterr().err
    one = read_header(tmp_path / "one.safetensors").metadata
    assert {name: one[name] for name in found} == found and "unipic2.format" in one


def test_an_export_says_that_its_shift_is_by_size(tmp_path, make_small_pipeline, pairs, capsys):
    flags = ["--preview_steps", "0", "--save_strategy", "no", "--dynamic_shift", "--use_peft"]
    _, export = run(tmp_path, make_small_pipeline, pairs, *flags)
    found = read_header(export / "comfyui_lora.safetensors").metadata
    assert json.loads(found["unipic2.dynamic_shift"]) == {"base_shift": 0.5, "max_shift": 1.16}
    assert "unipic2.shift" not in found


def test_pictures_that_break_late_are_counted_in_the_main_process(tmp_path, make_small_pipeline, pairs, capfd):
    for i in range(3):
        path = tmp_path / f"c{i}.png"
        path.write_bytes(path.read_bytes()[:300])
    flags = ["--preview_steps", "0", "--save_strategy", "no", "--dataloader_num_workers", "1", "--max_steps", "12"]
    with pytest.raises(InputError, match="training data: found 2 broken rows of 16"):
        run(tmp_path, make_small_pipeline, pairs, *flags, "--max_broken", "0.1")
    assert capfd.readouterr().err.count("left out row") == 2


def test_previews_of_mixed_types(tmp_path, make_small_pipeline, pairs):
    """As on a GPU under bf16: frozen parts in bfloat16, the trained transformer in float32."""
    pipe = make_small_pipeline()
    argv = ["--model_name_or_path", "m", "--dataset_name", *pairs, "--output_dir", str(tmp_path / "run"), "--use_cpu"]
    argv += ["--resolution", "64", "--max_steps", "2", "--preview_steps", "2", "--preview_inference_steps", "1"]
    argv += ["--bf16", "--report_to", "none", "--save_strategy", "no", "--per_device_train_batch_size", "2"]
    script_args, args = parse(argv)
    dataset = load_dataset(script_args, args, pipe)
    pipe.vae.to(torch.bfloat16)
    pipe.text_encoder.to(torch.bfloat16)
    FlowMatchingTrainer(pipe, args, dataset, previews=pair_previews(dataset, args)).train()
    assert (tmp_path / "run/previews/step_000002.png").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--eval_strategy steps --eval_steps 5", "eval_strategy: found steps, expected no. `unipic2 eval`"),
        (
            "--save_strategy best --metric_for_best_model loss",
            "save_strategy: found best, expected steps, epoch or no",
        ),
        ("--resume_from_checkpoint c", "resume_from_checkpoint: found c.*Take `resume: true`"),
    ],
)
def test_what_transformers_would_take_and_do_otherwise_is_refused(config_file, flags, message):
    with pytest.raises(InputError, match=message):
        parse([*config_file("model_name_or_path: m\n"), *flags.split()])


def test_one_process_takes_one_gpu(config_file):
    """A judge may have the other, and transformers would spread the model over both without bf16."""
    args = parse(config_file("model_name_or_path: m\nper_device_train_batch_size: 3\n"))[1]
    args._n_gpu = 4
    assert args.n_gpu == 1 and args.train_batch_size == 3


def test_the_micro_world_is_known_by_its_whole_name(config_file):
    argv = config_file("model_name_or_path: m\ndataset_name: /data/microscopy\ncache_dir: c\n")
    assert parse(argv)[0].dataset_name == ["/data/microscopy"]
    with pytest.raises(InputError, match="cache_dir: found dataset_name micro too"):
        parse([*argv, "--dataset_name", "micro"])
