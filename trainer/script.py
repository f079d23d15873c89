"""What the training commands share: the model and its data as settings, LoRA, and how runs go on."""

import difflib
import json
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import NoReturn, Union, get_args, get_origin, get_type_hints

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from diffusers import AutoencoderTiny
from peft import LoraConfig
from trl import TrlParser

from ..core.errors import InputError, check_share
from ..core.files import check_replaceable, write_file
from .adapters import lora_config
from .data.buckets import aspect_buckets
from .data.pairs import PairDataset, measure_sources
from .data.sources import SOURCE_COLUMNS, open_sources
from .hub import model_card, push, repository_name
from .kontext_config import KontextConfig
from .kontext_pipeline import StableDiffusion3KontextPipeline
from .kontext_trainer import KontextTrainer, last_checkpoint
from .metaquery_pipeline import MetaQueryPipeline, is_metaquery
from .previews import micro_previews, pair_previews
from .stages import is_earlier_stage, parse_stages, read_config, run_stages

MICRO = "micro"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_IDENTITY = "run.json"


@dataclass
class ScriptArguments:
    """What is trained and on what."""

    model_name_or_path: str = field(
        default="",
        metadata={
            "help": "Pipeline to start from: a folder in the published layout, a hub repository, or bundled weights: "
            "micro, micro-pretrained or micro-metaquery."
        },
    )
    vlm_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "MetaQuery models: Qwen2.5-VL, a folder or hub repository; default the model's own, or the "
            "published 7B."
        },
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
    source_column: str | None = field(default=None, metadata={"help": "Column of the picture an edit starts from."})
    resolution: int = field(
        default=512, metadata={"help": "Size of training pictures in pixels, a multiple of 32; see bucket_mode."}
    )
    bucket_mode: str = field(
        default="area",
        metadata={"help": "area: buckets of about resolution squared pixels. longer_edge: its longer edge."},
    )
    max_aspect: float = field(default=2.0, metadata={"help": "Longer to shorter edge of a bucket, at most."})
    max_broken: float = field(
        default=0.01, metadata={"help": "Share of rows, 0 to 1, that may be broken; above it training stops."}
    )
    same_color_edits: float = field(
        default=0.0,
        metadata={
            "help": "Micro world: share of edits that are drawn until another thing has the color of the one that is "
            "edited, so that the shape alone says which is meant; of the others about one in eight, by chance."
        },
    )
    use_peft: bool = field(default=False, metadata={"help": "Train LoRAs instead of the transformer's own weights."})
    lora_r: int = field(default=16, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA scale: updates count alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Share of inputs that LoRAs do not see, 0 to below 1."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["attention"],
        metadata={"help": "attention (joint and dual), ff, or names of modules such as attn2.to_q."},
    )
    resume: bool = field(
        default=False, metadata={"help": "Continue from the last whole checkpoint in output_dir; without one, start."}
    )

    def __post_init__(self):
        for f in fields(self):  # a YAML file may hold one word for a list
            if f.type in (list[str], list[str] | None) and isinstance(getattr(self, f.name), str):
                setattr(self, f.name, [getattr(self, f.name)])
        check_share("max_broken", self.max_broken)
        check_share("same_color_edits", self.same_color_edits)

    def peft_config(self) -> LoraConfig | None:
        """Return PEFT's settings under `use_peft`, else None."""
        if not self.use_peft:
            return None
        return lora_config(self.lora_r, self.lora_alpha, self.lora_dropout, self.lora_target_modules)


class _Parser(TrlParser):
    """Says what is wrong in one line, where argparse shows the usage of all settings before it and leaves."""

    def error(self, message: str) -> NoReturn:
        raise InputError("training settings", found=message, remedy=f"See `{self.prog} --help`.")


_TYPES = {
    bool: (lambda value: value in (0, 1), "true or false"),
    int: (lambda value: type(value) is int, "a whole number"),
    float: (lambda value: type(value) in (int, float), "a number"),
    str: (lambda value: value is not None and not isinstance(value, list | dict), "a word"),
    list[str]: (lambda value: isinstance(value, list) and None not in value, "words"),
}
"""What a file may have for a setting of a type beside a word, and how to say it."""


