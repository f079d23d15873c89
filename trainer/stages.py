"""Training in stages, such as growing resolution: a list in one YAML, run one after another.

Each stage is a run of its own in `output_dir/stage-N`, with the settings of the file and on top of them its own. It
starts from the weights that the stage before exported (in float32, so that nothing is lost in between), and has other
draws (`data_seed`). What the last one exports is the result, in `output_dir/export`.
"""

import gc
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import yaml

from ..core.errors import InputError
from ..core.files import COMFYUI_LORA, PIPELINE_INDEX, check_replaceable, replaced_folder, write_file

_KEY = "stages"
_FOLDER = "stage-"
_SETTINGS = "settings.json"
_CHANGES_NO_WEIGHTS = (
    "dataloader_num_workers", "dataloader_persistent_workers", "dataloader_pin_memory", "dataloader_prefetch_factor",
    "disable_tqdm", "eval_", "hub_", "judge_concurrency", "judge_max_retries", "judge_timeout", "local_rank", "log_",
    "logging_", "output_dir", "preview_", "project", "push_to_hub", "report_to", "resume", "run_name", "save_",
    "trackio_",
)  # fmt: skip
"""How settings begin that a finished stage need not have in common with what is asked now."""
_STARTS = ("model_name_or_path", "lora_name_or_path")
_OF_THE_RUN = ("model_name_or_path", "output_dir", "resume", "export_dtype", "use_peft", "seed", _KEY)
"""Settings that belong to the whole run."""


def read_config(argv: list[str]) -> dict:
    """Return the content of the file after `--config`, {} where there is no such flag.

    Raises:
        InputError: no file name, no such file, or no mapping in YAML.
    """
    if "--config" not in argv:
        return {}
    name = (argv[argv.index("--config") + 1 :] or [""])[0]
    if not name or name.startswith("--"):
        raise InputError("--config", found="no file name after it", expected="a YAML file")
    expected = "a mapping in YAML, such as `learning_rate: 1.0e-4`"
    try:
        content = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"config {name}", found="no such file", expected=expected) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        found = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise InputError(f"config {name}", found=found, expected=expected) from None
    if not isinstance(content, dict):
        raise InputError(f"config {name}", found=f"{type(content).__name__}", expected=expected)
    return content


def parse_stages(
    argv: list[str],
    parse,
    of_the_run: tuple[str, ...] = (),
    lora_goes_on: bool = False,
    default: list[dict] | None = None,
) -> list[tuple] | None:
    """Parse all stages of the config file, or of the `default`; return None where there are none.

    Args:
        argv: flags of the whole run, mostly with `--config FILE`.
        parse: reads flags, see `pretrain.parse`.
        of_the_run: further settings that belong to the whole run.
        lora_goes_on: whether under `use_peft` a stage can start from the LoRA of the stage before.
        default: what each stage sets where the file has no stages.

    Returns:
        What `parse` says of each stage.

    Raises:
        InputError: from `parse`; `stages` is no list of mappings, or a stage sets what belongs to the whole run.
    """
    common = read_config(argv)
    if default is None and _KEY not in common:
        return None
    stages = common.pop(_KEY, default)
    _check(stages, (*_OF_THE_RUN, *of_the_run))
    argv = argv if "--config" in argv else [*argv, "--config", ""]
    place = argv.index("--config") + 1
    output_dir, parsed = None, []
    with tempfile.TemporaryDirectory() as folder:
        for number, stage in enumerate(stages):
            path = Path(folder) / f"stage-{number + 1}.yaml"
            path.write_text(yaml.safe_dump({**common, **stage}), encoding="utf-8")
            flags = [*argv[:place], str(path), *argv[place + 1 :]]
            try:
                script_args, whole = parse(flags)
                if script_args.use_peft and not lora_goes_on:
                    remedy = "Train the LoRA in one run at the last resolution."
                    expected = "training of full weights in stages"
                    raise InputError("use_peft", found="true", expected=expected, remedy=remedy)
                output_dir = output_dir or Path(whole.output_dir)
                flags += ["--output_dir", str(output_dir / f"{_FOLDER}{number + 1}")]
                if number:
                    start = "--lora_name_or_path" if script_args.use_peft else "--model_name_or_path"
                    flags += [start, str(output_dir / f"{_FOLDER}{number}" / "export")]
                if number and whole.data_seed is None:  # else each stage would begin with the same samples and noise
                    flags += ["--data_seed", str(whole.seed + number)]
                if number + 1 < len(stages):
                    flags += ["--export_dtype", "float32"]
                if whole.push_to_hub and whole.hub_model_id is None:
                    flags += ["--hub_model_id", output_dir.resolve().name]
                parsed.append(parse(flags))
            except InputError as error:
                raise InputError(f"{_KEY}[{number}]: {str(error).rstrip('.')}") from None
    return parsed


