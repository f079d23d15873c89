"""ImgEdit-Bench, the basic suite (arXiv 2505.20275): nine types of edits, three scores of 1 to 5 each.

An edit's score is the mean of the three, a type's the mean of its edits, and the benchmark's the mean of its types.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from PIL import Image

from ...core.errors import InputError
from ...core.files import read_json
from ...core.sizes import fit_size
from ..data.sources import BrokenRow, picture_of, picture_size, read_picture
from ..rewards.endpoint import Ask, Endpoint, read_prompt, scores_reader
from .items import Benchmark, Item, Score
from .judged import PROMPTS, about, ask_about_all

TYPES = ("add", "adjust", "extract", "replace", "remove", "background", "style", "compose", "action")
_ALIASES = {"alter": "adjust"}  # as some copies of the benchmark's file have it
MEASURES = ("score", "compliance", "naturalness", "integrity")
_GOOD = 4.0  # of 5: what page and sheet show as passed
_PLACE = "<edit_prompt>"  # stands for the instruction in the benchmark's own file of prompts
_read_scores = scores_reader(3, 1, 5)


def read_prompts(path: Path | None) -> dict[str, str]:
    """Return the judge's question for each type, with `<edit_prompt>` where the instruction goes.

    Args:
        path: a JSON file of type -> question, as the benchmark's `prompts.json`; None takes ours, which ask for the
            same three scores in words of our own.

    Raises:
        InputError: the file cannot be read, or lacks a type or the instruction's place.
    """
    if path is None:
        frame = read_prompt(PROMPTS / "imgedit.txt", "instruction", "criteria")
        criteria = json.loads((PROMPTS / "imgedit.json").read_text(encoding="utf-8"))
        return {
            name: frame.format(instruction=_PLACE, criteria="\n".join(f"{i}. {c}" for i, c in enumerate(lines, 1)))
            for name, lines in criteria.items()
        }
    found = read_json(path, "the judge's questions")
    for name in TYPES:
        if not isinstance(found.get(name), str) or _PLACE not in found[name]:
            raise InputError(f"{path}, {name}", found=repr(found.get(name))[:80], expected=f"a text with {_PLACE}")
    return found


def read_items(path: Path, images: Path, seed: int, longer_edge: int) -> list[Item]:
    """Return the items of the benchmark's `basic_edit.json`: key -> `id` (a picture's path), `prompt`, `edit_type`.

    Args:
        path: the file.
        images: folder that the paths start from.
        seed: of the first picture; each has the next one.
        longer_edge: of what is drawn, in pixels.

    Raises:
        InputError: the file, a row, or a picture cannot be read.
    """
    items = []
    for number, (key, row) in enumerate(read_json(path, "ImgEdit's basic_edit.json").items()):
        try:
            picture, prompt, kind = images / row["id"], str(row["prompt"]), str(row["edit_type"])
        except (KeyError, TypeError):
            expected = "id, prompt and edit_type"
            raise InputError(f"{path}, {key}", found=str(row)[:80], expected=expected) from None
        kind = _ALIASES.get(kind, kind)
        if kind not in TYPES:
            raise InputError(f"{path}, {key}: edit_type", found=kind, expected=f"one of {', '.join(TYPES)}")
        size = fit_size(*_size(picture), longer_edge)
        items.append(Item(key, "edit", kind, prompt, seed + number, size, partial(_read, picture)))
    return items


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except BrokenRow as broken:
        found = str(broken) if path.is_file() else "no such file"
        remedy = "Name the folder of the benchmark's pictures with --images."
        raise InputError(f"picture {path}", found=found, expected="a picture", remedy=remedy) from None


def _read(path: Path) -> Image.Image:
    with _readable(path):
        return read_picture(path.name, "id", path.parent)


def _size(path: Path) -> tuple[int, int]:
    with _readable(path):
        return picture_size(*picture_of(path.name, "id", path.parent))


def imgedit_benchmark(items: list[Item], endpoint: Endpoint | None, prompts: dict[str, str]) -> Benchmark:
    """Return the benchmark. `endpoint` None only draws."""

    def judge(items: Sequence[Item], images: Sequence[Image.Image]) -> list[Score | None]:
        async def grade(ask: Ask, item: Item, image: Image.Image) -> Score | None:
            question = prompts[item.kind].replace(_PLACE, item.prompt)
            found = await ask(question, lambda: [item.source(), image], _read_scores)
            return None if found is None else Score((sum(found) / len(found), *found))

        return ask_about_all(endpoint, items, images, grade)

    return Benchmark(
        "imgedit", items, judge, MEASURES, passing=_GOOD, mean_of_kinds=True, any_size=True, highest=5,
        about_judge=lambda: about(endpoint, *(prompts[name] for name in TYPES)),
    )  # fmt: skip