def _check_types(settings: dict, classes: tuple[type, ...]) -> None:
    """Raise InputError for a value of a file that is of no use to its setting: argparse looks at words alone."""
    hints = {name: hint for cls in classes for name, hint in get_type_hints(cls).items()}
    for name, value in settings.items():
        hint = hints.get(name)
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        plain = [kind for kind in kinds if kind is not NoneType]
        if len(plain) != 1 or plain[0] not in _TYPES or isinstance(value, str) or (value is None and len(kinds) > 1):
            continue
        fits, expected = _TYPES[plain[0]]
        if not fits(value):
            raise InputError(name, found=json.dumps(value, default=str), expected=expected)


def parse_settings(argv: list[str], script_class: type, config_class: type, method: str) -> tuple:
    """Read `--config FILE` and flags, flags win; returns one of each class.

    Raises:
        InputError: an unknown key, with the nearest valid names, or a value that does not fit.
    """
    _check_types(read_config(argv), (script_class, config_class))
    parser = _Parser((script_class, config_class), prog=f"unipic2 train {method}", allow_abbrev=False)
    try:
        script_args, args = parser.parse_args_and_config(argv)
    except InputError:
        raise
    except (ValueError, TypeError) as error:
        remedy = _suggest(str(error), [f.name for cls in (script_class, config_class) for f in fields(cls)])
        raise InputError("training settings", found=str(error), remedy=remedy) from None
    if not script_args.model_name_or_path:
        remedy = "`micro-pretrained` is a small one to try things with."
        raise InputError("model_name_or_path", found="nothing", expected="a pipeline folder", remedy=remedy)
    if MICRO in script_args.dataset_name and len(script_args.dataset_name) > 1:
        raise InputError("dataset_name", found=", ".join(script_args.dataset_name), expected="micro alone, or others")
    return script_args, args


def _suggest(message: str, known: list[str]) -> str | None:
    """Return a sentence with the setting names nearest to unknown ones that a parser's message mentions."""
    words = [w.strip("-'\"[],:").replace("-", "_") for w in message.split() if "-" in w or "_" in w]
    hints = []
    for word in dict.fromkeys(words):
        near = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
        if word not in known and near:
            hints.append(f"Did you mean {' or '.join(near)} instead of {word}?")
    return " ".join(hints) or None


def load_pipeline(
    script_args: ScriptArguments, args: KontextConfig, lora: bool, text_encoders: bool = True, metaquery: bool = True
) -> StableDiffusion3KontextPipeline:
    """Load the model: under `bf16` on a GPU in bfloat16, but for what is trained and the rest of its model in float32.

    Args:
        script_args: which model.
        args: settings.
        lora: the transformer itself stays frozen.
        text_encoders: False leaves them out, for data that brings its texts encoded.
        metaquery: False refuses MetaQuery models, for training that does not show them pictures.

    Raises:
        InputError: see `open_model`; or a MetaQuery model that is refused.
    """
    frozen = torch.bfloat16 if args.bf16 and args.device.type == "cuda" else torch.float32
    types = {"default": frozen, "transformer": frozen if lora else torch.float32}
    if args.train_text_encoder:
        types["text_encoder"] = torch.float32
    if not metaquery and is_metaquery(StableDiffusion3KontextPipeline.find_folder(script_args.model_name_or_path)):
        expected, remedy = "a model with text encoders", "Take `unipic2 train metaquery`."
        raise InputError("model_name_or_path", found="a MetaQuery model", expected=expected, remedy=remedy)
    absent = {} if text_encoders else dict.fromkeys(TEXT_ENCODERS)
    return open_model(script_args.model_name_or_path, script_args.vlm_name_or_path, torch_dtype=types, **absent)


