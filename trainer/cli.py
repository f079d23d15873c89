"""The trainer's part of the `unipic2` command: `train`, `data`, `export`, `eval`, `compare` and `micro`."""

import argparse
import importlib
import subprocess
import sys
from functools import partial
from pathlib import Path

from ..core.errors import InputError, check_one_of, check_share
from .micro import CODEC_STEPS, DECODER_STEPS, VLM_STEPS

TRAIN_METHODS = ("pretrain", "grpo", "pdtr", "metaquery")
CACHE_METHODS = ("pretrain", "metaquery")
ACCELERATE_CONFIGS = ("ddp", "fsdp2", "zero2")
_LEAST = {
    "n": 1, "batch_size": 1, "steps": 1, "seed": 0, "codec_steps": 1, "decoder_steps": 1, "num_proc": 1,
    "vlm_steps": 1, "samples": 1, "width": 16, "height": 16,
}  # fmt: skip
"""Smallest values of whole numbers on the command line."""

_N = "micro: prompts, and as many edits (default 256)"

_TRAIN_HELP = """\
Methods:
  pretrain   flow matching on text-to-image and edits
  grpo       online reinforcement learning: groups of pictures, rewards, Flow-GRPO and its kin
  pdtr       the same in stages, with both tasks measured around each (Progressive Dual-Task Reinforcement)
  metaquery  queries and connector behind a frozen Qwen2.5-VL, with or without the transformer

Settings come from a YAML file and from flags; flags win, unknown names are errors:
  unipic2 train pretrain --config my.yaml --learning_rate 5e-4 --output_dir runs/a

Several processes on one machine, by accelerate (a profile's name, or a file of your own):
  unipic2 train pretrain --config my.yaml --accelerate_config ddp --num_processes 8

`unipic2 train METHOD --help` lists every setting with its unit.
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all but `train`, which hands its flags on to the method."""
    parser = argparse.ArgumentParser(prog="unipic2")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("train", help="train a model", epilog=_TRAIN_HELP)

    data = commands.add_parser("data", help="training data").add_subparsers(dest="action", required=True)
    data.add_parser("cache", help="encode ahead: data cache [metaquery] --config FILE, the settings of a training run")
    check = data.add_parser(
        "check",
        help="read a dataset and report counts, sizes, buckets, broken rows and duplicates",
        description="Decodes every row. Exit status 1 where more rows are broken than --max-broken allows.",
    )
    check.add_argument("dataset", nargs="+", help=".jsonl, .json, .parquet or .tar file, a folder, or a hub name")
    check.add_argument("--out", type=Path, default=None, help="folder for report.json and sheet.png (default: none)")
    check.add_argument("--image-root", default=None, help="folder that picture paths start from (default: the file's)")
    check.add_argument("--split", default="train", help="split to read (default train)")
    for role in ("prompt", "target", "source", "mask"):
        check.add_argument(
            f"--{role}-column",
            f"--{role}_column",
            default=None,
            help=f"column of the {role} (default: by usual names)",
        )
    check.add_argument(
        "--no-target", action="store_true", help="rows for grpo and pdtr: prompts, and for edits what they start from"
    )
    check.add_argument("--resolution", type=int, default=512, help="pixels; size of the buckets (default 512)")
    check.add_argument("--bucket-mode", default="area", help="area or longer_edge (default area)")
    check.add_argument("--max-aspect", type=float, default=2.0, help="longest shape of a bucket (default 2, for 2:1)")
    check.add_argument(
        "--max-broken", type=float, default=0.01, help="share of rows that may be broken (default 0.01)"
    )
    check.add_argument("--num-proc", type=int, default=1, help="processes that decode (default 1)")

    export = commands.add_parser("export", help="write a trained model as one file for ComfyUI")
    export.add_argument(
        "--model", required=True, help="pipeline folder, hub repository, or bundled weights: micro, ..."
    )
    export.add_argument("--out", type=Path, required=True, help=".safetensors file to write; replaces an older one")
    export.add_argument(
        "--lora", type=Path, default=None, help="LoRA to merge into it: an exported folder, or diffusers' file"
    )
    export.add_argument("--dtype", default=None, help="float32, float16 or bfloat16 (default: as it is stored)")

    evaluate = commands.add_parser("eval", help="score a model").add_subparsers(dest="benchmark", required=True)
    micro = evaluate.add_parser("micro", help="held-out prompts and edits of the micro world, judged by the verifier")
    micro.add_argument("--n", type=int, default=None, help=_N)
    _add_eval_arguments(micro, "micro", "pipeline folder, or bundled weights: micro (default), micro-pretrained, ...")
    geneval = evaluate.add_parser(
        "geneval", help="GenEval's prompts, judged by its own rules with Mask2Former and CLIP of transformers"
    )
    geneval.add_argument(
        "--prompts", type=Path, required=True, help="GenEval's prompts/evaluation_metadata.jsonl, or rows of that form"
    )
    _add_picture_arguments(geneval)
    geneval.add_argument("--exact-counts", action="store_true", help="more objects than asked are wrong too")
    geneval.add_argument(
        "--detector", default="facebook/mask2former-swin-small-coco-instance", help="hub name or folder (%(default)s)"
    )
    geneval.add_argument("--clip", default="openai/clip-vit-large-patch14", help="tells colours (%(default)s)")
    dpg = evaluate.add_parser("dpg", help="DPG-Bench: long prompts, and a graph of questions about each picture")
    dpg.add_argument("--prompts", type=Path, required=True, help="the benchmark's dpg_bench.csv")
    _add_picture_arguments(dpg)
    gedit = evaluate.add_parser("gedit", help="GEdit-Bench: edits in eleven groups, English and Chinese, by VIEScore")
    gedit.add_argument(
        "--data", default="stepfun-ai/GEdit-Bench", help="hub name, .parquet file or folder of them (%(default)s)"
    )
    imgedit = evaluate.add_parser("imgedit", help="ImgEdit-Bench, basic suite: nine types of edits, three scores each")
    imgedit.add_argument("--prompts", type=Path, required=True, help="the benchmark's basic_edit.json")
    imgedit.add_argument("--images", type=Path, required=True, help="folder that the pictures' paths start from")
    for edits in (gedit, imgedit):
        edits.add_argument(
            "--longer-edge", type=int, default=None, help="pixels of what is drawn, a multiple of 32 (default 512)"
        )
    for judged in (dpg, gedit, imgedit):
        _add_judge_arguments(judged)
    for published in (geneval, dpg, gedit, imgedit):
        model = "Skywork/UniPic2-SD3.5M-Kontext-2B"
        _add_eval_arguments(published, model, "pipeline folder or hub name (%(default)s)")

    compare = commands.add_parser(
        "compare",
        help="results of `unipic2 eval`, or models, side by side: a table with paired differences, and the pictures",
    )
    compare.add_argument(
        "names", nargs="+",
        help="two or more folders of `unipic2 eval`, or models, which the micro benchmark is run on; differences are "
        "to the first",
    )  # fmt: skip
    compare.add_argument(
        "--out", type=Path, default=None, help="folder for comparison.json, comparison.png and what models draw"
    )
    compare.add_argument("--n", type=int, default=None, help=_N)
    _add_sampling_arguments(compare)

    world = commands.add_parser("micro", help="the micro world").add_subparsers(dest="action", required=True)
    sheet = world.add_parser("sheet", help="draw a contact sheet of real scenes with the verifier's verdicts")
    sheet.add_argument("-o", "--out", type=Path, default=Path("micro_world.png"), help="PNG to write")
    sheet.add_argument("--seed", type=int, default=0, help="seed of the scenes (default 0)")
    make = world.add_parser(
        "make",
        help="train the whole micro model from a seed (about an hour on two CPU cores)",
        epilog="Further flags are those of `unipic2 train pretrain`, e.g. --max_steps 100 for a quick trial.",
    )
    make.add_argument(
        "--out", type=Path, default=Path("runs/micro"), help="folder of the finished model; replaces an older one"
    )
    make.add_argument("--work", type=Path, default=None, help="folder for stages and logs (default OUT + '-work')")
    make.add_argument("--seed", type=int, default=0, help="the one seed of everything (default 0)")
    make.add_argument(
        "--codec-steps", type=int, default=CODEC_STEPS, help="optimizer steps of the VAE (default %(default)s)"
    )
    make.add_argument(
        "--decoder-steps", type=int, default=DECODER_STEPS, help="more steps of its decoder (default %(default)s)"
    )
    metaquery = world.add_parser(
        "metaquery",
        help="train the micro MetaQuery model: a small Qwen2.5-VL, then the connector, then all of it",
        epilog="Further flags are those of `unipic2 train metaquery`.",
    )
    metaquery.add_argument(
        "--out", type=Path, default=Path("runs/micro-metaquery"), help="folder of the model; replaces an older one"
    )
    metaquery.add_argument(
        "--work", type=Path, default=None, help="folder for stages and logs (default OUT + '-work')"
    )
    metaquery.add_argument(
        "--base", default="micro-pretrained", help="micro model whose transformer is taken (default %(default)s)"
    )
    metaquery.add_argument("--seed", type=int, default=0, help="the one seed of everything (default 0)")
    metaquery.add_argument(
        "--vlm-steps", type=int, default=VLM_STEPS, help="optimizer steps of Qwen2.5-VL (default %(default)s)"
    )
    return parser


