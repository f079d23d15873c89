"""A benchmark's folder: `run.json` (what was asked of which model), `sources/` and `images/`, then the scores.

Drawing goes on where it was stopped, and is shared among processes that accelerate started. Each item has a seed of
its own, so neither changes a picture beyond rounding.
"""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from ...core.errors import InputError
from ...core.files import VLM_LORA_FOLDER, read_json, write_file
from ...core.pictures import to_rgb
from ..sheets import save_sheet
from .figures import figures_of_kinds, grouped
from .items import Benchmark, Item

RUN_FILE, RESULTS_FILE = "run.json", "results.json"
_VERSIONS = ("torch", "diffusers", "transformers")
PARTS = ("transformer", "vae", "conditioner", *(f"text_encoder{n}" for n in ("", "_2", "_3")), VLM_LORA_FOLDER)
"""Parts of a pipeline that have weights."""


def model_digest(parts: dict[str, Path]) -> str:
    """Return a hash of a model's weights: name -> folder of safetensors files, or one file."""
    found = hashlib.sha256()
    for part, place in sorted(parts.items()):
        for file in [place] if place.is_file() else sorted(place.glob("*.safetensors")):
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


def generate(
    pipeline, benchmark: Benchmark, out: Path, about: dict, sampling: dict, batch_size: int, weights: str
) -> None:
    """Draw what is missing in `out`.

    Args:
        pipeline: of either kind.
        benchmark: what to draw.
        out: the folder; made if need be.
        about: `model`, its name, and what the items were made from, such as `n` and `seed`; for the record.
        sampling: `num_inference_steps` and `guidance_scale`.
        batch_size: pictures drawn at once.
        weights: hash of the model, see `model_digest`.

    Raises:
        InputError: `out` holds pictures of another model, or of other items or settings.
    """
    state = PartialState()
    run = {
        "benchmark": benchmark.name,
        "prompts": benchmark.prompts,
        **about,
        "weights": weights,
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
                save_sheet(resized_source(item), path)
    state.wait_for_everyone()
    missing = [item for item in benchmark.items if not _picture_path(out, item).is_file()]
    pipeline.set_progress_bar_config(disable=True)
    with state.split_between_processes(missing) as mine:
        progress = tqdm(total=len(mine), desc=f"drawing {benchmark.name}", disable=not state.is_main_process)
        for kind in dict.fromkeys((item.task, item.size) for item in mine):
            alike = [item for item in mine if (item.task, item.size) == kind]
            for start in range(0, len(alike), batch_size):
                _draw(pipeline, alike[start : start + batch_size], out, sampling)
                progress.update(len(alike[start : start + batch_size]))
        progress.close()
    state.wait_for_everyone()


def resized_source(item: Item) -> Image.Image:
    """Return an item's source picture at the size that is drawn, to be looked at."""
    source = item.source()
    return source if source.size == item.size else source.resize(item.size, Image.Resampling.LANCZOS)


def _draw(pipeline, items: list[Item], out: Path, sampling: dict) -> None:
    width, height = items[0].size
    images = pipeline(
        [item.prompt for item in items],
        image=None if items[0].source is None else [item.source() for item in items],
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


def score(
    benchmark: Benchmark, out: Path, min_coverage: float = 1.0, about: dict | None = None
) -> tuple[dict, list[Image.Image | None]]:
    """Judge the pictures in `out/images` and write `results.json`.

    Args:
        benchmark: what was asked for.
        out: the folder; `run.json` need not be there.
        min_coverage: share of the items that must have a picture that can be read.
        about: what the items were made from, as for `generate`.

    Returns:
        The results: `coverage` (`expected`, `judged`, and the ids that are `missing`, `broken` or `unjudged`);
        `tasks`, for each its measures, `n`, `interval` (95 % of the first measure, bootstrap) and the same for its
        `kinds`; `overall`, the unweighted mean over the tasks; what the benchmark sums up; `judge`; `items`. And the
        pictures, None where there is none.

    Raises:
        InputError: too few pictures can be judged.
    """
    images, missing, broken = _read_pictures(benchmark, out)
    drawn = [(item, image) for item, image in zip(benchmark.items, images, strict=True) if image is not None]
    _check_coverage(out, len(drawn), len(images), min_coverage, {"missing": missing, "broken": broken})
    scores = benchmark.judge([item for item, _ in drawn], [image for _, image in drawn])
    about_judge = benchmark.about_judge()
    rows = [(item, found) for (item, _), found in zip(drawn, scores, strict=True) if found is not None]
    unjudged = [item.id for (item, _), found in zip(drawn, scores, strict=True) if found is None]
    absent = {"missing": missing, "broken": broken, "unjudged": unjudged}
    _check_coverage(out, len(rows), len(images), min_coverage, absent, about_judge.get("failures"))
    results: dict = {
        **read_run(out),
        **(about or {}),
        "benchmark": benchmark.name,
        "prompts": benchmark.prompts,
        "measures": benchmark.measures,
        "highest": benchmark.highest,
        "passing": benchmark.passing,
        "mean_of_kinds": benchmark.mean_of_kinds,
        "coverage": {"expected": len(images), "judged": len(rows), **absent},
    }
    tasks = {
        task: figures_of_kinds(of_task, benchmark.measures, benchmark.mean_of_kinds)
        for task, of_task in grouped(rows, lambda item: item.task).items()
    }
    results["tasks"] = tasks
    results["overall"] = round(float(np.mean([found[benchmark.measures[0]] for found in tasks.values()])), 4)
    results |= benchmark.summary(rows)
    if about_judge:
        results["judge"] = about_judge
    results["items"] = [
        {
            **{name: getattr(item, name) for name in ("id", "task", "kind", "prompt", "seed", "group")},
            **{name: round(value, 4) for name, value in zip(benchmark.measures, found.values, strict=True)},
            "notes": list(found.notes),
            **found.details,
        }
        for item, found in rows
    ]
    write_file(out / RESULTS_FILE, json.dumps(results, indent=1) + "\n")
    return results, images


def _check_coverage(
    out: Path, judged: int, expected: int, min_coverage: float, absent: dict[str, list[str]],
    failures: dict[str, int] | None = None,
) -> None:  # fmt: skip
    if judged and judged >= min_coverage * expected:
        return
    some = ", ".join([name for names in absent.values() for name in names][:5])
    counts = ", ".join(f"{name}: {len(names)}" for name, names in absent.items())
    reasons = "".join(f"; {reason}: {count} questions" for reason, count in (failures or {}).items())
    raise InputError(
        f"pictures in {out / 'images'}",
        found=f"{judged} of {expected} ({counts}; such as {some}{reasons})",
        expected=f"at least {min_coverage:.0%} of them",
        remedy="Draw the others, or ask again, as answers are kept, or accept a partial score with --min-coverage.",
    )


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
                    fits = benchmark.any_size or found.size == item.size
                    image = to_rgb(found, str(path))[0] if fits else None
            except (OSError, SyntaxError, ValueError):  # what Pillow raises for broken files
                image = None
            if image is None:
                broken.append(item.id)
        images.append(image)
    return images, missing, broken
