"""DPG-Bench (ELLA, arXiv 2403.05135): long prompts, each with a graph of questions that are answered yes or no.

A question counts only if all questions that it depends on are answered yes. A picture's score is the share of its
questions that count and are answered yes, times 100; the benchmark's is the mean over all pictures. Categories are
shares of questions answered yes, whatever they depend on, as published.
"""

import asyncio
import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ...core.errors import InputError
from ..rewards.endpoint import Ask, Endpoint, JudgeFailed, read_prompt, text_of
from .items import Benchmark, Item, Score
from .judged import PROMPTS, about, ask_about_all

SAMPLES = 4
"""Pictures of each prompt, as published."""
_COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")


@dataclass(frozen=True, slots=True)
class Question:
    """One question of a prompt's graph."""

    number: int
    """Its number in the graph."""
    text: str
    """The words."""
    parents: tuple[int, ...]
    """Questions that have to be answered yes before this one counts."""
    category: str
    """Such as `entity - whole`."""


def read_prompts(path: Path) -> dict[str, tuple[str, list[Question]]]:
    """Return name -> prompt and questions of the benchmark's `dpg_bench.csv`.

    Raises:
        InputError: the file or a row cannot be read, with its number, or a question depends on one that is not there.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            missing = [column for column in _COLUMNS if column not in (rows.fieldnames or ())]
            if missing:
                found = ", ".join(rows.fieldnames or ()) or "none"
                raise InputError(f"columns of {path}", found=found, expected=f"{', '.join(missing)} too, as DPG-Bench")
            prompts: dict[str, tuple[str, list[Question]]] = {}
            for number, row in enumerate(rows, start=2):
                _, questions = prompts.setdefault(row["item_id"], (row["text"], []))
                questions.append(_question(row, f"{path}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        found, expected = getattr(error, "strerror", None) or "no UTF-8 text", "DPG-Bench's dpg_bench.csv"
        raise InputError(f"--prompts {path}", found=found, expected=expected) from None
    if not prompts:
        raise InputError(f"--prompts {path}", found="no rows", expected="DPG-Bench's dpg_bench.csv")
    for name, (_, questions) in prompts.items():
        known = {question.number for question in questions}
        for question in questions:
            if not known.issuperset(question.parents):
                absent = sorted(set(question.parents) - known)
                expected = f"numbers of its questions, {min(known)} to {max(known)}"
                raise InputError(f"{path}, {name}: dependency", found=f"{absent}", expected=expected)
    return prompts


def _question(row: dict, where: str) -> Question:
    try:
        number = int(row["proposition_id"])
        parents = tuple(found for found in map(int, row["dependency"].split(",")) if found)
    except (ValueError, AttributeError, TypeError):  # a short row has None
        found = f"proposition_id {row['proposition_id']!r}, dependency {row['dependency']!r}"
        raise InputError(where, found=found, expected="numbers, 0 for no dependency") from None
    category = (row["tuple"] or "").partition("(")[0].strip()
    return Question(number, row["question_natural_language"], parents, category)


def graph_score(questions: Sequence[Question], answers: dict[int, bool]) -> tuple[float, list[Question]]:
    """Return the share of questions that count and are answered yes, and those that do not count or are not.

    Args:
        questions: of one prompt, in the benchmark's order.
        answers: number -> whether the answer is yes.
    """
    holds = dict(answers)
    for question in questions:  # in order, so that what falls with its parent takes its own children along
        if not all(holds[parent] for parent in question.parents):
            holds[question.number] = False
    return sum(holds.values()) / len(holds), [question for question in questions if not holds[question.number]]


def _read_answer(answer: dict) -> bool:
    words = "".join(c if c.isalpha() else " " for c in text_of(answer)).lower().split()
    if not words or words[0] not in ("yes", "no"):
        raise JudgeFailed("neither yes nor no")
    return words[0] == "yes"


def dpg_benchmark(
    prompts: dict[str, tuple[str, list[Question]]], endpoint: Endpoint | None, seed: int, size: tuple[int, int],
    samples: int = SAMPLES, question_prompt: Path = PROMPTS / "dpg.txt",
) -> Benchmark:  # fmt: skip
    """Return the benchmark.

    Args:
        prompts: of `read_prompts`.
        endpoint: answers the questions; None only draws.
        seed: of the first picture; each has the next one.
        size: (width, height) of the pictures in pixels.
        samples: pictures of each prompt.
        question_prompt: file with what is asked; `{question}` stands for the question.
    """
    frame = read_prompt(question_prompt, "question")
    items = [
        Item(f"{name}-{k}", "dpg", "prompt", text, seed + samples * i + k, size, data=questions, group=name)
        for i, (name, (text, questions)) in enumerate(prompts.items())
        for k in range(samples)
    ]

    def judge(items: Sequence[Item], images: Sequence[Image.Image]) -> list[Score | None]:
        async def grade(ask: Ask, item: Item, image: Image.Image) -> Score | None:
            asked = [frame.format(question=question.text) for question in item.data]
            found = await asyncio.gather(*(ask(text, lambda: [image], _read_answer) for text in asked))
            if None in found:
                return None
            answers = {question.number: answer for question, answer in zip(item.data, found, strict=True)}
            share, wrong = graph_score(item.data, answers)
            return Score((100 * share,), tuple(question.text for question in wrong), {"answers": answers})

        return ask_about_all(endpoint, items, images, grade)

    return Benchmark(
        "dpg", items, judge, ("score",), passing=100.0, highest=100, summary=_categories,
        about_judge=lambda: about(endpoint, frame, *(q.text for _, questions in prompts.values() for q in questions)),
    )  # fmt: skip


def _categories(rows: list[tuple[Item, Score]]) -> dict:
    """Return the share of questions answered yes by category, times 100: `entity`, and `entity - whole`."""
    found: dict[str, list[bool]] = {}
    for item, score in rows:
        for question in item.data:
            for name in {question.category, question.category.partition("-")[0].strip()}:
                found.setdefault(name, []).append(score.details["answers"][question.number])
    return {"categories": {name: round(100 * float(np.mean(found[name])), 2) for name in sorted(found)}}
