"""What a benchmark asks for, one item a picture, and what its judge says."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

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
    size: tuple[int, int]
    """(width, height) of the picture in pixels."""
    source: Callable[[], Image.Image] | None = None
    """Reads the picture to edit; None draws from text."""
    data: object = None
    """What the judge needs."""
    group: str = ""
    """Items of one group, such as the pictures of one prompt, are no independent samples; empty stands alone."""


@dataclass(frozen=True, slots=True)
class Score:
    """What the judge says of one picture."""

    values: tuple[float, ...]
    """One for each of the benchmark's measures."""
    notes: tuple[str, ...] = ()
    """What is wrong, in words."""
    details: dict = field(default_factory=dict)
    """What else belongs to the item's results, as JSON has it."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: its items and its judge."""

    name: str
    items: list[Item]
    judge: Callable[[Sequence[Item], Sequence[Image.Image]], list[Score | None]]
    """Scores of pictures, in their items' order; None where one could not be judged."""
    measures: tuple[str, ...] = ("strict", "soft")
    """Names of what is measured; the first is what is reported."""
    highest: float = 1.0
    """What the first measure can reach."""
    passing: float = 1.0
    """Least first measure with which a picture is shown as passed."""
    mean_of_kinds: bool = False
    """A task's figures are the means over its kinds, not over its pictures."""
    any_size: bool = False
    """Pictures of other sizes than asked for are judged too."""
    summary: Callable[[list[tuple[Item, Score]]], dict] = lambda rows: {}
    """What the results also hold, such as `{"intersection": ...}`."""
    about_judge: Callable[[], dict] = dict
    """What to note of the judge once it is through."""

    @cached_property
    def prompts(self) -> str:
        """Hash of what is asked for, see `digest`; it reads all source pictures, and does so once."""
        return digest(self.items)


def digest(items: Sequence[Item]) -> str:
    """Return a hash of what is asked for: words, seeds and source pictures of all items, in order."""
    found = hashlib.sha256()
    for item in items:
        found.update(json.dumps([item.id, item.task, item.kind, item.prompt, item.seed]).encode())
        if item.source is not None:
            found.update(item.source().convert("RGB").tobytes())
    return found.hexdigest()
