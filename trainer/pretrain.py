"""`unipic2 train pretrain`: flow-matching pretraining from a YAML file and flags."""

import difflib
import json
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from diffusers import AutoencoderTiny
from peft import LoraConfig
from trl import TrlParser

from ..core.errors import InputError, check_one_of, check_share
from ..core.files import check_replaceable, write_file
from .adapters import lora_config
from .data.buckets import aspect_buckets
from .data.cache import Cache, CachedPairs, build_cache, fingerprint, is_complete
from .data.pairs import PairDataset, measure_sources
from .data.sources import open_source, open_sources
from .data.stream import StreamedPairs, open_stream
from .flow_matching_config import FlowMatchingConfig
from .flow_matching_trainer import FlowMatchingTrainer
from .hub import model_card, push, repository_name
from .kontext_config import EXPORT_DTYPES
from .kontext_pipeline import StableDiffusion3KontextPipeline
from .kontext_trainer import last_checkpoint
from .micro.dataset import MicroDataset
from .previews import micro_previews, pair_previews
from .stages import parse_stages, read_config, run_stages

MICRO = "micro"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_IDENTITY = "run.json"


@dataclass
class PretrainArguments:
    """What is trained and on what."""

    model_name_or_path: str = field(
        default="", metadata={"help": "Pipeline to start from: a folder in the published layout, or a hub repository."}
    )
    dataset_name: list[str] = field(
        default_factory=lambda: [MICRO],
        metadata={
            "help": "Training data, one or more: .jsonl, .json, .parquet, .tar (webdataset) files, folders of them or "
            "of pictures, hub names. Text-to-image and edits may be in different ones. `micro` draws the micro world."
        },
    )
    image_root: str | None = field(
        default=None, metadata={"help": "Folder that picture paths in rows start from; default the file's own folder."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split to read where there are several."})
    prompt_column: str | None = field(default=None, metadata={"help": "Column of the text; default by usual names."})
    target_column: str | None = field(default=None, metadata={"help": "Column of the picture to learn."})
    source_column: str | None = field(default=None, metadata={"help": "Column of the picture an edit starts from."})
    mask_column: str | None = field(default=None, metadata={"help": "Column of a local edit's mask, white inside."})
    resolution: int = field(
        default=512, metadata={"help": "Size of training pictures in pixels, a multiple of 32; see bucket_mode."}
    )
    bucket_mode: str = field(
        default="area",
        metadata={"help": "area: buckets of about resolution squared pixels. longer_edge: its longer edge."},
    )
    max_aspect: float = field(default=2.0, metadata={"help": "Longer to shorter edge of a bucket, at most."})
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
    max_broken: float = field(
        default=0.01, metadata={"help": "Share of rows, 0 to 1, that may be broken; above it training stops."}
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that read picture sizes before training; default one."}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train LoRAs instead of the transformer's own weights."})
    lora_r: int = field(default=16, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA scale: updates count alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Share of inputs that LoRAs do not see, 0 to below 1."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["attention"],
        metadata={"help": "attention (joint and dual), ff, or names of modules such as attn2.to_q."},
    )
    num_scenes: int = field(default=12000, metadata={"help": "Micro world: text-to-image scenes in the pool."})
    num_edits: int = field(default=14000, metadata={"help": "Micro world: pairs of source and target in the pool."})
    resume: bool = field(
        default=False, metadata={"help": "Continue from the last whole checkpoint in output_dir; without one, start."}
    )

    def __post_init__(self):
        for name in ("dataset_name", "lora_target_modules"):  # a YAML file may hold one word
            value = getattr(self, name)
            setattr(self, name, [value] if isinstance(value, str) else value)
        check_share("max_broken", self.max_broken)
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

    def peft_config(self) -> LoraConfig | None:
        """Return PEFT's settings under `use_peft`, else None."""
        if not self.use_peft:
            return None
        return lora_config(self.lora_r, self.lora_alpha, self.lora_dropout, self.lora_target_modules)


def parse(argv: list[str]) -> tuple[PretrainArguments, FlowMatchingConfig]:
    """Read `--config FILE` and flags; flags win.

    Raises:
        InputError: an unknown key, with the nearest valid names, or a value that does not fit.
    """
    read_config(argv)  # what is wrong with the file is said in its own words
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
    if MICRO in script_args.dataset_name and len(script_args.dataset_name) > 1:
        raise InputError("dataset_name", found=", ".join(script_args.dataset_name), expected="micro alone, or others")
    return script_args, args


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


def load_pipeline(
    name: str, args: FlowMatchingConfig, lora: bool, text_encoders: bool = True
) -> StableDiffusion3KontextPipeline:
    """Load the model: under `bf16` on a GPU in bfloat16, but for what is trained and the rest of its model in float32.

    Args:
        name: folder, or hub repository.
        args: settings.
        lora: the transformer itself stays frozen.
        text_encoders: False leaves them out; see `load_dataset`.

    Raises:
        InputError: see `StableDiffusion3KontextPipeline.from_pretrained`.
    """
    frozen = torch.bfloat16 if args.bf16 and args.device.type == "cuda" else torch.float32
    types = {"default": frozen, "transformer": frozen if lora else torch.float32}
    if args.train_text_encoder:
        types["text_encoder"] = torch.float32
    folder = StableDiffusion3KontextPipeline.find_folder(name)
    absent = {} if text_encoders else dict.fromkeys(TEXT_ENCODERS)
    return StableDiffusion3KontextPipeline.from_pretrained(folder, torch_dtype=types, **absent)


def load_dataset(
    script_args: PretrainArguments, args: FlowMatchingConfig, pipeline
) -> MicroDataset | PairDataset | CachedPairs | StreamedPairs:
    """Return the training data; under `cache_dir` it is encoded first, by the first process alone.

    Raises:
        InputError: see `open_source`, `aspect_buckets` and `PairDataset`; or the micro world for a model that is not.
    """
    if script_args.dataset_name == [MICRO]:
        if not isinstance(pipeline.vae, AutoencoderTiny):
            found, expected = type(pipeline.vae).__name__, "a micro model for dataset_name micro"
            raise InputError("model_name_or_path", found=found, expected=expected)
        return MicroDataset(pipeline.vae, script_args.num_scenes, script_args.num_edits, args.seed)
    named = (script_args.dataset_name, script_args.image_root, script_args.dataset_split, script_args)
    sources = open_sources(*named, open_one=open_stream if script_args.streaming else open_source)
    if args.unmasked_weight == 1:
        sources = [replace(source, columns=replace(source.columns, mask=None)) for source in sources]
    buckets = aspect_buckets(script_args.resolution, script_args.bucket_mode, script_args.max_aspect)
    most = pipeline.transformer.config.pos_embed_max_size * pipeline.patch_size * pipeline.vae_scale_factor
    longest = max(max(size) for size in buckets)
    if longest > most:
        found = f"buckets of up to {longest} pixels"
        remedy = "Lower it, or max_aspect."
        raise InputError("resolution", found=found, expected=f"at most {most}, the model's positions", remedy=remedy)
    if script_args.streaming:
        pool = script_args.shuffle_buffer_size
        return StreamedPairs(sources, buckets, script_args.max_broken, pool, quiet=args.process_index > 0)
    dataset = _measured_pairs(sources, buckets, script_args, args)
    if script_args.cache_dir is None:
        return dataset
    if args.train_text_encoder:
        raise InputError("cache_dir", found="train_text_encoder too", expected="frozen text encoders")
    return _cached(dataset, script_args, args, pipeline)


def _measured_pairs(sources, buckets, script_args: PretrainArguments, args: FlowMatchingConfig) -> PairDataset:
    """Return the rows. Of several processes the first one reads all headers, and tells the others or what is wrong."""
    dataset, measured = None, [None]
    if args.process_index == 0:
        measured = [measure_sources(sources, script_args.preprocessing_num_workers)]
        dataset = PairDataset(sources, buckets, script_args.max_broken, measured[0])
        sys.stderr.write(f"{dataset.summary()}\n")
    if args.world_size > 1:
        broadcast_object_list(measured)
    return dataset if dataset is not None else PairDataset(sources, buckets, script_args.max_broken, measured[0])


def _cached(dataset: PairDataset, script_args: PretrainArguments, args, pipeline) -> CachedPairs:
    """Return the rows out of the cache. Text encoders are loaded only if something has to be encoded, and let go."""
    folder, dtype = Path(script_args.cache_dir), getattr(torch, script_args.cache_dtype)
    digest = fingerprint(pipeline.loaded_from, dtype, pipeline.vae.dtype)
    with args.main_process_first(local=False, desc="encoding"):
        cache = Cache(folder, digest)
        if not is_complete(cache, dataset, pipeline) and args.process_index == 0:
            parts = {"transformer": pipeline.transformer, "vae": pipeline.vae, "torch_dtype": pipeline.vae.dtype}
            encoders = StableDiffusion3KontextPipeline.from_pretrained(pipeline.loaded_from, **parts)
            build_cache(dataset, cache, encoders, dtype, args.device, script_args.cache_batch_size)
    return CachedPairs(dataset, cache)


def pretrain(script_args: PretrainArguments, args: FlowMatchingConfig) -> Path:
    """Train and export; returns the folder of the exported pipeline or LoRA, `output_dir/export`. `main` pushes it."""
    peft_config = script_args.peft_config()
    output_dir = Path(args.output_dir)
    check_replaceable(output_dir / "export")
    checkpoint = last_checkpoint(output_dir, args.use_ema) if script_args.resume else None
    if not script_args.resume and last_checkpoint(output_dir, args.use_ema) is not None:
        remedy = "`resume: true` goes on with it; or name another folder."
        raise InputError(f"output_dir {output_dir}", found="checkpoints of an earlier run", remedy=remedy)
    if script_args.resume:
        start = "from the beginning: no whole checkpoint yet" if checkpoint is None else f"after {checkpoint.name}"
        sys.stderr.write(f"{output_dir}: training goes on {start}\n")
    ready = script_args.cache_dir is not None
    pipeline = load_pipeline(script_args.model_name_or_path, args, peft_config is not None, text_encoders=not ready)
    dataset = load_dataset(script_args, args, pipeline)
    rows = None if script_args.streaming else len(dataset)
    _check_identity(script_args, args, rows, resumed=checkpoint is not None)
    previews = None
    if args.preview_steps:
        previews = micro_previews(args) if isinstance(dataset, MicroDataset) else pair_previews(dataset, args)
    trainer = FlowMatchingTrainer(pipeline, args, dataset, previews=previews, peft_config=peft_config)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    steps, name = trainer.state.global_step, Path(repository_name(args, output_dir)).name
    base, data = script_args.model_name_or_path, script_args.dataset_name
    trainer.export(output_dir / "export", model_card(name, base, data, args, steps, peft_config is not None))
    return output_dir / "export"


def _stages_card(stages: list[tuple[PretrainArguments, FlowMatchingConfig]], output_dir: Path) -> str:
    """Return the card of the whole run, which began where its first stage did."""
    args = stages[-1][1]
    steps = sum(a.max_steps for _, a in stages) if all(a.max_steps > 0 for _, a in stages) else None
    data = list(dict.fromkeys(name for script_args, _ in stages for name in script_args.dataset_name))
    name = Path(repository_name(args, output_dir)).name
    return model_card(name, stages[0][0].model_name_or_path, data, args, steps, lora=False)


def _check_identity(script_args: PretrainArguments, args: FlowMatchingConfig, rows: int | None, resumed: bool) -> None:
    """Keep in `output_dir` what makes a run the run it is, and compare it where one goes on.

    Raises:
        InputError: the checkpoints are of a run on other data, of another seed or other batches.
    """
    identity = {
        "model_name_or_path": script_args.model_name_or_path,
        "dataset_name": script_args.dataset_name,
        "streaming": script_args.streaming,
        "rows": rows,
        "seed": args.seed,
        "edit_ratio": args.edit_ratio,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "batches of a step": args.gradient_accumulation_steps * args.world_size,
    }
    path = Path(args.output_dir) / _IDENTITY
    if resumed and path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        for name, value in identity.items():
            if name in kept and kept[name] != value:
                remedy = "Name another output_dir, or take this run's own settings."
                found, expected = f"{value}", f"{kept.get(name)}, with which {path.parent} was begun"
                raise InputError(f"{name} of a resumed run", found=found, expected=expected, remedy=remedy)
    elif args.process_index == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(identity, indent=2) + "\n")


