"""A benchmark's folder: `run.json` (what was asked of which model), `sources/` and `images/`, then the scores.

Drawing goes on where it was stopped, and is shared among processes that accelerate started. Each item has a seed of
its own, so neither changes a picture beyond rounding.
"""

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from scipy.stats import bootstrap
from tqdm import tqdm

from ...core.errors import InputError
from ...core.files import read_json, write_file
from ...core.micro import component_dir
from ...core.pictures import to_rgb
from ..sheets import save_sheet
from .items import Benchmark, Item, Score, digest

RUN_FILE, RESULTS_FILE = "run.json", "results.json"
_VERSIONS = ("torch", "diffusers", "transformers")
_PARTS = ("transformer", "vae", "conditioner", *(f"text_encoder{n}" for n in ("", "_2", "_3")))
_RESAMPLES = 2000


def model_digest(folder: Path) -> str:
    """Return a hash of all weights of a pipeline's folder."""
    found = hashlib.sha256()
    for part in _PARTS:
        for file in sorted(component_dir(folder, part).glob("*.safetensors")):
            found.update(f"{part}/{file.name}".encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 24):
                    found.update(block)
    return found.hexdigest()


def read_run(out: Path) -> dict:
    """Return what was drawn in a folder, {} where nothing was. Raises InputError for a broken file."""
    return read_json(out / RUN_FILE, "a benchmark's folder") if (out / RUN_FILE).is_file() else {}


def _picture_path(out: Path, item: Item) -> Path:
    return out / "images" / f"{item.id}.png"


def generate(pipeline, benchmark: Benchmark, out: Path, about: dict, sampling: dict, batch_size: int) -> None:
    """Draw what is missing in `out`.

    Args:
        pipeline: of either kind.
        benchmark: what to draw.
        out: the folder; made if need be.
        about: `model`, its name, and what the items were made from, such as `n` and `seed`; for the record.
        sampling: `num_inference_steps` and `guidance_scale`.
        batch_size: pictures drawn at once.

    Raises:
        InputError: `out` holds pictures of another model, or of other items or settings.
    """
    state = PartialState()
    run = {
        "benchmark": benchmark.name,
        "prompts": digest(benchmark.items),
        **about,
        "weights": model_digest(pipeline.loaded_from),
        "sampling": sampling,
        "versions": {name: version(name) for name in _VERSIONS},
    }
    _check_same(out, run)
    if state.is_main_process:
        (out / "images").mkdir(parents=True, exist_ok=True)
        write_file(out / RUN_FILE, json.dumps(run, indent=2) + "\n")
        for item in benchmark.items:
            path = out / "sources" / f"{item.id}.png"
            if item.source is not None and not path.is_file():
                path.parent.mkdir(exist_ok=True)
                save_sheet(item.source, path)
    state.wait_for_everyone()
    missing = [item for item in benchmark.items if not _picture_path(out, item).is_file()]
    pipeline.set_progress_bar_config(disable=True)
    with state.split_between_processes(missing) as mine:
        progress = tqdm(total=len(mine), desc=f"drawing {benchmark.name}", disable=not state.is_main_process)
        for task in dict.fromkeys(item.task for item in mine):
            of_task = [item for item in mine if item.task == task]
            for start in range(0, len(of_task), batch_size):
                _draw(pipeline, of_task[start : start + batch_size], benchmark, out, sampling)
                progress.update(len(of_task[start : start + batch_size]))
        progress.close()
    state.wait_for_everyone()


def _draw(pipeline, items: list[Item], benchmark: Benchmark, out: Path, sampling: dict) -> None:
    width, height = benchmark.size
    images = pipeline(
        [item.prompt for item in items],
        image=None if items[0].source is None else [item.source for item in items],
        width=width,
        height=height,
        generator=[torch.Generator().manual_seed(item.seed) for item in items],
        **sampling,
    ).images
    for item, image in zip(items, images, strict=True):
        save_sheet(image, _picture_path(out, item))


def _check_same(out: Path, run: dict) -> None:
    if not (out / RUN_FILE).is_file():
        return
    before = read_run(out)
    for name in ("benchmark", "prompts", "weights", "sampling"):
        if before.get(name) != run[name]:
            raise InputError(
                f"{out / RUN_FILE}, {name}",
                found=before.get(name),
                expected=f"{run[name]}, as this run has",
                remedy="Name another folder with --out, or delete this one.",
            )


