"""The command line `unipic2`: draw with ComfyUI (`run`), train, evaluate."""

import argparse
import contextlib
import importlib.metadata
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from ..core.errors import InputError
from . import run as run_command

EPILOG = """\
examples:
  unipic2 run micro_edit --image photo.png --prompt "make the red circle blue" -o edited.png
  unipic2 run my_workflow.json --seed 7 --set KSampler.steps=30
  unipic2 train pretrain --config pretrain.yaml --learning_rate 5e-4
  unipic2 eval micro --model micro --out results/

`unipic2 run --help`, `unipic2 train --help`, ... explain each command.
"""

TRAINER_COMMANDS = {
    "train": "train a model: train METHOD --config FILE [--field value ...]",
    "data": "training data: data check DATASET ..., data cache [metaquery] --config FILE",
    "export": "write a trained model as one file for ComfyUI: export --model DIR --out FILE",
    "eval": "measure a model: eval BENCHMARK --model DIR_OR_NAME --out DIR",
    "compare": "measured models side by side: compare DIR DIR ...",
    "micro": "the micro world: scenes, contact sheets, the pretrained model",
}


def version() -> str:
    """Return this checkout's version, else the installed one's."""
    project = Path(__file__).resolve().parent.parent / "pyproject.toml"
    if project.is_file():
        found = re.search(r'^version\s*=\s*"([^"]+)"', project.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found.group(1)
    return importlib.metadata.version("unipic2")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status.

    Args:
        argv: arguments without the program's name; None takes the process's own.

    Returns:
        0 done, 2 bad input (one line on stderr says what), 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with _terminated_as_interrupted():
            if arguments[:1] and arguments[0] in TRAINER_COMMANDS:
                return _trainer(arguments)
            return _parse_and_run(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder without rights, a name that is too long
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parse_and_run(arguments: list[str]) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("unipic2", description=__doc__, epilog=EPILOG, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"unipic2 {version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    about = "queue a workflow on a real ComfyUI and save the pictures"
    run_parser = commands.add_parser(
        "run", help=about, description=about, epilog=run_command.EXAMPLES, formatter_class=raw
    )
    run_command.add_arguments(run_parser)
    run_parser.set_defaults(command=run_command.run)
    for name, text in TRAINER_COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    try:
        args = parser.parse_args(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    if not hasattr(args, "command"):
        parser.print_help(sys.stderr)
        return 2
    return args.command(args)


def _trainer(arguments: list[str]) -> int:
    """Hand all but `run` to the trainer, which needs packages that the pack does not."""
    try:
        from ..trainer.cli import main as trainer_main

        return trainer_main(arguments)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("", __package__.split(".")[0]):
            raise
        remedy = run_command.REMEDY.format("train")
        raise InputError(f"unipic2 {arguments[0]} needs the package {error.name}", remedy=remedy) from error


@contextlib.contextmanager
def _terminated_as_interrupted():
    """Let `kill` end us as Ctrl-C does, so that a started server and temporary files go with us."""

    def interrupt(signum, frame):
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