def _add_eval_arguments(parser: argparse.ArgumentParser, model: str, help_of_model: str) -> None:
    """Add the flags that every benchmark has."""
    parser.add_argument("--model", default=model, help=help_of_model)
    parser.add_argument(
        "--out", type=Path, required=True,
        help="folder for images/, results.json, results.png and index.html; a run that was stopped goes on in it",
    )  # fmt: skip
    parser.add_argument("--lora", type=Path, default=None, help="LoRA on top: an exported folder, or diffusers' file")
    parser.add_argument(
        "--metaquery", default=None, help="draw --model through this MetaQuery model's connector (folder or hub name)"
    )
    parser.add_argument(
        "--vlm", default=None, help="MetaQuery models: Qwen2.5-VL (default: the model's own, or the published 7B)"
    )
    _add_sampling_arguments(parser)
    parser.add_argument(
        "--only", choices=("draw", "score"), default=None,
        help="draw alone, or score the pictures in OUT/images alone, whoever made them (named as in results.json)",
    )  # fmt: skip
    parser.add_argument(
        "--min-coverage", type=float, default=1.0, help="share of pictures that must be there (default 1)"
    )


def _add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=None, help="seed of the noise, and of tasks that are drawn")
    parser.add_argument("--steps", type=int, default=None, help="denoising steps (default 20 for micro, else 50)")
    parser.add_argument(
        "--guidance-scale", type=float, default=None, help="guidance (default 1.5 for micro, else 3.5)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=None, help="pictures drawn at once (default 64 for micro, else 4)"
    )


