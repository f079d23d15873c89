"""`unipic2 train pretrain`: flow-matching pretraining from a YAML file and flags."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from ..core.errors import InputError, check_one_of
from .data.cache import Cache, CachedPairs, build_cache, fingerprint, is_complete
from .data.pairs import PairDataset
from .data.sources import open_source
from .data.stream import StreamedPairs, open_stream
from .flow_matching_config import FlowMatchingConfig
from .flow_matching_trainer import FlowMatchingTrainer
from .kontext_config import EXPORT_DTYPES
from .kontext_pipeline import StableDiffusion3KontextPipeline
from .micro.dataset import MicroDataset
from .script import (
    MICRO,
    ScriptArguments,
    check_identity,
    check_micro,
    find_checkpoint,
    load_pipeline,
    measured_rows,
    open_data,
    parse_settings,
    previews_of,
    run_command,
    train_and_export,
)
from .stages import parse_stages

_METHOD = "flow matching"


@dataclass
class PretrainArguments(ScriptArguments):
    """What is trained and on what."""

    target_column: str | None = field(default=None, metadata={"help": "Column of the picture to learn."})
    mask_column: str | None = field(default=None, metadata={"help": "Column of a local edit's mask, white inside."})
    cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for latents and text states, encoded once before training (`unipic2 data cache` does it "
            "ahead); text encoders are then not even loaded. None encodes beside training."
        },
    )
    cache_dtype: str = field(
        default="float16", metadata={"help": "Type of what is cached: float32, float16 or bfloat16."}
    )
    cache_batch_size: int = field(default=8, metadata={"help": "Pictures, or texts, encoded at a time."})
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the data as it comes, without a pass over it before training; needs max_steps."},
    )
    shuffle_buffer_size: int = field(
        default=1000, metadata={"help": "streaming: rows of a task among which a batch is drawn."}
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that read picture sizes before training; default one."}
    )
    num_scenes: int = field(default=12000, metadata={"help": "Micro world: text-to-image scenes in the pool."})
    num_edits: int = field(default=14000, metadata={"help": "Micro world: pairs of source and target in the pool."})

    def __post_init__(self):
        super().__post_init__()
        check_one_of("cache_dtype", self.cache_dtype, EXPORT_DTYPES)
        if self.cache_batch_size < 1:
            raise InputError("cache_batch_size", found=self.cache_batch_size, expected="at least 1")
        if self.shuffle_buffer_size < 1:
            raise InputError("shuffle_buffer_size", found=self.shuffle_buffer_size, expected="at least 1")
        if self.cache_dir is not None and MICRO in self.dataset_name:
            remedy = "The micro world keeps its latents in memory."
            raise InputError("cache_dir", found="dataset_name micro too", expected="data of your own", remedy=remedy)
        if self.streaming and (self.cache_dir is not None or MICRO in self.dataset_name):
            found = "dataset_name micro too" if self.cache_dir is None else "cache_dir too"
            raise InputError("streaming", found=found, expected="data of your own, encoded as it comes")


def parse(argv: list[str]) -> tuple[PretrainArguments, FlowMatchingConfig]:
    """Read `--config FILE` and flags; flags win. Raises InputError, see `parse_settings`."""
    return parse_settings(argv, PretrainArguments, FlowMatchingConfig, "pretrain")


def load_dataset(
    script_args: PretrainArguments, args: FlowMatchingConfig, pipeline
) -> MicroDataset | PairDataset | CachedPairs | StreamedPairs:
    """Return the training data; under `cache_dir` it is encoded first, by the first process alone.

    Raises:
        InputError: see `open_source`, `aspect_buckets` and `PairDataset`; or the micro world for a model that is not.
    """
    if script_args.dataset_name == [MICRO]:
        check_micro(pipeline)
        counts = script_args.num_scenes, script_args.num_edits
        hard = script_args.same_color_edits
        return MicroDataset(pipeline.vae, *counts, args.seed, hard, with_sources=pipeline.sees_pictures)
    open_one = open_stream if script_args.streaming else open_source
    sources, buckets = open_data(script_args.dataset_name, script_args, pipeline, open_one)
    if args.unmasked_weight == 1:
        sources = [replace(source, columns=replace(source.columns, mask=None)) for source in sources]
    if script_args.streaming:
        pool = script_args.shuffle_buffer_size
        return StreamedPairs(sources, buckets, script_args.max_broken, pool, quiet=args.process_index > 0)
    num_proc = script_args.preprocessing_num_workers
    dataset = measured_rows(PairDataset, sources, buckets, script_args.max_broken, args, num_proc)
    if script_args.cache_dir is None:
        return dataset
    if args.train_text_encoder:
        raise InputError("cache_dir", found="train_text_encoder too", expected="frozen text encoders")
    return _cached(dataset, script_args, args, pipeline)


def _cached(dataset: PairDataset, script_args: PretrainArguments, args, pipeline) -> CachedPairs:
    """Return the rows out of the cache. Text encoders are loaded only if something has to be encoded, and let go.

    MetaQuery has its own there, and needs them in training.
    """
    folder, dtype = Path(script_args.cache_dir), getattr(torch, script_args.cache_dtype)
    digest = fingerprint(pipeline.loaded_from, dtype, pipeline.vae.dtype, texts=not pipeline.sees_pictures)
    with args.main_process_first(local=False, desc="encoding"):
        cache = Cache(folder, digest)
        if not is_complete(cache, dataset, pipeline) and args.process_index == 0:
            encoders = pipeline
            if not pipeline.sees_pictures:
                parts = {"transformer": pipeline.transformer, "vae": pipeline.vae, "torch_dtype": pipeline.vae.dtype}
                encoders = StableDiffusion3KontextPipeline.from_pretrained(pipeline.loaded_from, **parts)
            build_cache(dataset, cache, encoders, dtype, args.device, script_args.cache_batch_size)
    return CachedPairs(dataset, cache, with_sources=pipeline.sees_pictures)


def identity_of(script_args: PretrainArguments, args: FlowMatchingConfig, dataset) -> dict:
    """Return what makes a run of flow matching the run it is, for `check_identity`."""
    return {
        "model_name_or_path": script_args.model_name_or_path,
        "dataset_name": script_args.dataset_name,
        "streaming": script_args.streaming,
        "rows": None if script_args.streaming else len(dataset),
        "edit_ratio": args.edit_ratio,
        "same_color_edits": script_args.same_color_edits,
    }


def pretrain(script_args: PretrainArguments, args: FlowMatchingConfig) -> Path:
    """Train and export; returns the folder of the exported pipeline or LoRA, `output_dir/export`. `main` pushes it."""
    peft_config = script_args.peft_config()
    checkpoint = find_checkpoint(script_args, args)
    ready = script_args.cache_dir is not None
    pipeline = load_pipeline(script_args, args, peft_config is not None, text_encoders=not ready, metaquery=False)
    dataset = load_dataset(script_args, args, pipeline)
    check_identity(args, identity_of(script_args, args, dataset), resumed=checkpoint is not None)
    previews = previews_of(script_args, args, dataset)
    trainer = FlowMatchingTrainer(pipeline, args, dataset, previews=previews, peft_config=peft_config)
    return train_and_export(trainer, script_args, args, checkpoint, _METHOD)


def cache(argv: list[str]) -> int:
    """Entry of `unipic2 data cache`."""
    return fill_cache(argv, parse, partial(load_pipeline, lora=True, text_encoders=False, metaquery=False))


def fill_cache(argv: list[str], parse_run: Callable, load: Callable) -> int:
    """Encode ahead what a training run, in stages or not, would encode first.

    Args:
        argv: the run's `--config FILE` and flags.
        parse_run: makes its settings of them.
        load: makes a pipeline, whose VAE encodes, of the first stage's settings.

    Raises:
        InputError: no `cache_dir` is named; see `load_dataset`.
    """
    runs = parse_stages(argv, parse_run) or [parse_run(argv)]
    script_args, args = runs[0]
    if script_args.cache_dir is None:
        raise InputError("cache_dir", found="none", expected="a folder, and data of your own")
    pipeline = load(script_args, args)
    for script_args, args in runs:
        dataset = load_dataset(script_args, args, pipeline)
        sys.stdout.write(f"{script_args.cache_dir}: {len(dataset)} rows\n")
    return 0


def main(argv: list[str]) -> int:
    """Entry of `unipic2 train pretrain`."""
    return run_command(argv, parse, pretrain, _METHOD)