def is_earlier_stage(model: Path, output_dir: str | Path) -> bool:
    """Return whether a model is what another stage of the same run exported; `output_dir` is this stage's."""
    output_dir = Path(output_dir).resolve()
    return output_dir.name.startswith(_FOLDER) and model.resolve().parent.parent == output_dir.parent


def _check(stages: object, of_the_run: tuple[str, ...]) -> None:
    if not isinstance(stages, list) or not stages or not all(isinstance(s, dict) and s for s in stages):
        expected = "a list of mappings, such as [{resolution: 256, max_steps: 900}, {resolution: 512, max_steps: 300}]"
        raise InputError(_KEY, found=repr(stages), expected=expected)
    for number, stage in enumerate(stages):
        wrong = [key for key in stage if key in of_the_run]
        if wrong:
            remedy = "Set it once for the whole run."
            raise InputError(f"{_KEY}[{number}]", found=", ".join(wrong), expected="other settings", remedy=remedy)


def run_stages(parsed: list[tuple], run, after=lambda number, folder: None) -> Path:
    """Run all stages; one that is done is passed over under `resume`, and which of its settings were others is said.

    Args:
        parsed: from `parse_stages`.
        run: trains and exports one stage, see `pretrain.pretrain`.
        after: called after each stage, done before or now, with its number (from 1) and the folder of its export.

    Returns:
        The folder of the exported pipeline.

    Raises:
        InputError: from `run`, and where `output_dir/export` holds something else.
    """
    export = Path(parsed[0][1].output_dir).parent / "export"
    check_replaceable(export)
    for number, (script_args, args) in enumerate(parsed, start=1):
        last = Path(args.output_dir) / "export"
        settings = json.loads(json.dumps(args.to_dict() | vars(script_args), default=str))  # without tokens
        if number > 1:  # these are of the stage before, wherever the run's folder is
            settings = {name: value for name, value in settings.items() if name not in _STARTS}
        if script_args.resume and any((last / name).is_file() for name in (PIPELINE_INDEX, COMFYUI_LORA)):
            others = _other_settings(last.parent, settings)
            sys.stderr.write(f"[stage {number} of {len(parsed)}] done before{others}\n")
        else:
            sys.stderr.write(f"[stage {number} of {len(parsed)}] starts\n")
            gc.collect()  # the trainer of the stage before, which refers to itself
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            run(script_args, args)
            if args.process_index == 0:
                write_file(last.parent / _SETTINGS, json.dumps(settings, indent=2) + "\n")
        after(number, last)
    if parsed[-1][1].process_index == 0:
        with replaced_folder(export) as unfinished:
            shutil.copytree(last, unfinished, copy_function=_linked)
    return export


def _other_settings(folder: Path, settings: dict) -> str:
    """Return in words which settings of a finished stage are others than now, "" where there are none."""
    path = folder / _SETTINGS
    if not path.is_file():
        return ""
    kept = json.loads(path.read_text(encoding="utf-8"))
    changed = [
        f"{name} {kept[name]} (now {settings[name]})"
        for name in sorted(kept.keys() & settings.keys())  # another version has others
        if kept[name] != settings[name] and not name.startswith(_CHANGES_NO_WEIGHTS)
    ]
    return f", with {', '.join(changed)}; to train it anew delete {folder} and later stages" if changed else ""


def _linked(source: str, target: str) -> str:
    """Give a file a second name, or copy it where that cannot be: files of ours are replaced, never changed."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