def _add_picture_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of benchmarks that draw several pictures of each prompt."""
    parser.add_argument("--samples", type=int, default=None, help="pictures of each prompt (default 4)")
    parser.add_argument("--width", type=int, default=None, help="pixels (default 512)")
    parser.add_argument("--height", type=int, default=None, help="pixels (default 512)")


def _add_judge_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of benchmarks that ask a model; OPENAI_API_KEY in the environment is its key."""
    parser.add_argument("--judge-base-url", help="OpenAI-compatible endpoint, such as http://localhost:8000/v1")
    parser.add_argument("--judge-model", help="the model's name there; OPENAI_API_KEY in the environment is its key")
    parser.add_argument(
        "--judge-prompts", type=Path, default=None,
        help="folder whose edit_success.txt, edit_quality.txt, dpg.txt or imgedit.json replace the shipped questions",
    )  # fmt: skip
    parser.add_argument("--judge-cache", type=Path, default=None, help="folder of kept answers (default OUT/judge)")
    parser.add_argument("--judge-concurrency", type=int, default=16, help="questions at a time (default 16)")
    parser.add_argument("--judge-timeout", type=float, default=60.0, help="seconds for an answer (default 60)")


def main(argv: list[str]) -> int:
    """Run `unipic2 train|eval|micro ...`; returns the exit status. Raises InputError for what the user can mend."""
    if argv[:1] == ["train"]:
        return _train(argv[1:])
    if argv[:2] == ["data", "cache"]:
        return _cache(argv[2:])
    arguments, rest = build_parser().parse_known_args(argv)
    for name, least in _LEAST.items():
        value = getattr(arguments, name, None)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')}", found=value, expected=f"at least {least}")
    if arguments.command == "micro" and arguments.action == "make":
        from .micro.make import make

        work = arguments.work or arguments.out.with_name(f"{arguments.out.name}-work")
        results = make(arguments.out, work, arguments.seed, arguments.codec_steps, arguments.decoder_steps, rest)
        _print_scores(results, arguments.out)
        return 0
    if arguments.command == "micro" and arguments.action == "metaquery":
        from .micro.make_metaquery import make_metaquery

        work = arguments.work or arguments.out.with_name(f"{arguments.out.name}-work")
        results = make_metaquery(arguments.out, work, arguments.base, arguments.seed, arguments.vlm_steps, rest)
        asked = results["questions"]
        sys.stdout.write(f"questions: {asked['accuracy']:.3f} of {asked['n']} right\n")
        _print_scores(results, arguments.out)
        return 0
    if rest:
        build_parser().error(f"unrecognized arguments: {' '.join(rest)}")
    if arguments.command == "data":
        return _check_data(arguments)
    if arguments.command == "export":
        return _export(arguments)
    if arguments.command == "micro":
        from .micro.sheet import world_sheet
        from .sheets import save_sheet

        save_sheet(world_sheet(arguments.seed), arguments.out)
        sys.stdout.write(f"{arguments.out}\n")
        return 0
    return _compare(arguments) if arguments.command == "compare" else _evaluate(arguments)


