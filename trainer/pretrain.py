"""`unipic2 train pretrain`: flow-matching pretraining from a YAML file and flags."""

import difflib
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import yaml
from diffusers import AutoencoderTiny
from trl import TrlParser

from ..core.errors import InputError
from ..core.files import check_replaceable
from .flow_matching_config import FlowMatchingConfig
from .flow_matching_trainer import FlowMatchingTrainer, last_checkpoint
from .kontext_pipeline import StableDiffusion3KontextPipeline
from .micro.dataset import MicroDataset
from .micro.evaluate import draw, judge
from .micro.sheet import result_sheet
from .micro.tasks import EDIT_KINDS, T2I_KINDS, sample_edit, sample_t2i


@dataclass
class PretrainArguments:
    """What is trained and on what."""

    model_name_or_path: str = field(
        default="", metadata={"help": "Folder of the pipeline to start from (published layout)."}
    )
    dataset_name: str = field(default="micro", metadata={"help": "Training data; `micro` draws the micro world."})
    num_scenes: int = field(default=12000, metadata={"help": "Micro world: text-to-image scenes in the pool."})
    num_edits: int = field(default=14000, metadata={"help": "Micro world: pairs of source and target in the pool."})
    resume: bool = field(default=False, metadata={"help": "Continue from the last checkpoint in output_dir."})


def parse(argv: list[str]) -> tuple[PretrainArguments, FlowMatchingConfig]:
    """Read `--config FILE` and flags; flags win.

    Raises:
        InputError: an unknown key, with the nearest valid names, or a value that does not fit.
    """
    _check_config_file(argv)
    parser = TrlParser((PretrainArguments, FlowMatchingConfig), prog="unipic2 train pretrain", allow_abbrev=False)
    try:
        script_args, args = parser.parse_args_and_config(argv)
    except InputError:
        raise
    except (ValueError, TypeError) as error:
        raise InputError("training settings", found=str(error), remedy=_suggest(str(error))) from None
    if not script_args.model_name_or_path:
        remedy = "`unipic2 micro make` builds a micro model from nothing."
        raise InputError("model_name_or_path", found="nothing", expected="a pipeline folder", remedy=remedy)
    if script_args.dataset_name != "micro":
        raise InputError("dataset_name", found=repr(script_args.dataset_name), expected="micro")
    return script_args, args


def _check_config_file(argv: list[str]) -> None:
    """Read the file after `--config`, if there is one, so that what is wrong with it is said in its own words."""
    if "--config" not in argv:
        return
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


def _suggest(message: str) -> str | None:
    """Return a sentence with the setting names nearest to unknown ones that a parser's message mentions."""
    known = [f.name for cls in (PretrainArguments, FlowMatchingConfig) for f in fields(cls)]
    words = [w.strip("-'\"[],:").replace("-", "_") for w in message.split() if "-" in w or "_" in w]
    hints = []
    for word in dict.fromkeys(words):
        near = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
        if word not in known and near:
            hints.append(f"Did you mean {' or '.join(near)} instead of {word}?")
    return " ".join(hints) or None


def micro_previews(args: FlowMatchingConfig, seed: int = 7):
    """Return the function that draws the fixed grid of prompts and edits during micro training."""
    rng = np.random.default_rng([seed, 8])
    t2i = [sample_t2i(rng, T2I_KINDS[i % 6])[0] for i in range(24)]
    edits = [sample_edit(rng, EDIT_KINDS[i % 6]) for i in range(12)]

    def preview(pipeline, step):
        sampling = dict(num_inference_steps=args.preview_inference_steps, guidance_scale=args.preview_guidance_scale)
        drawn = {}
        for name, tasks in (("t2i", t2i), ("edit", edits)):
            images = draw(pipeline, tasks, seed, **sampling)
            drawn[name] = (tasks, images, judge(images, tasks))
        return result_sheet(drawn)

    return preview


def pretrain(script_args: PretrainArguments, args: FlowMatchingConfig) -> Path:
    """Train and export; returns the folder of the exported pipeline, `output_dir/export`."""
    pipeline = StableDiffusion3KontextPipeline.from_pretrained(
        script_args.model_name_or_path, torch_dtype=torch.float32
    )
    if not isinstance(pipeline.vae, AutoencoderTiny):
        raise InputError(
            "model_name_or_path", found=type(pipeline.vae).__name__, expected="a micro model for dataset_name micro"
        )
    output_dir = Path(args.output_dir)
    check_replaceable(output_dir / "export")
    checkpoint = last_checkpoint(output_dir, args.use_ema) if script_args.resume else None
    if script_args.resume and checkpoint is None:
        raise InputError("resume", found=f"no checkpoint in {output_dir}", expected="checkpoint-N of a stopped run")
    dataset = MicroDataset(pipeline.vae, script_args.num_scenes, script_args.num_edits, args.seed)
    trainer = FlowMatchingTrainer(pipeline, args, dataset, previews=micro_previews(args))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.export(output_dir / "export")
    return output_dir / "export"


def main(argv: list[str]) -> int:
    """Entry of `unipic2 train pretrain`."""
    folder = pretrain(*parse(argv))
    sys.stdout.write(f"{folder}\n")
    return 0
