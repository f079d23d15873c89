"""`unipic2 eval` and `unipic2 compare`."""

import json
import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import AutoencoderTiny

from ...core.errors import InputError
from ...core.files import PIPELINE_INDEX, write_file
from ...core.micro import BUNDLED_MODELS, GUIDANCE_SCALE, NUM_INFERENCE_STEPS, component_dir
from ..kontext_pipeline import StableDiffusion3KontextPipeline
from ..loras import add_lora
from ..metaquery_pipeline import MetaQueryPipeline, load_transformer, vlm_folder
from ..micro import HELD_OUT_COUNT, HELD_OUT_SEED
from ..rewards.endpoint import Endpoint
from ..rewards.geneval import SHORTEST_EDGE, GenEval
from ..rewards.judge import PROMPTS as EDIT_PROMPTS
from ..rewards.judge import EditJudge
from ..script import open_model
from ..sheets import Cell, contact_sheet, save_sheet, stack
from . import dpg, gedit, geneval, imgedit
from .compare import COMPARISON_FILE, SHEET_FILE, compare, comparison_sheet, read_results, table
from .items import Benchmark
from .judged import PROMPTS
from .micro import micro_benchmark
from .page import write_page
from .published import quoted
from .run import PARTS, RESULTS_FILE, generate, model_digest, read_run, resized_source, score

_JUDGE_FILES = ("edit_success.txt", "edit_quality.txt", "dpg.txt", "imgedit.json")
_EDGE = 512  # pixels: what the published model edits at


def evaluate(arguments: Namespace) -> dict | None:
    """Draw, score, or both; returns the results, None without scoring and in processes other than the first.

    Raises:
        InputError: see `run.generate` and `run.score`; a folder that was drawn with other settings; or no judge for a
            benchmark that needs one.
    """
    out = arguments.out
    benchmark, about, sampling = _BENCHMARKS[arguments.benchmark](arguments)
    if arguments.only != "score":
        on_gpu = torch.cuda.is_available()
        half = on_gpu and arguments.benchmark != "micro"
        pipeline, weights = _open(arguments, torch.bfloat16 if half else torch.float32)
        if on_gpu:
            pipeline.to(PartialState().device)
        parts = {name: getattr(arguments, name) for name in ("model", "lora", "metaquery", "vlm")}
        of_model = {name: str(value) for name, value in parts.items() if value is not None}
        generate(pipeline, benchmark, out, {**of_model, **about}, sampling, arguments.batch_size, weights)
    if arguments.only == "draw" or not PartialState().is_main_process:
        return None
    results, images = score(benchmark, out, arguments.min_coverage, about)
    save_sheet(_sheet(benchmark, results, images), out / "results.png")
    write_page(out, results, quoted(arguments.benchmark))
    return results


def _open(arguments: Namespace, dtype: torch.dtype):
    """Return the pipeline, and a hash of all its weights. Raises InputError for a model that cannot be loaded."""
    if arguments.metaquery is None:
        pipeline, parts = open_model(arguments.model, arguments.vlm, torch_dtype=dtype), {}
    else:
        folder = StableDiffusion3KontextPipeline.find_folder(arguments.model)
        transformer = load_transformer(folder, dtype)
        pipeline = MetaQueryPipeline.from_pretrained(
            arguments.metaquery, arguments.vlm, torch_dtype=dtype, transformer=transformer
        )
        parts = {"transformer": folder / "transformer"}
    parts = {**{part: component_dir(pipeline.loaded_from, part) for part in PARTS}, **parts}
    if arguments.benchmark == "micro" and not isinstance(pipeline.vae, AutoencoderTiny):
        expected = "a micro model: the micro benchmark is of 64x64 pictures"
        raise InputError(f"--model {arguments.model}", found="a model for large pictures", expected=expected)
    if isinstance(pipeline, MetaQueryPipeline) and pipeline.vlm_name is not None:
        parts["text_encoder"] = vlm_folder(pipeline.loaded_from, pipeline.vlm_name)
    if arguments.lora is not None:
        parts["lora"] = add_lora(pipeline, arguments.lora)
    return pipeline, model_digest(parts)


def _chosen(arguments: Namespace, defaults: dict) -> dict:
    """Return flags, as the folder was drawn where they are not given, else by default."""
    before, chosen = read_run(arguments.out), {}
    for name, default in defaults.items():
        given = getattr(arguments, name)
        chosen[name] = before.get(name, default) if given is None else given
        if chosen[name] != before.get(name, chosen[name]):
            remedy = "Name another folder with --out, or delete this one."
            expected = f"{before[name]}, as {arguments.out} was drawn"
            raise InputError(f"--{name.replace('_', '-')}", found=given, expected=expected, remedy=remedy)
    return chosen