def _train(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(f"usage: unipic2 train METHOD --config FILE [--field value ...]\n\n{_TRAIN_HELP}")
        return 0
    check_one_of("training method", argv[0], TRAIN_METHODS)
    config, num_processes, argv = _launch_options(argv)
    if config is not None:
        return _launch(config, num_processes, argv)
    return importlib.import_module(f".{argv[0]}", __package__).main(argv[1:])


def _cache(argv: list[str]) -> int:
    """Hand `data cache [METHOD] ...` on to the method, which knows the settings."""
    named = bool(argv) and not argv[0].startswith("-")
    method = argv[0] if named else CACHE_METHODS[0]
    check_one_of("training method of data cache", method, CACHE_METHODS)
    return importlib.import_module(f".{method}", __package__).cache(argv[1:] if named else argv)


def _launch_options(argv: list[str]) -> tuple[str | None, int | None, list[str]]:
    """Take accelerate's options out of a method's flags."""
    parser = argparse.ArgumentParser(prog="unipic2 train", add_help=False, allow_abbrev=False)
    parser.add_argument("--accelerate_config")
    parser.add_argument("--num_processes", type=int)
    options, rest = parser.parse_known_args(argv)
    if options.num_processes is not None and options.accelerate_config is None:
        raise InputError("--num_processes", found="no --accelerate_config", expected=_profiles())
    return options.accelerate_config, options.num_processes, rest


def _profiles() -> str:
    return f"--accelerate_config {', '.join(ACCELERATE_CONFIGS)}, or accelerate's YAML file"


def _launch(config: str, num_processes: int | None, argv: list[str]) -> int:
    """Start the processes by `accelerate launch` and return its status: 0, or 1 where one of them failed."""
    if config in ACCELERATE_CONFIGS:
        path = Path(__file__).resolve().parent / "configs" / "accelerate" / f"{config}.yaml"
    else:
        path = Path(config)
    if not path.is_file():
        raise InputError("--accelerate_config", found=config, expected=_profiles())
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]
    command += ["--num_processes", str(num_processes)] if num_processes is not None else []
    process = subprocess.Popen([*command, "-m", "unipic2.cli", "train", *argv])
    try:
        return process.wait()
    except KeyboardInterrupt:  # also a SIGTERM; the workers have sessions of their own, and torch's agent ends them
        process.terminate()
        process.wait()
        raise


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}", found="a file", expected="a folder, new or not")


