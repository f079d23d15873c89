"""GEdit-Bench (arXiv 2504.17761): edits in eleven groups, in English and Chinese, by VIEScore.

SC is the lesser of what was done and what was kept, PQ the lesser of natural and free of faults, 0 to 10; an edit's
`overall` is the root of their product. A language's figures are unweighted means over the groups. Rows with
`Intersection_exist` are also reported by themselves, as the benchmark does.
"""

import math
from collections.abc import Sequence
from functools import partial

from PIL import Image

from ...core.errors import InputError
from ...core.sizes import fit_size
from ..data.sources import BrokenRow, measure, open_source, read_pair
from ..rewards.endpoint import Ask
from ..rewards.judge import HIGHEST, EditJudge
from .figures import figures_of_kinds, grouped
from .items import Benchmark, Item, Score
from .judged import about, ask_about_all

MEASURES = ("overall", "sc", "pq")
_COLUMNS = ("key", "task_type", "instruction", "instruction_language", "input_image_raw", "Intersection_exist")
_GOOD = 7.0  # of 10: what page and sheet show as passed


def read_items(name: str, seed: int, longer_edge: int) -> list[Item]:
    """Return the items of the benchmark's dataset: a hub name, a .parquet or .jsonl file, or a folder of them.

    Raises:
        InputError: it cannot be read, lacks a column, or a row is broken, with its number.
    """
    source = open_source(name, needs_target=False, prompt="instruction", source="input_image_raw")
    missing = [column for column in _COLUMNS if column not in source.rows.column_names]
    if missing:
        found = ", ".join(source.rows.column_names)
        raise InputError(f"columns of {name}", found=found, expected=f"{', '.join(missing)} too, as GEdit-Bench has")

    def read(row: int) -> Image.Image:
        try:
            return read_pair(source.rows[row], source.columns, source.root).source
        except BrokenRow as broken:
            raise InputError(f"{name}, row {row}", found=str(broken), expected="a picture") from None

    items = []
    for number, row in enumerate(source.rows):
        measured = measure(row, source.columns, source.root)
        if measured["error"] or not measured["is_edit"]:
            found = measured["error"] or "no picture in input_image_raw"
            raise InputError(f"{name}, row {number}", found=found, expected="an instruction and a picture")
        language, key = str(row["instruction_language"]), str(row["key"])
        size = fit_size(measured["width"], measured["height"], longer_edge)
        items.append(
            Item(f"{language}-{key}", language, str(row["task_type"]), measured["prompt"], seed + number, size,
                 partial(read, number), bool(row["Intersection_exist"]))
        )  # fmt: skip
    return items


def gedit_benchmark(items: list[Item], judge: EditJudge | None) -> Benchmark:
    """Return the benchmark. `judge` None only draws."""

    def ask(items: Sequence[Item], images: Sequence[Image.Image]) -> list[Score | None]:
        async def grade(ask: Ask, item: Item, image: Image.Image) -> Score | None:
            def pictures() -> tuple[Image.Image, Image.Image]:
                source = item.source()  # the judge sees the result at its size, as published
                return source, image.resize(source.size, Image.Resampling.LANCZOS)

            found = await judge.grades(ask, item.prompt, pictures)
            return None if found is None else Score((math.sqrt(math.prod(found)), *found))

        return ask_about_all(judge.endpoint, items, images, grade)

    def intersection(rows: list[tuple[Item, Score]]) -> dict:
        common = [row for row in rows if row[0].data]
        languages = grouped(common, lambda item: item.task)
        return {"intersection": {name: figures_of_kinds(own, MEASURES, True) for name, own in languages.items()}}

    return Benchmark(
        "gedit", items, ask, MEASURES, passing=_GOOD, mean_of_kinds=True, any_size=True, highest=HIGHEST,
        summary=intersection,
        about_judge=lambda: about(judge.endpoint, judge.success_prompt, judge.quality_prompt),
    )  # fmt: skip
