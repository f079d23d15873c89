"""The GenEval benchmark (arXiv 2310.11513) by its own rules, on transformers' Mask2Former and CLIP instead of mmcv.

An image is right if every `include` clause holds (at least so many objects, all of them in the colour and place that
is asked) and no `exclude` clause is reached. The score is the unweighted mean over the six kinds of prompts.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from ...core.errors import InputError
from ..rewards.geneval import Found, GenEval, by_name, read_clauses, relations
from .items import Benchmark, Item, Score

SAMPLES = 4
"""Pictures of each prompt, as published."""


def read_prompts(path: Path) -> list[dict]:
    """Return the rows of a file in GenEval's form: `tag`, `prompt`, `include` and perhaps `exclude`, a row a line.

    Raises:
        InputError: the file or a row cannot be read, with its number.
    """
    if not path.is_file():
        remedy = "GenEval's repository has it as prompts/evaluation_metadata.jsonl."
        raise InputError(f"--prompts {path}", found="no such file", expected="GenEval's jsonl", remedy=remedy)
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            tag, prompt = row["tag"], row["prompt"]
        except (ValueError, KeyError, TypeError):
            expected = "JSON with tag, prompt and include"
            raise InputError(f"{path}, line {number}", found=line[:80], expected=expected) from None
        where = f"{path}, line {number}"
        clauses = {name: read_clauses(row.get(name), f"{where}: {name}") for name in ("include", "exclude")}
        if not clauses["include"]:
            raise InputError(f"{path}, line {number}", found="no include", expected="what has to be there")
        rows.append({"tag": str(tag), "prompt": str(prompt), **clauses})
    if not rows:
        raise InputError(f"--prompts {path}", found="no rows", expected="GenEval's jsonl")
    return rows


def verdict(
    objects: list[Found], row: dict, color_of: Callable[[Found], str], exact: bool = False
) -> tuple[bool, list[str]]:
    """Judge one picture.

    Args:
        objects: what a detector found in it.
        row: of `read_prompts`.
        color_of: tells an object's colour.
        exact: a clause with more objects than are asked for fails too; the benchmark itself lets that pass.

    Returns:
        Whether it is right, and what is wrong.
    """
    names = {clause["class"] for clause in [*row["include"], *row["exclude"]]}
    found = by_name(objects, names, counting=row["tag"] == "counting")
    wrong: list[str] = []
    matched: list[list[Found] | None] = []
    for clause in row["include"]:
        name, count = clause["class"], int(clause["count"])
        mine, problems = found[name][:count], []
        if len(mine) < count or (exact and len(found[name]) > count):
            problems.append(f"{len(found[name])} {name} for {count}")
        elif clause.get("color"):
            colors = [color_of(one) for one in mine]
            if colors.count(clause["color"]) < count:
                problems.append(f"{name} is {', '.join(colors)}, not {clause['color']}")
        if clause.get("position") and not problems:
            relation, other = clause["position"][0], int(clause["position"][1])
            # As published: the clause it refers to comes before it.
            target = matched[other] if other < len(matched) else None
            if target is None:
                problems.append(f"{name} has nothing to be {relation}")
            elif not all(relation in relations(one.box, two.box) for one in mine for two in target):
                problems.append(f"{name} is not {relation} {row['include'][other]['class']}")
        wrong += problems
        matched.append(None if problems else mine)
    for clause in row["exclude"]:
        name, count = clause["class"], int(clause["count"])
        if len(found[name]) >= count:
            wrong.append(f"{len(found[name])} {name}, {count} are too many")
    return not wrong, wrong


def geneval_benchmark(
    rows: list[dict], scorer: Callable[[], GenEval], seed: int, size: tuple[int, int], samples: int = SAMPLES,
    exact: bool = False, models: dict[str, str] | None = None,
) -> Benchmark:  # fmt: skip
    """Return the benchmark.

    Args:
        rows: of `read_prompts`.
        scorer: makes what detects objects and tells colours; called once pictures are judged.
        seed: of the first picture; each has the next one.
        size: (width, height) of the pictures in pixels.
        samples: pictures of each prompt.
        exact: see `verdict`.
        models: names of the detector and of CLIP, for the record.
    """
    items = [
        Item(
            f"{i:05d}-{k}", row["tag"], row["tag"], row["prompt"], seed + samples * i + k, size, data=row, group=f"{i}"
        )
        for i, row in enumerate(rows)
        for k in range(samples)
    ]

    def judge(items: Sequence[Item], images: Sequence[Image.Image]) -> list[Score]:
        judging = scorer()
        clauses = [c for item in items for c in [*item.data["include"], *item.data["exclude"]]]
        judging.check_classes((clause["class"] for clause in clauses), "include or exclude of a prompt")
        scores = []
        for item, image, objects in zip(items, images, judging.detector(list(images)), strict=True):
            right, wrong = verdict(objects, item.data, lambda one, image=image: judging.color_of(image, one), exact)
            clauses = len(item.data["include"]) + len(item.data["exclude"])
            scores.append(Score((float(right), max(0.0, 1 - len(wrong) / clauses)), tuple(wrong)))
        return scores

    return Benchmark("geneval-exact" if exact else "geneval", items, judge, about_judge=lambda: models or {})