def _check_data(arguments: argparse.Namespace) -> int:
    from .data.buckets import aspect_buckets
    from .data.check import check, preview, summary, write_report
    from .data.sources import open_source, open_sources

    check_share("--max-broken", arguments.max_broken)
    if arguments.out is not None:
        _check_folder(arguments.out)
    buckets = aspect_buckets(arguments.resolution, arguments.bucket_mode, arguments.max_aspect)
    open_one = partial(open_source, needs_target=not arguments.no_target)
    sources = open_sources(arguments.dataset, arguments.image_root, arguments.split, arguments, open_one)
    report = check(sources, buckets, arguments.num_proc)
    sys.stdout.write(f"{summary(report)}\n")
    if arguments.out is not None:
        write_report(report, preview(sources), arguments.out)
        sys.stdout.write(f"{arguments.out}\n")
    return int(report["broken"] > arguments.max_broken * report["rows"])


def _export(arguments: argparse.Namespace) -> int:
    import torch

    from ..core.checkpoint import DYNAMIC_SHIFT_KEY, export_single_file, read_header, trained_shift
    from ..core.micro import SHIFT
    from .kontext_config import EXPORT_DTYPES
    from .kontext_pipeline import StableDiffusion3KontextPipeline
    from .loras import merged

    if arguments.dtype is not None:
        check_one_of("--dtype", arguments.dtype, EXPORT_DTYPES)
    if arguments.out.suffix != ".safetensors":
        raise InputError(f"--out {arguments.out}", found=f"suffix {arguments.out.suffix!r}", expected=".safetensors")
    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    others = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "conditioner"))
    folder = StableDiffusion3KontextPipeline.find_folder(arguments.model, others)
    weights, said = (None, None) if arguments.lora is None else merged(folder, arguments.lora)
    export_single_file(folder, arguments.out, said, dtype, weights)
    metadata = read_header(arguments.out).metadata
    if (shift := trained_shift(metadata, arguments.out)) not in (None, SHIFT):
        remedy = "put ModelSamplingSD3 with it behind Load Diffusion Model; UniPic2 Loader does so by itself"
        sys.stderr.write(f"trained with shift {shift}: {remedy}\n")
    if DYNAMIC_SHIFT_KEY in metadata:
        remedy = "put ModelSamplingFlux with them behind the loader"
        sys.stderr.write(f"trained with {metadata[DYNAMIC_SHIFT_KEY]} by the picture's size: {remedy}\n")
    sys.stdout.write(f"{arguments.out}\n")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from .evaluation.command import evaluate

    check_share("--min-coverage", arguments.min_coverage)
    _check_folder(arguments.out)
    if arguments.batch_size is None:
        arguments.batch_size = 64 if arguments.benchmark == "micro" else 4
    results = evaluate(arguments)
    if results is None:
        return 0
    measures = results["measures"]
    for task, found in results["tasks"].items():
        means = ", ".join(f"{name} {found[name]:.3f}" for name in measures)
        kinds = _kinds(found["kinds"], measures[0]) if found["kinds"] else ""
        sys.stdout.write(f"{task}: {means} of {found['n']}{kinds}\n")
    sys.stdout.write(f"overall: {results['overall']:.3f}\n{arguments.out / 'results.json'}\n")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from .evaluation.command import compare_runs

    if arguments.out is not None:
        _check_folder(arguments.out)
    if len(arguments.names) < 2:
        raise InputError("compare", found="one folder or model", expected="two or more")
    arguments.batch_size = arguments.batch_size or 64
    sys.stdout.write(f"{compare_runs(arguments.names, arguments.out, arguments)}\n")
    return 0


def _kinds(kinds: dict, measure: str) -> str:
    return f" ({', '.join(f'{kind} {found[measure]:.2f}' for kind, found in kinds.items())})"


def _print_scores(results: dict, where: Path) -> None:
    for task in ("t2i", "edit"):
        kinds = _kinds(results[task]["kinds"], "strict")
        sys.stdout.write(f"{task}: strict {results[task]['strict']:.3f} of {results[task]['n']}{kinds}\n")
    sys.stdout.write(f"{where}\n")
