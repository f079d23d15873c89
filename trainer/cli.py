"""The trainer's part of the `unipic2` command: `train`, `eval` and `micro`."""

import argparse
import json
import sys
from pathlib import Path

from .micro import CODEC_STEPS, DECODER_STEPS

TRAIN_METHODS = ("pretrain",)
_LEAST = {"n": 1, "steps": 1, "seed": 0, "codec_steps": 1, "decoder_steps": 1}
"""Smallest values of whole numbers on the command line."""

_TRAIN_HELP = """\
Methods:
  pretrain   flow matching on text-to-image and edits

Settings come from a YAML file and from flags; flags win, unknown names are errors:
  unipic2 train pretrain --config my.yaml --learning_rate 5e-4 --output_dir runs/a

`unipic2 train pretrain --help` lists every setting with its unit.
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `eval` and `micro` (`train` hands its flags on to the method)."""
    parser = argparse.ArgumentParser(prog="unipic2")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("train", help="train a model", epilog=_TRAIN_HELP)

    evaluate = commands.add_parser("eval", help="score a model").add_subparsers(dest="benchmark", required=True)
    micro = evaluate.add_parser("micro", help="held-out prompts and edits of the micro world, judged by the verifier")
    micro.add_argument("--model", default="micro", help="pipeline folder, or `micro` for the bundled weights")
    micro.add_argument("--out", type=Path, required=True, help="folder for results.json and results.png")
    micro.add_argument("--n", type=int, default=256, help="prompts, and as many edits (default 256)")
    micro.add_argument("--seed", type=int, default=1234, help="seed of tasks and noise (default 1234)")
    micro.add_argument("--steps", type=int, default=None, help="denoising steps (default: the micro preset's)")
    micro.add_argument("--guidance-scale", type=float, default=None, help="guidance (default: the micro preset's)")

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
    return parser


def main(argv: list[str]) -> int:
    """Run `unipic2 train|eval|micro ...`; returns the exit status. Raises InputError for what the user can mend."""
    if argv[:1] == ["train"]:
        return _train(argv[1:])
    from ..core.errors import InputError

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
    if rest:
        build_parser().error(f"unrecognized arguments: {' '.join(rest)}")
    if arguments.command == "micro":
        from .micro.sheet import save_sheet, world_sheet

        save_sheet(world_sheet(arguments.seed), arguments.out)
        sys.stdout.write(f"{arguments.out}\n")
        return 0
    return _eval_micro(arguments)


def _train(argv: list[str]) -> int:
    from ..core.errors import InputError

    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(f"usage: unipic2 train METHOD --config FILE [--field value ...]\n\n{_TRAIN_HELP}")
        return 0
    if argv[0] not in TRAIN_METHODS:
        raise InputError("training method", found=repr(argv[0]), expected=f"one of {', '.join(TRAIN_METHODS)}")
    from .pretrain import main as pretrain_main

    return pretrain_main(argv[1:])


def _eval_micro(arguments: argparse.Namespace) -> int:
    import torch

    from ..core.errors import InputError
    from ..core.files import write_file
    from ..core.micro import weights_dir
    from .kontext_pipeline import StableDiffusion3KontextPipeline
    from .micro.evaluate import evaluate
    from .micro.sheet import result_sheet, save_sheet

    if arguments.out.exists() and not arguments.out.is_dir():
        raise InputError(f"--out {arguments.out}", found="a file", expected="a folder, new or not")
    arguments.out.mkdir(parents=True, exist_ok=True)
    folder = weights_dir() if arguments.model == "micro" else Path(arguments.model)
    pipeline = StableDiffusion3KontextPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    sampling = {"num_inference_steps": arguments.steps, "guidance_scale": arguments.guidance_scale}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    results, drawn = evaluate(pipeline, arguments.n, arguments.seed, **sampling)
    results["model"] = arguments.model
    save_sheet(result_sheet(drawn), arguments.out / "results.png")
    write_file(arguments.out / "results.json", json.dumps(results, indent=2) + "\n")
    _print_scores(results, arguments.out / "results.json")
    return 0


def _print_scores(results: dict, where: Path) -> None:
    for task in ("t2i", "edit"):
        kinds = ", ".join(f"{kind} {score['strict']:.2f}" for kind, score in results[task]["kinds"].items())
        sys.stdout.write(f"{task}: strict {results[task]['strict']:.3f} of {results[task]['n']} ({kinds})\n")
    sys.stdout.write(f"{where}\n")