def open_model(name: str | Path, vlm_name_or_path: str | None = None, **kwargs) -> StableDiffusion3KontextPipeline:
    """Load a model of either kind, with text encoders of its own or behind Qwen2.5-VL.

    Raises:
        InputError: see the kinds' `from_pretrained`; or `vlm_name_or_path` for a model that has text encoders.
    """
    folder = StableDiffusion3KontextPipeline.find_folder(name)
    if is_metaquery(folder):
        return MetaQueryPipeline.from_pretrained(folder, vlm_name_or_path, **kwargs)
    if vlm_name_or_path is not None:
        raise InputError("vlm_name_or_path", found=f"{name}, a model with text encoders", expected="a MetaQuery model")
    return StableDiffusion3KontextPipeline.from_pretrained(folder, **kwargs)


def check_micro(pipeline: StableDiffusion3KontextPipeline) -> None:
    """Raise InputError where the micro world is asked for with a model that is not micro."""
    if not isinstance(pipeline.vae, AutoencoderTiny):
        found, expected = type(pipeline.vae).__name__, "a micro model for dataset_name micro"
        raise InputError("model_name_or_path", found=found, expected=expected)


def open_data(names: list[str], script_args: ScriptArguments, pipeline, open_one) -> tuple[list, list]:
    """Return opened datasets, and the sizes `(width, height)` that their pictures are brought to.

    Raises:
        InputError: see `open_source` and `aspect_buckets`, or a size larger than the model's positions.
    """
    sources = open_sources(names, script_args.image_root, script_args.dataset_split, script_args, open_one=open_one)
    buckets = aspect_buckets(script_args.resolution, script_args.bucket_mode, script_args.max_aspect)
    most = pipeline.transformer.config.pos_embed_max_size * pipeline.patch_size * pipeline.vae_scale_factor
    longest = max(max(size) for size in buckets)
    if longest > most:
        found = f"buckets of up to {longest} pixels"
        remedy = "Lower it, or max_aspect."
        raise InputError("resolution", found=found, expected=f"at most {most}, the model's positions", remedy=remedy)
    return sources, buckets


def measured_rows(
    kind: type[PairDataset], sources, buckets, max_broken: float, args, num_proc: int | None = None, alone=False
):
    """Return the rows. The first process reads all headers and tells the others, unless it is `alone`.

    Raises:
        InputError: see `PairDataset`.
    """
    dataset, measured = None, [None]
    if args.process_index == 0:
        measured = [measure_sources(sources, num_proc)]
        dataset = kind(sources, buckets, max_broken, measured[0])
        sys.stderr.write(f"{dataset.summary()}\n")
        for source in sources:
            unread = SOURCE_COLUMNS[-1]
            if source.columns.target is source.columns.source is None and unread in source.rows.column_names:
                said = f"{source.name}: its column {unread} is not read; if rows are edits of those pictures"
                sys.stderr.write(f"{said}, name it with --source_column\n")
    if args.world_size > 1 and not alone:
        broadcast_object_list(measured)
    return dataset if dataset is not None else kind(sources, buckets, max_broken, measured[0])


def previews_of(script_args: ScriptArguments, args: KontextConfig, rows):
    """Return what draws the fixed-seed grids of a run, None without `preview_steps`."""
    if not args.preview_steps:
        return None
    return micro_previews(args) if script_args.dataset_name == [MICRO] else pair_previews(rows, args)


def find_checkpoint(script_args: ScriptArguments, args: KontextConfig) -> Path | None:
    """Return the checkpoint that a run goes on from, None where it starts.

    Raises:
        InputError: `output_dir` holds another run's checkpoints, or something else in place of an export.
    """
    output_dir = Path(args.output_dir)
    check_replaceable(output_dir / "export")
    checkpoint, found = last_checkpoint(output_dir, args.use_ema), last_checkpoint(output_dir, use_ema=False)
    if script_args.resume:
        if found is not None:  # else a run with an average would begin anew beside one without, whose places it takes
            _compare(args, {"use_ema": args.use_ema})
        start = "from the beginning: no whole checkpoint yet" if checkpoint is None else f"after {checkpoint.name}"
        sys.stderr.write(f"{output_dir}: training goes on {start}\n")
    elif found is not None:
        remedy = "`resume: true` goes on with it; or name another folder."
        raise InputError(f"output_dir {output_dir}", found="checkpoints of an earlier run", remedy=remedy)
    return checkpoint


