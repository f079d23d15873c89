"""`unipic2 train metaquery`: the connector between Qwen2.5-VL and the transformer, from a YAML file and flags."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..core.connector import StableDiffusion3Conditioner
from ..core.errors import InputError
from .kontext_pipeline import StableDiffusion3KontextPipeline
from .metaquery_config import MetaQueryConfig
from .metaquery_pipeline import (
    PUBLISHED_VLM,
    VLM_PARTS,
    MetaQueryPipeline,
    is_metaquery,
    load_unconditioned,
    load_vlm,
    vlm_folder,
)
from .metaquery_trainer import MetaQueryTrainer
from .pretrain import PretrainArguments, fill_cache, identity_of, load_dataset
from .query_states import token_ids
from .script import (
    TEXT_ENCODERS,
    check_identity,
    find_checkpoint,
    parse_settings,
    previews_of,
    run_command,
    train_and_export,
)
from .stages import is_earlier_stage, parse_stages

PUBLISHED_SIZES = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 24}
PUBLISHED_QUERIES = 256
_METHOD = "MetaQuery"


@dataclass
class MetaQueryArguments(PretrainArguments):
    """What is trained and on what. `model_name_or_path` may be a MetaQuery model, or one that gets a new connector."""

    cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for latents, encoded once before training, by the first process. Texts are not in it, and "
            "sources of edits are read from the data, as Qwen2.5-VL sees them. None encodes beside training."
        },
    )
    num_queries: int | None = field(
        default=None, metadata={"help": "New connector: learned queries, one text token each; default 256."}
    )
    connector_hidden_size: int | None = field(
        default=None, metadata={"help": "New connector: its width; default 1536."}
    )
    connector_intermediate_size: int | None = field(
        default=None, metadata={"help": "New connector: width inside its MLPs; default 8960."}
    )
    connector_num_hidden_layers: int | None = field(
        default=None, metadata={"help": "New connector: its layers; default 24."}
    )
    connector_num_attention_heads: int | None = field(
        default=None,
        metadata={"help": "New connector: heads, default 64 wide, as ComfyUI takes them in files without config."},
    )
    teacher_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "For distillation_weight: a UniPic2 with text encoders, which stays as it is. None is "
            "model_name_or_path, whose transformer is its own teacher while it is frozen (trainable none)."
        },
    )
    query_init_text: str | None = field(
        default=None,
        metadata={
            "help": "New connector: words whose embeddings the queries begin with, again and again until there are "
            "enough (PEFT's prompt_tuning_init_text); None begins with noise. Best what Qwen2.5-VL would answer with."
        },
    )
    export_vlm: bool = field(
        default=False,
        metadata={"help": "Write Qwen2.5-VL into the export too, for small ones that nobody else has."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.use_peft:
            remedy = "Train the connector first; a LoRA of its transformer by `unipic2 train grpo` or `pdtr`."
            raise InputError("use_peft", found="true", expected="false for MetaQuery", remedy=remedy)


def parse(argv: list[str]) -> tuple[MetaQueryArguments, MetaQueryConfig]:
    """Read `--config FILE` and flags; flags win. Raises InputError, see `parse_settings`."""
    return parse_settings(argv, MetaQueryArguments, MetaQueryConfig, "metaquery")


def _frozen_dtype(args: MetaQueryConfig) -> torch.dtype:
    return torch.bfloat16 if args.bf16 and args.device.type == "cuda" else torch.float32


def load_metaquery(script_args: MetaQueryArguments, args: MetaQueryConfig) -> MetaQueryPipeline:
    """Load a MetaQuery model, or put a new connector between Qwen2.5-VL and another model's transformer.

    Frozen parts come in bfloat16 under `bf16` on a GPU; what is trained, and a Qwen2.5-VL to export, in float32.

    Raises:
        InputError: see `MetaQueryPipeline.from_pretrained` and `StableDiffusion3Conditioner`.
    """
    frozen = _frozen_dtype(args)
    transformer = frozen if args.trainable == "none" else torch.float32
    vlm = torch.float32 if script_args.export_vlm else frozen
    types = {"default": frozen, "transformer": transformer, "conditioner": torch.float32, "text_encoder": vlm}
    # A hub's text encoders are not needed, whatever the model is.
    absent = dict.fromkeys(TEXT_ENCODERS[1:])
    folder = StableDiffusion3KontextPipeline.find_folder(script_args.model_name_or_path, absent)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    given = {name: getattr(script_args, f"connector_{name}") for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    if is_metaquery(folder):
        pipeline = MetaQueryPipeline.from_pretrained(folder, script_args.vlm_name_or_path, torch_dtype=types)
        _check_sizes(pipeline.conditioner.config, script_args.num_queries, given)
        begun = is_earlier_stage(folder, args.output_dir)  # with the words
        if script_args.query_init_text is not None and args.process_index == 0 and not begun:
            sys.stderr.write(f"query_init_text: no effect, as {folder} has a connector with queries of its own\n")
    else:
        base = StableDiffusion3KontextPipeline.from_pretrained(
            folder, torch_dtype=types, **dict.fromkeys(TEXT_ENCODERS)
        )
        parts = load_vlm(vlm_folder(None, script_args.vlm_name_or_path), vlm)
        sizes = {**PUBLISHED_SIZES, **given}
        sizes.setdefault("num_attention_heads", max(1, sizes["hidden_size"] // 64))
        conditioner = StableDiffusion3Conditioner(
            sizes,
            num_queries=script_args.num_queries or PUBLISHED_QUERIES,
            llm_hidden_size=parts["text_encoder"].config.text_config.hidden_size,
            pooled_projection_dim=base.transformer.config.pooled_projection_dim,
            joint_attention_dim=base.transformer.config.joint_attention_dim,
        ).initialize(args.seed)
        if script_args.query_init_text is not None:
            begin_with(conditioner, script_args.query_init_text, **parts)
        pipeline = MetaQueryPipeline(base.transformer, base.scheduler, base.vae, conditioner=conditioner, **parts)
        pipeline.loaded_from, pipeline.given = folder, frozenset({*VLM_PARTS, "conditioner"})
        pipeline.vlm_name = script_args.vlm_name_or_path or PUBLISHED_VLM
    pipeline.writes_vlm = script_args.export_vlm
    return pipeline


def load_teacher(script_args: MetaQueryArguments, args: MetaQueryConfig, pipeline: MetaQueryPipeline):
    """Return the pipeline to learn from, with its text encoders, None if there is no `distillation_weight`.

    Raises:
        InputError: it has none, as it is a MetaQuery model; or its transformer is the one that is trained.
    """
    if not args.distillation_weight:
        return None
    name, shared = script_args.teacher_name_or_path, {}
    if name is None:
        name, shared = script_args.model_name_or_path, {"transformer": pipeline.transformer, "vae": pipeline.vae}
    folder = StableDiffusion3KontextPipeline.find_folder(name)
    if is_metaquery(folder):
        found, expected = f"{name}, a MetaQuery model", "a UniPic2 with text encoders"
        raise InputError("teacher_name_or_path", found=found, expected=expected)
    if shared and args.trainable != "none":
        expected = "a UniPic2 with text encoders, which stays as it is"
        raise InputError("teacher_name_or_path", found=f"none, with trainable {args.trainable}", expected=expected)
    teacher = StableDiffusion3KontextPipeline.from_pretrained(folder, torch_dtype=_frozen_dtype(args), **shared)
    teacher.transformer.requires_grad_(False)
    return teacher


@torch.no_grad()
def begin_with(conditioner: StableDiffusion3Conditioner, text: str, text_encoder, tokenizer) -> None:
    """Set the queries to the embeddings of a text's tokens, in turn until there are enough (arXiv 2104.08691).

    Raises:
        InputError: the text has no tokens.
    """
    ids = token_ids(tokenizer, [text])
    if not ids:
        raise InputError("query_init_text", found=repr(text), expected="words, or null for noise")
    turns = torch.arange(conditioner.num_queries) % len(ids)
    embeddings = text_encoder.get_input_embeddings().weight
    conditioner.meta_queries.copy_(embeddings[torch.tensor(ids)[turns].to(embeddings.device)])


def _check_sizes(config: dict, num_queries: int | None, given: dict[str, int]) -> None:
    """Raise InputError where sizes of a new connector are given for a model that has one, of other sizes."""
    real = {"num_queries": config["num_queries"], **config["connector_config"]}
    for name, value in {"num_queries": num_queries, **given}.items():
        if value not in (None, real[name]):
            setting = name if name == "num_queries" else f"connector_{name}"
            raise InputError(setting, found=value, expected=f"{real[name]}, as the model's connector has, or nothing")


def metaquery(script_args: MetaQueryArguments, args: MetaQueryConfig) -> Path:
    """Train and export; returns the folder of the exported pipeline, `output_dir/export`."""
    checkpoint = find_checkpoint(script_args, args)
    pipeline = load_metaquery(script_args, args)
    teacher = load_teacher(script_args, args, pipeline)
    dataset = load_dataset(script_args, args, pipeline)
    identity = identity_of(script_args, args, dataset) | {
        "vlm_name_or_path": script_args.vlm_name_or_path,
        "positions": args.positions or pipeline.positions,
        "trainable": args.trainable,
        "vlm_lora_r": args.vlm_lora_r,
        "vlm_lora_alpha": args.vlm_lora_alpha,
        "distillation_weight": args.distillation_weight,
        "teacher_name_or_path": script_args.teacher_name_or_path,
    }
    check_identity(args, identity, resumed=checkpoint is not None)
    previews = previews_of(script_args, args, dataset)
    trainer = MetaQueryTrainer(pipeline, args, dataset, previews, teacher=teacher)
    frozen = "the transformer frozen" if args.trainable == "none" else "with the transformer"
    return train_and_export(trainer, script_args, args, checkpoint, f"{_METHOD} ({frozen})")


def cache(argv: list[str]) -> int:
    """Entry of `unipic2 data cache metaquery`: latents alone, so Qwen2.5-VL is not loaded."""

    def load(script_args: MetaQueryArguments, args: MetaQueryConfig) -> StableDiffusion3KontextPipeline:
        absent = dict.fromkeys((*TEXT_ENCODERS, "conditioner"))
        folder = StableDiffusion3KontextPipeline.find_folder(script_args.model_name_or_path, absent)
        return load_unconditioned(folder, _frozen_dtype(args))

    return fill_cache(argv, parse, load)


def main(argv: list[str]) -> int:
    """Entry of `unipic2 train metaquery`."""
    for script_args, args in (parse_stages(argv, parse) or [])[1:]:  # now, not when the first stage is done
        if args.distillation_weight and script_args.teacher_name_or_path is None:
            expected = "a model with text encoders: a later stage begins with what the first one made, which has none"
            raise InputError("teacher_name_or_path of a later stage", found="nothing", expected=expected)
    return run_command(argv, parse, metaquery, _METHOD)