def cache(argv: list[str]) -> int:
    """Entry of `unipic2 data cache`, which takes the settings of a training run, in stages or not."""
    runs = parse_stages(argv, parse) or [parse(argv)]
    script_args, args = runs[0]
    if script_args.cache_dir is None:
        raise InputError("cache_dir", found="none", expected="a folder, and data of your own")
    pipeline = load_pipeline(script_args.model_name_or_path, args, lora=True, text_encoders=False)
    for script_args, args in runs:
        dataset = load_dataset(script_args, args, pipeline)
        sys.stdout.write(f"{script_args.cache_dir}: {len(dataset)} rows\n")
    return 0


def main(argv: list[str]) -> int:
    """Entry of `unipic2 train pretrain`."""
    stages = parse_stages(argv, parse)
    if stages is None:
        script_args, args = parse(argv)
        folder = pretrain(script_args, args)
    else:
        args = stages[-1][1]
        folder = run_stages(stages, pretrain)
    if PartialState().is_main_process:
        if stages is not None:
            write_file(folder / "README.md", _stages_card(stages, folder.parent))
        sys.stdout.write(f"{folder}\n")
        if args.push_to_hub:
            sys.stdout.write(f"{push(folder, repository_name(args, folder.parent), args)}\n")
    PartialState().destroy_process_group()  # else a process may abort when it ends, with its group's threads at work
    return 0