def _sampling(arguments: Namespace, steps: int = 50, guidance_scale: float = 3.5) -> dict:
    return {
        "num_inference_steps": steps if arguments.steps is None else arguments.steps,
        "guidance_scale": guidance_scale if arguments.guidance_scale is None else arguments.guidance_scale,
    }


def _judge_options(arguments: Namespace) -> dict | None:
    """Return what `Endpoint` takes, None where nothing is scored."""
    if arguments.only == "draw":
        return None
    for name in ("judge_base_url", "judge_model"):
        if not getattr(arguments, name):
            expected = "where the judge answers, such as http://localhost:8000/v1, and its name there"
            raise InputError(f"--{name.replace('_', '-')}", found="nothing", expected=expected)
    return {
        "base_url": arguments.judge_base_url,
        "model": arguments.judge_model,
        "api_key": os.environ.get("OPENAI_API_KEY"),
        "concurrency": arguments.judge_concurrency,
        "timeout": arguments.judge_timeout,
        "cache_dir": arguments.judge_cache or arguments.out / "judge",
        "patient": True,
    }


def _judge_file(arguments: Namespace, name: str, shipped: Path | None) -> Path | None:
    """Return the user's file of that name in --judge-prompts, else the shipped one."""
    folder = arguments.judge_prompts
    if folder is None:
        return shipped
    if not any((folder / known).is_file() for known in _JUDGE_FILES):
        expected = f"one or more of {', '.join(_JUDGE_FILES)}"
        raise InputError(f"--judge-prompts {folder}", found="none of the files", expected=expected)
    return folder / name if (folder / name).is_file() else shipped


def _micro(arguments: Namespace) -> tuple[Benchmark, dict, dict]:
    chosen = _chosen(arguments, {"n": HELD_OUT_COUNT, "seed": HELD_OUT_SEED})
    sampling = _sampling(arguments, NUM_INFERENCE_STEPS, GUIDANCE_SCALE)
    return micro_benchmark(chosen["n"], chosen["seed"]), chosen, sampling


def _geneval(arguments: Namespace) -> tuple[Benchmark, dict, dict]:
    chosen = _chosen(arguments, {"samples": geneval.SAMPLES, "seed": 0, "width": _EDGE, "height": _EDGE})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    benchmark = geneval.geneval_benchmark(
        geneval.read_prompts(arguments.prompts),
        lambda: GenEval.from_pretrained(arguments.detector, arguments.clip, device),
        chosen["seed"], (chosen["width"], chosen["height"]), chosen["samples"], arguments.exact_counts,
        {"detector": arguments.detector, "detector_pixels": str(SHORTEST_EDGE), "clip": arguments.clip},
    )  # fmt: skip
    return benchmark, chosen, _sampling(arguments)


def _dpg(arguments: Namespace) -> tuple[Benchmark, dict, dict]:
    chosen = _chosen(arguments, {"samples": dpg.SAMPLES, "seed": 0, "width": _EDGE, "height": _EDGE})
    options = _judge_options(arguments)
    benchmark = dpg.dpg_benchmark(
        dpg.read_prompts(arguments.prompts), options and Endpoint(**options), chosen["seed"],
        (chosen["width"], chosen["height"]), chosen["samples"], _judge_file(arguments, "dpg.txt", PROMPTS / "dpg.txt"),
    )  # fmt: skip
    return benchmark, chosen, _sampling(arguments)


def _gedit(arguments: Namespace) -> tuple[Benchmark, dict, dict]:
    chosen = _chosen(arguments, {"longer_edge": _EDGE, "seed": 0})
    options = _judge_options(arguments)
    judge = None
    if options is not None:
        success, quality = (
            _judge_file(arguments, f"edit_{name}.txt", EDIT_PROMPTS / f"edit_{name}.txt")
            for name in ("success", "quality")
        )
        judge = EditJudge(success_prompt=success, quality_prompt=quality, **options)
    items = gedit.read_items(arguments.data, chosen["seed"], chosen["longer_edge"])
    return gedit.gedit_benchmark(items, judge), chosen, _sampling(arguments)


def _imgedit(arguments: Namespace) -> tuple[Benchmark, dict, dict]:
    chosen = _chosen(arguments, {"longer_edge": _EDGE, "seed": 0})
    options = _judge_options(arguments)
    questions = imgedit.read_prompts(_judge_file(arguments, "imgedit.json", None))
    items = imgedit.read_items(arguments.prompts, arguments.images, chosen["seed"], chosen["longer_edge"])
    return imgedit.imgedit_benchmark(items, options and Endpoint(**options), questions), chosen, _sampling(arguments)


