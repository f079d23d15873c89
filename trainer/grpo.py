"""`unipic2 train grpo`: online reinforcement learning from a YAML file and flags."""

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ..core.errors import InputError
from .adapters import load_lora
from .data.prompts import PromptDataset
from .data.sources import open_source
from .flow_grpo_config import FlowGRPOConfig
from .flow_grpo_trainer import FlowGRPOTrainer
from .micro.rows import MicroTasks
from .micro.tasks import EDIT_KINDS, T2I_KINDS
from .rewards.registry import RewardArguments
from .script import (
    MICRO,
    ScriptArguments,
    check_identity,
    check_micro,
    find_checkpoint,
    finish,
    load_pipeline,
    measured_rows,
    open_data,
    parse_settings,
    previews_of,
    train_and_export,
)


@dataclass
class GRPOArguments(RewardArguments, ScriptArguments):
    """What is trained, on which prompts and edits, and what is rewarded."""

    lora_name_or_path: str | None = field(
        default=None, metadata={"help": "use_peft: folder of an exported LoRA to go on from; default a new one."}
    )
    num_prompts: int = field(default=1200, metadata={"help": "Micro world: prompts of a pass, new ones in each."})
    num_edits: int = field(default=1200, metadata={"help": "Micro world: edits of a pass, new ones in each."})
    prompt_kinds: list[str] = field(
        default_factory=lambda: list(T2I_KINDS),
        metadata={"help": "Micro world: kinds of prompts, in turn; one that is named twice comes twice as often."},
    )
    edit_kinds: list[str] = field(
        default_factory=lambda: list(EDIT_KINDS), metadata={"help": "Micro world: kinds of edits, likewise."}
    )

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
    if script_args.use_peft and script_args.lora_dropout:
        expected = "0: pictures are drawn without it, and what is learned is compared with that"
        raise InputError("lora_dropout", found=script_args.lora_dropout, expected=expected)


def load_rows(names: list[str], script_args: GRPOArguments, args: FlowGRPOConfig, pipeline, alone: bool = False):
    """Return prompts and edits to draw pictures of. All processes take part, unless one is `alone`.

    Raises:
        InputError: see `open_source` and `PromptDataset`; or the micro world for a model that is not.
    """
    if names == [MICRO]:
        check_micro(pipeline)
        counts = script_args.num_prompts, script_args.num_edits
        return MicroTasks(*counts, script_args.prompt_kinds, script_args.edit_kinds, script_args.same_color_edits)
    sources, buckets = open_data(names, script_args, pipeline, partial(open_source, needs_target=False))
    return measured_rows(PromptDataset, sources, buckets, script_args.max_broken, args, alone=alone)


def _check_tasks(is_edit: list[bool], args: FlowGRPOConfig) -> None:
    """Say that rows lack a task that `edit_ratio` wants. Raises InputError where it wants nothing else."""
    for task, share, found in (
        ("edits", args.edit_ratio, any(is_edit)),
        ("prompts without a picture", 1 - args.edit_ratio, not all(is_edit)),
    ):
        if found or not share:
            continue
        if share == 1:
            remedy = "Change edit_ratio, or name the column of the pictures that edits start from: --source_column."
            raise InputError("edit_ratio", found=f"{args.edit_ratio}, and no {task} in the data", remedy=remedy)
        if args.process_index == 0:
            sys.stderr.write(f"no {task} in the data, so edit_ratio {args.edit_ratio} has no effect\n")


def check_columns(rewards: list, rows) -> None:
    """Raise InputError where a row of one's own data says what a reward cannot use: better now than in a night."""
    if isinstance(rows, PromptDataset):
        for reward in rewards:
            for name in reward.columns if hasattr(reward, "check_column") else ():
                reward.check_column(name, rows.values(name))


def make_trainer(script_args: GRPOArguments, args: FlowGRPOConfig, resumed: bool) -> FlowGRPOTrainer:
    """Return the trainer of a run, with its rows, rewards and previews."""
    peft_config = script_args.peft_config()
    pipeline = load_pipeline(script_args, args, peft_config is not None)
    rows = load_rows(script_args.dataset_name, script_args, args, pipeline)
    _check_tasks(rows.is_edit, args)
    rewards = script_args.load_rewards(args.device)
    check_columns(rewards, rows)
    identity = {
        "model_name_or_path": script_args.model_name_or_path,
        "vlm_name_or_path": script_args.vlm_name_or_path,
        "dataset_name": script_args.dataset_name,
        "rows": len(rows),
        "edit_ratio": args.edit_ratio,
        "kinds": [script_args.prompt_kinds, script_args.edit_kinds],
        "same_color_edits": script_args.same_color_edits,
        "reward_funcs": script_args.reward_funcs,
        "estimator": args.estimator,
        "old_policy": args.old_policy,
        "nft_beta": args.nft_beta,
        "beta": args.beta,
        "num_generations": args.num_generations,
        "steps_per_generation": args.steps_per_generation,
        "num_iterations": args.num_iterations,
    }
    check_identity(args, identity, resumed)
    previews = previews_of(script_args, args, rows)
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
    checkpoint = find_checkpoint(script_args, args)
    trainer = make_trainer(script_args, args, resumed=checkpoint is not None)
    for callback in callbacks(trainer):
        trainer.add_callback(callback)
    return train_and_export(trainer, script_args, args, checkpoint, f"reinforcement learning ({args.estimator})")


def main(argv: list[str]) -> int:
    """Entry of `unipic2 train grpo`."""
    script_args, args = parse(argv)
    finish(grpo(script_args, args), args)
    return 0
