"""`unipic2 train grpo`: online reinforcement learning from a YAML file and flags."""

import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from diffusers import AutoencoderTiny

from ..core.errors import InputError
from .adapters import load_lora
from .data.buckets import aspect_buckets
from .data.pairs import measure_sources
from .data.prompts import PromptDataset
from .data.sources import open_source, open_sources
from .flow_grpo_config import FlowGRPOConfig
from .flow_grpo_trainer import FlowGRPOTrainer
from .hub import model_card, repository_name
from .micro.rows import MicroTasks
from .previews import micro_previews, pair_previews
from .rewards.registry import RewardArguments
from .script import (
    MICRO,
    ScriptArguments,
    check_identity,
    check_resolution,
    find_checkpoint,
    finish,
    load_pipeline,
    parse_settings,
)  # fmt: skip


@dataclass
class GRPOArguments(RewardArguments, ScriptArguments):
    """What is trained, on which prompts and edits, and what is rewarded."""

    lora_name_or_path: str | None = field(
        default=None, metadata={"help": "use_peft: folder of an exported LoRA to go on from; default a new one."}
    )
    num_prompts: int = field(default=1200, metadata={"help": "Micro world: prompts of a pass, new ones in each."})
    num_edits: int = field(default=1200, metadata={"help": "Micro world: edits of a pass, new ones in each."})

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_prompts", "num_edits"):
            if getattr(self, name) < 1:
                raise InputError(name, found=getattr(self, name), expected="at least 1")


def parse(argv: list[str]) -> tuple[GRPOArguments, FlowGRPOConfig]:
    """Read `--config FILE` and flags; flags win. Raises InputError, see `parse_settings`."""
    script_args, args = parse_settings(argv, GRPOArguments, FlowGRPOConfig, "grpo")
    check_task(script_args, args)
    return script_args, args


def check_task(script_args: GRPOArguments, args: FlowGRPOConfig) -> None:
    """Raise InputError where settings cannot be meant: no or unknown rewards, or what rewards do not train."""
    script_args.check_rewards()
    if isinstance(args.reward_weights, float | int):  # a YAML file may hold one number
        args.reward_weights = [args.reward_weights]
    count = len(script_args.reward_funcs)
    if args.reward_weights is not None and len(args.reward_weights) != count:
        found = f"{len(args.reward_weights)} for {count} rewards"
        raise InputError("reward_weights", found=found, expected="one number for each of reward_funcs")
    if script_args.lora_name_or_path is not None and not script_args.use_peft:
        raise InputError("lora_name_or_path", found="no use_peft", expected="use_peft: true")
    if args.train_text_encoder:
        raise InputError("train_text_encoder", found="true", expected="false: rewards train the transformer alone")


def load_rows(names: list[str], script_args: GRPOArguments, args: FlowGRPOConfig, pipeline, alone: bool = False):
    """Return prompts and edits to draw pictures of. All processes take part, unless one is `alone`.

    Raises:
        InputError: see `open_source` and `PromptDataset`; or the micro world for a model that is not.
    """
    if names == [MICRO]:
        if not isinstance(pipeline.vae, AutoencoderTiny):
            found, expected = type(pipeline.vae).__name__, "a micro model for dataset_name micro"
            raise InputError("model_name_or_path", found=found, expected=expected)
        return MicroTasks(script_args.num_prompts, script_args.num_edits)
    open_one = partial(open_source, needs_target=False)
    sources = open_sources(names, script_args.image_root, script_args.dataset_split, script_args, open_one=open_one)
    buckets = aspect_buckets(script_args.resolution, script_args.bucket_mode, script_args.max_aspect)
    check_resolution(pipeline, buckets)
    with nullcontext() if alone else args.main_process_first(desc="reading sizes"):
        dataset = PromptDataset(sources, buckets, script_args.max_broken, measure_sources(sources))
    if args.process_index == 0:
        sys.stderr.write(f"{dataset.summary()}\n")
    return dataset


def make_trainer(script_args: GRPOArguments, args: FlowGRPOConfig, resumed: bool) -> FlowGRPOTrainer:
    """Return the trainer of a run, with its rows, rewards and previews."""
    peft_config = script_args.peft_config()
    pipeline = load_pipeline(script_args.model_name_or_path, args, peft_config is not None)
    rows = load_rows(script_args.dataset_name, script_args, args, pipeline)
    rewards = script_args.load_rewards(args.device)
    identity = {
        "model_name_or_path": script_args.model_name_or_path,
        "dataset_name": script_args.dataset_name,
        "rows": len(rows),
        "edit_ratio": args.edit_ratio,
        "reward_funcs": script_args.reward_funcs,
        "estimator": args.estimator,
        "num_generations": args.num_generations,
    }
    check_identity(args, identity, resumed)
    previews = None
    if args.preview_steps:
        previews = micro_previews(args) if isinstance(rows, MicroTasks) else pair_previews(rows, args)
    trainer = FlowGRPOTrainer(pipeline, rewards, args, rows, previews=previews, peft_config=peft_config)
    if script_args.lora_name_or_path is not None:
        load_lora(pipeline.transformer, script_args.lora_name_or_path)
        if trainer.ema is not None:
            trainer.ema.restart(trainer.trained_model())
    return trainer


def grpo(script_args: GRPOArguments, args: FlowGRPOConfig, callbacks=lambda trainer: ()) -> Path:
    """Train and export; returns the folder of the exported pipeline or LoRA, `output_dir/export`.

    `callbacks` is asked for further callbacks of the trainer.
    """
    output_dir, checkpoint = Path(args.output_dir), find_checkpoint(script_args, args)
    trainer = make_trainer(script_args, args, resumed=checkpoint is not None)
    for callback in callbacks(trainer):
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    steps, name = trainer.state.global_step, Path(repository_name(args, output_dir)).name
    base, data = script_args.model_name_or_path, script_args.dataset_name
    method = f"reinforcement learning ({args.estimator})"
    trainer.export(output_dir / "export", model_card(name, base, data, args, steps, script_args.use_peft, method))
    return output_dir / "export"


def main(argv: list[str]) -> int:
    """Entry of `unipic2 train grpo`."""
    script_args, args = parse(argv)
    folder = grpo(script_args, args)
    finish(folder, args)
    return 0