def check_identity(args: KontextConfig, identity: dict, resumed: bool) -> None:
    """Keep in `output_dir` what makes a run the run it is, and compare it where one goes on.

    Raises:
        InputError: the checkpoints are of a run on other data, of another seed or other batches.
    """
    if is_earlier_stage(Path(identity["model_name_or_path"]), args.output_dir):  # wherever the run's folder is now
        identity = {name: value for name, value in identity.items() if name != "model_name_or_path"}
    identity = identity | {
        "seed": args.seed,
        "data_seed": args.data_seed,
        "use_ema": args.use_ema,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "batches of a step": args.gradient_accumulation_steps * args.world_size,
    }
    path = Path(args.output_dir) / _IDENTITY
    if resumed and path.is_file():
        _compare(args, identity)
    elif args.process_index == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(identity, indent=2) + "\n")


def _compare(args: KontextConfig, identity: dict) -> None:
    """Raise InputError where a run's identity is another than what its `output_dir` has kept, if it has."""
    path = Path(args.output_dir) / _IDENTITY
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name, value in identity.items():
        if name in kept and kept[name] != value:
            remedy = "Name another output_dir, or take this run's own settings."
            found, expected = f"{value}", f"{kept[name]}, with which {path.parent} was begun"
            raise InputError(f"{name} of a resumed run", found=found, expected=expected, remedy=remedy)


def train_and_export(
    trainer: KontextTrainer, script_args: ScriptArguments, args: KontextConfig, checkpoint: Path | None, method: str
) -> Path:
    """Train and export with a card; returns the folder of the pipeline or LoRA, `output_dir/export`."""
    output_dir = Path(args.output_dir)
    trainer.run_settings = asdict(script_args)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    steps, name = trainer.exported_step, Path(repository_name(args, output_dir)).name
    base, data = script_args.model_name_or_path, script_args.dataset_name
    card = model_card(
        name, base, data, args, steps, script_args.use_peft, method, metaquery=trainer.pipeline.sees_pictures
    )
    trainer.export(output_dir / "export", card)
    return output_dir / "export"


def stages_card(stages: list[tuple], output_dir: Path, method: str, counted: bool = True) -> str:
    """Return the card of a whole run, which began where its first stage did; steps only if they are `counted`."""
    script_args, args = stages[0][0], stages[-1][1]
    steps = sum(a.max_steps for _, a in stages) if counted and all(a.max_steps > 0 for _, a in stages) else None
    data = list(dict.fromkeys(name for a, _ in stages for name in a.dataset_name))
    name = Path(repository_name(args, output_dir)).name
    base, metaquery = script_args.model_name_or_path, is_metaquery(output_dir / "export")
    earlier = [a for _, a in stages[:-1]]
    return model_card(name, base, data, args, steps, script_args.use_peft, method, metaquery, earlier)


def finish(folder: Path, args: KontextConfig, card: str | None = None) -> None:
    """Say where the export is, give it another card if there is one, push it if asked, and leave the process group."""
    if PartialState().is_main_process:
        if card is not None:
            write_file(folder / "README.md", card)
        sys.stdout.write(f"{folder}\n")
        if args.push_to_hub:
            sys.stdout.write(f"{push(folder, repository_name(args, folder.parent), args)}\n")
    PartialState().destroy_process_group()  # else a process may abort when it ends, with its group's threads at work


def run_command(argv: list[str], parse, run, method: str) -> int:
    """Do what a training command does: one run, or stages one after another, and say where the export is.

    Args:
        argv: flags, with `--config FILE` or without.
        parse: reads flags, see `pretrain.parse`.
        run: trains and exports, see `pretrain.pretrain`.
        method: what the card says of a run in stages.
    """
    stages = parse_stages(argv, parse)
    if stages is None:
        script_args, args = parse(argv)
        finish(run(script_args, args), args)
    else:
        args = stages[-1][1]
        folder = run_stages(stages, run)
        finish(folder, args, stages_card(stages, folder.parent, method))
    return 0