def score(benchmark: Benchmark, out: Path, min_coverage: float = 1.0) -> tuple[dict, list[Image.Image | None]]:
    """Judge the pictures in `out/images` and write `results.json`.

    Args:
        benchmark: what was asked for.
        out: the folder; `run.json` need not be there.
        min_coverage: share of the items that must have a picture that can be read.

    Returns:
        The results: `coverage` (`expected`, `judged`, and the ids that are `missing` or `broken`), and for each task
        `strict`, `soft`, `n`, `interval` (95 %, bootstrap) and the same for its `kinds`; `overall`, the unweighted
        mean over the tasks; `items`. And the pictures, None where there is none.

    Raises:
        InputError: too few pictures can be judged.
    """
    images, missing, broken = _read_pictures(benchmark, out)
    judged = [(item, image) for item, image in zip(benchmark.items, images, strict=True) if image is not None]
    if not judged or len(judged) < min_coverage * len(images):
        some = ", ".join([*missing, *broken][:5])
        raise InputError(
            f"pictures in {out / 'images'}",
            found=f"{len(judged)} of {len(images)} (missing: {len(missing)}, broken: {len(broken)}; such as {some})",
            expected=f"at least {min_coverage:.0%} of them",
            remedy="Draw the others, or accept a partial score with --min-coverage.",
        )
    scores = benchmark.judge([item for item, _ in judged], [image for _, image in judged])
    rows = list(zip([item for item, _ in judged], scores, strict=True))
    results: dict = {
        **read_run(out),
        "benchmark": benchmark.name,
        "prompts": digest(benchmark.items),
        "coverage": {"expected": len(images), "judged": len(judged), "missing": missing, "broken": broken},
    }
    tasks = dict.fromkeys(item.task for item, _ in rows)
    for task in tasks:
        of_task = [(item, found) for item, found in rows if item.task == task]
        kinds = dict.fromkeys(item.kind for item, _ in of_task)
        results[task] = {
            **_figures([found for _, found in of_task]),
            "kinds": {kind: _figures([s for item, s in of_task if item.kind == kind]) for kind in kinds},
        }
    results["overall"] = round(float(np.mean([results[task]["strict"] for task in tasks])), 4)
    results["items"] = [
        {"id": item.id, "task": item.task, "kind": item.kind, "prompt": item.prompt, "seed": item.seed,
         "strict": s.strict, "soft": round(s.soft, 4), "notes": list(s.notes)}
        for item, s in rows
    ]  # fmt: skip
    write_file(out / RESULTS_FILE, json.dumps(results, indent=1) + "\n")
    return results, images


def _read_pictures(benchmark: Benchmark, out: Path) -> tuple[list[Image.Image | None], list[str], list[str]]:
    """Return all items' pictures, and the ids of those that are missing, or broken or of another size."""
    images, missing, broken = [], [], []
    for item in benchmark.items:
        path, image = _picture_path(out, item), None
        if not path.is_file():
            missing.append(item.id)
        else:
            try:
                with Image.open(path) as found:
                    image = to_rgb(found, str(path))[0] if found.size == benchmark.size else None
            except (OSError, SyntaxError, ValueError):  # what Pillow raises for broken files
                image = None
            if image is None:
                broken.append(item.id)
        images.append(image)
    return images, missing, broken


def _figures(scores: Sequence[Score]) -> dict:
    strict = np.array([s.strict for s in scores])
    return {
        "strict": round(float(strict.mean()), 4),
        "soft": round(float(np.mean([s.soft for s in scores])), 4),
        "n": len(scores),
        "interval": mean_interval(strict),
    }


def mean_interval(values: np.ndarray) -> list[float]:
    """Return the bootstrap interval of 95 % of a mean, percentiles of 2,000 resamples, always the same ones."""
    if len(values) < 2 or (values == values[0]).all():
        return [round(float(values.mean()), 4)] * 2
    rng = np.random.default_rng(0)
    found = bootstrap((values,), np.mean, n_resamples=_RESAMPLES, method="percentile", rng=rng).confidence_interval
    return [round(float(found.low), 4), round(float(found.high), 4)]