_BENCHMARKS: dict[str, Callable[[Namespace], tuple[Benchmark, dict, dict]]] = {
    "micro": _micro, "geneval": _geneval, "dpg": _dpg, "gedit": _gedit, "imgedit": _imgedit,
}  # fmt: skip


def _sheet(benchmark: Benchmark, results: dict, images: list, limit: int = 48):
    """Return the first pictures of each task, sources beside edits, framed by the verdict."""
    passed = {item["id"]: item[benchmark.measures[0]] >= benchmark.passing for item in results["items"]}
    sheets = []
    for task in dict.fromkeys(item.task for item in benchmark.items):
        shown = [
            (item, image)
            for item, image in zip(benchmark.items, images, strict=True)
            if item.task == task and item.id in passed
        ][:limit]
        cells = [
            Cell(item.prompt, [*([] if item.source is None else [resized_source(item)]), image], passed[item.id])
            for item, image in shown
        ]
        if cells:
            sheets.append(contact_sheet(cells, 12 // len(cells[0].images)))
    return stack(sheets)


def compare_runs(names: list[str], out: Path | None, arguments: Namespace) -> str:
    """Return the table, and write `comparison.json` and `comparison.png` into `out`, if it is given.

    Args:
        names: folders with results, or models, which the micro benchmark draws and scores first, in folders in `out`.
        out: the folder.
        arguments: `n`, `seed`, `steps`, `guidance_scale` and `batch_size` of that.

    Models are drawn as the first folder was, where `arguments` do not say it.

    Raises:
        InputError: a model, but no `out`; a name that is neither; see `evaluate` and `compare`.
    """
    models = {name: _folder_for(name, out) for name in names if _is_model(name)}
    if len(set(models.values())) < len(models):
        raise InputError("compare", found=", ".join(models), expected="models with names of their own")
    measured = [Path(name) for name in names if name not in models]
    settings = {name: getattr(arguments, name) for name in ("n", "seed", "steps", "guidance_scale")}
    if measured:  # all that can be known to be wrong before anything is drawn
        compare(measured)
        like = read_results(measured[0])
        sampling = like.get("sampling", {})
        own = {**like, "steps": sampling.get("num_inference_steps"), "guidance_scale": sampling.get("guidance_scale")}
        settings = {name: own.get(name) if value is None else value for name, value in settings.items()}
        if models:
            _check_micro_results(measured[0], like, settings)
    settings |= {"batch_size": arguments.batch_size, "min_coverage": 1.0, "benchmark": "micro"}
    absent = dict.fromkeys(("only", "lora", "metaquery", "vlm"))
    for name, folder in models.items():
        evaluate(Namespace(model=name, out=folder, **settings, **absent))
    folders = [models.get(name) or Path(name) for name in names]
    found = compare(folders)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_file(out / COMPARISON_FILE, json.dumps(found, indent=2) + "\n")
        sheet = comparison_sheet(folders)
        if sheet is not None:
            save_sheet(sheet, out / SHEET_FILE)
    return table(found)


def _check_micro_results(folder: Path, results: dict, settings: dict) -> None:
    """Raise InputError where a model that is run on the micro benchmark could not be compared with a folder."""
    expected = "results of the micro benchmark, which models are run on"
    if results["benchmark"] != "micro":
        raise InputError(f"compare {folder}", found=results["benchmark"], expected=expected)
    asked = micro_benchmark(
        settings["n"] or HELD_OUT_COUNT, HELD_OUT_SEED if settings["seed"] is None else settings["seed"]
    )
    if asked.prompts != results["prompts"]:
        remedy = "Give the --n and --seed of that folder."
        raise InputError(f"compare {folder}", found="other prompts", expected="those of --n and --seed", remedy=remedy)


def _is_model(name: str) -> bool:
    """Whether a name is a model's: bundled, a folder of one that holds no results, or of the hub."""
    folder = Path(name)
    if (folder / RESULTS_FILE).is_file():
        return False
    if name in BUNDLED_MODELS:
        return True
    if folder.exists():
        return (folder / PIPELINE_INDEX).is_file()
    if len(folder.parts) == 2 and not folder.parent.exists():
        return True
    expected = f"a folder of `unipic2 eval`, a model's folder or hub name, or {', '.join(BUNDLED_MODELS)}"
    raise InputError(f"compare {name}", found="no such folder", expected=expected)


def _folder_for(name: str, out: Path | None) -> Path:
    if out is None:
        remedy = "Name a folder for pictures and results with --out."
        raise InputError(f"compare {name}", found="a model", expected="--out too", remedy=remedy)
    return out / "-".join(part for part in Path(name).parts if part not in ("/", ".."))
