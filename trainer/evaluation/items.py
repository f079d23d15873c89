"""What a benchmark asks for, one item a picture, and what its judge says."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True, slots=True)
class Item:
    """One picture that is asked for."""

    id: str
    """Name of the picture's file, without its suffix."""
    task: str
    """What the benchmark reports by, such as `t2i`."""
    kind: str
    """Finer than the task, such as `counting`."""
    prompt: str
    """The words."""
    seed: int
    """Of the noise."""
    source: Image.Image | None = None
    """The picture to edit; None draws from text."""
    data: object = None
    """What the judge needs."""


@dataclass(frozen=True, slots=True)
class Score:
    """What the judge says of one picture."""

    strict: float
    """1 if all that was asked is there, else 0."""
    soft: float
    """How much of it is there, 0 to 1."""
    notes: tuple[str, ...] = ()
    """What is wrong, in words."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark: its items and its judge."""

    name: str
    items: list[Item]
    judge: Callable[[Sequence[Item], Sequence[Image.Image]], list[Score]]
    """Scores of pictures, in their items' order."""
    size: tuple[int, int]
    """(width, height) of its pictures in pixels."""


def digest(items: Sequence[Item]) -> str:
    """Return a hash of what is asked for: words, seeds and source pictures of all items, in order."""
    found = hashlib.sha256()
    for item in items:
        found.update(json.dumps([item.id, item.task, item.kind, item.prompt, item.seed]).encode())
        if item.source is not None:
            found.update(item.source.convert("RGB").tobytes())
    return found.hexdigest()
