"""`unipic2 eval` and `unipic2 compare`."""

import json
from argparse import Namespace
from pathlib import Path

import torch
from accelerate import PartialState

from ...core.errors import InputError
from ...core.files import write_file
from ...core.micro import GUIDANCE_SCALE, NUM_INFERENCE_STEPS
from ..rewards.geneval import GenEval
from ..script import open_model
from ..sheets import Cell, contact_sheet, save_sheet, stack
from .compare import COMPARISON_FILE, SHEET_FILE, compare, comparison_sheet, table
from .geneval import SAMPLES, geneval_benchmark, read_prompts
from .items import Benchmark
from .micro import micro_benchmark
from .page import write_page
from .run import generate, read_run, score


def evaluate(arguments: Namespace) -> dict | None:
    """Draw, score, or both; returns the results, None without scoring and in processes other than the first.

    Raises:
        InputError: see `run.generate` and `run.score`; or a folder that was drawn with other settings.
    """
    out = arguments.out
    benchmark, about, sampling = (_micro if arguments.benchmark == "micro" else _geneval)(arguments)
    if arguments.only != "score":
        on_gpu = torch.cuda.is_available()
        half = on_gpu and arguments.benchmark != "micro"
        pipeline = open_model(arguments.model, torch_dtype=torch.bfloat16 if half else torch.float32)
        if on_gpu:
            pipeline.to(PartialState().device)
        generate(pipeline, benchmark, out, {"model": arguments.model, **about}, sampling, arguments.batch_size)
    if arguments.only == "draw" or not PartialState().is_main_process:
        return None
    results, images = score(benchmark, out, arguments.min_coverage)
    save_sheet(_sheet(benchmark, results, images), out / "results.png")
    write_page(out, results)
    return results


def _chosen(arguments: Namespace, defaults: dict) -> dict:
    """Return flags, as the folder was drawn where they are not given, else by default."""
    before, chosen = read_run(arguments.out), {}
    for name, default in defaults.items():
        given = getattr(arguments, name)
        chosen[name] = before.get(name, default) if given is None else given
        if chosen[name] != before.get(name, chosen[name]):
            remedy = "Name another folder with --out, or delete this one."
            expected = f"{before[name]}, as {arguments.out} was drawn"
            raise InputError(f"--{name}", found=given, expected=expected, remedy=remedy)
    return chosen


def _sampling(arguments: Namespace, steps: int, guidance_scale: float) -> dict:
    return {
        "num_inference_steps": steps if arguments.steps is None else arguments.steps,
        "guidance_scale": guidance_scale if arguments.guidance_scale is None else arguments.guidance_scale,
    }


def _micro(arguments: Namespace) -> tuple[Benchmark, dict, dict]:
    chosen = _chosen(arguments, {"n": 256, "seed": 1234})
    return (
        micro_benchmark(chosen["n"], chosen["seed"]), chosen,
        _sampling(arguments, NUM_INFERENCE_STEPS, GUIDANCE_SCALE),
    )  # fmt: skip


def _geneval(arguments: Namespace) -> tuple[Benchmark, dict, dict]:
    chosen = _chosen(arguments, {"samples": SAMPLES, "seed": 0, "width": 512, "height": 512})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    benchmark = geneval_benchmark(
        read_prompts(arguments.prompts), lambda: GenEval.from_pretrained(arguments.detector, arguments.clip, device),
        chosen["seed"], (chosen["width"], chosen["height"]), chosen["samples"], arguments.exact_counts,
    )  # fmt: skip
    return benchmark, chosen, _sampling(arguments, 50, 3.5)


def _sheet(benchmark: Benchmark, results: dict, images: list, limit: int = 48):
    """Return the first pictures of each task, sources beside edits, framed by the verdict."""
    passed = {item["id"]: item["strict"] == 1 for item in results["items"]}
    sheets = []
    for task in dict.fromkeys(item.task for item in benchmark.items):
        cells = [
            Cell(item.prompt, [*([] if item.source is None else [item.source]), image], passed[item.id])
            for item, image in zip(benchmark.items, images, strict=True)
            if item.task == task and image is not None
        ][:limit]
        if cells:
            sheets.append(contact_sheet(cells, 12 // len(cells[0].images)))
    return stack(sheets)


def compare_folders(folders: list[Path], out: Path | None) -> str:
    """Return the table, and write `comparison.json` and `comparison.png` into `out`, if it is given."""
    found = compare(folders)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_file(out / COMPARISON_FILE, json.dumps(found, indent=2) + "\n")
        save_sheet(comparison_sheet(folders), out / SHEET_FILE)
    return table(found)
