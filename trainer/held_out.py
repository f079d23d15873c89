"""Held-out prompts and edits, drawn with the same noise each time a model is measured."""

import math
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from ..core.errors import InputError
from .data.prompts import PromptDataset
from .micro.evaluate import evaluate
from .micro.sheet import result_sheet
from .micro.tasks import EditTask
from .micro.world import render
from .rewards import RewardFunction, columns_of
from .rewards.beside import ask
from .rewards.preservation import preservation
from .sheets import Cell, contact_sheet, stack

TASKS = ("t2i", "edit")
_SHOWN = {"t2i": 24, "edit": 12}  # cells of a sheet
_THUMBNAIL = 256


def known(values: np.ndarray) -> np.ndarray:
    """Return those of (N,) values that are not nan."""
    return values[~np.isnan(values)]


@dataclass(frozen=True, slots=True)
class Measurement:
    """One task, sample by sample, in the same order each time. Example: `HeldOut(...)(pipeline)[0]["t2i"]`."""

    kinds: list[str]
    """N kinds of prompts or edits; "" where the data has none."""
    strict: np.ndarray
    """(N,) float64: 1 where everything asked is there and nothing else, else 0; nan where it could not be judged."""
    soft: np.ndarray
    """(N,) float64: how much of it is there, 0 to 1, or the mean reward; nan where there was none."""
    preserved: np.ndarray | None = None
    """(N,) float64: how much of its source each edit left as it was, 0 to 1, see `preservation`; None for prompts."""

    def mean(self) -> float:
        """Return the strict accuracy of what could be judged, 0 to 1; nan where nothing could."""
        judged = known(self.strict)
        return float(judged.mean()) if len(judged) else math.nan

    def to_json(self) -> dict:
        """Return plain lists, with null for nan."""
        parts = {"strict": self.strict, "soft": self.soft}
        if self.preserved is not None:
            parts["preserved"] = self.preserved
        lists = {name: [None if math.isnan(v) else v for v in part.tolist()] for name, part in parts.items()}
        return {"kinds": self.kinds, **lists}

    @classmethod
    def from_json(cls, content: dict) -> "Measurement":
        """Return what `to_json` was called on."""
        names = [name for name in ("strict", "soft", "preserved") if name in content]
        return cls(content["kinds"], **{name: np.array(content[name], dtype=np.float64) for name in names})


HeldOut = Callable[..., tuple[dict[str, Measurement], Image.Image]]
"""`held_out(pipeline)` draws and judges; returns the measurement of each task and a sheet of the first pictures."""


def bar_warning(measured: Measurement) -> str | None:
    """Return a word on a bar that none or all of the samples reach, and by which no fall or rise can be seen."""
    strict, soft = known(measured.strict), known(measured.soft)
    if strict.min() != strict.max():
        return None
    low, middle, high = np.quantile(soft, (0.1, 0.5, 0.9))
    reach, unseen = ("all samples reach", "rise") if strict[0] else ("no sample reaches", "fall")
    rewards = f"{low:.3g}, {middle:.3g} and {high:.3g} at 10, 50 and 90 %"
    return f"{reach} the bar, so no {unseen} can be seen; its rewards are {rewards}"


def _preserved(images: list[Image.Image], sources: list[Image.Image | None]) -> np.ndarray | None:
    if None in sources:
        return None
    return np.array(preservation([""] * len(images), images, source_image=sources))


def micro_held_out(count: int, seed: int, **sampling) -> HeldOut:
    """Return a measuring of `count` prompts and as many edits of the micro world, judged by the verifier."""

    def measure(pipeline) -> tuple[dict[str, Measurement], Image.Image]:
        _, drawn = evaluate(pipeline, count, seed, **sampling)
        found = {
            name: Measurement(
                [task.kind for task in tasks],
                np.array([float(v.strict) for v in verdicts]),
                np.array([v.soft for v in verdicts]),
                _preserved(images, [render(t.source) if isinstance(t, EditTask) else None for t in tasks]),
            )
            for name, (tasks, images, verdicts) in drawn.items()
        }
        return found, result_sheet({name: [part[: _SHOWN[name]] for part in parts] for name, parts in drawn.items()})

    return measure


def reward_held_out(
    rows: PromptDataset,
    rewards: list[RewardFunction],
    weights: list[float] | None,
    strict_rewards: dict[str, float],
    count: int,
    seed: int,
    without: int = 0,
    batch_size: int = 8,
    most_unanswered: float = 1.0,
    is_optional: bool = False,
    **sampling,
) -> HeldOut:
    """Return a measuring by rewards: soft is their weighted mean, strict that it is at least that of `strict_rewards`.

    Up to `count` rows of each task are taken, evenly spread over the data, but for those that another measuring of
    `without` rows takes, where there are enough others. A task that no reward is for is left out. A sample of which
    a reward could not be found out has no figure: the others alone would say something else.

    Raises:
        InputError: when measuring, a task of which a larger share than `most_unanswered` could not be found out; where
            this `is_optional` it is left out instead.
    """
    chosen: dict[str, list[int]] = {}
    for task in TASKS:
        indices = [i for i, edit in enumerate(rows.is_edit) if edit == (task == "edit")]
        taken = set(_spread(indices, without))
        others = [i for i in indices if i not in taken]
        chosen[task] = _spread(others if len(others) >= count else indices, count)

    def measure(pipeline) -> tuple[dict[str, Measurement], Image.Image]:
        pipeline.set_progress_bar_config(disable=True)
        found, sheets = {}, []
        for task, indices in chosen.items():
            if not indices:
                continue
            samples = [rows[i] for i in indices]
            images = _draw(pipeline, samples, seed, batch_size, sampling)
            columns = columns_of(samples)
            scores, missing = ask(rewards, [s["prompt"] for s in samples], images, columns)
            unanswered = missing.any(1).numpy()
            if unanswered.mean() > most_unanswered:
                if is_optional:
                    sys.stderr.write(f"[measuring] {task} left out: its rewards could not be found out\n")
                    continue
                raise InputError(
                    f"measuring {task}",
                    found=f"{unanswered.sum()} of {len(samples)} samples whose reward could not be found out",
                    expected=f"at most a share of {most_unanswered}",
                    remedy="See what its judge said, and give the same command again: it goes on here.",
                )
            share = torch.tensor(weights or [1.0] * len(rewards), dtype=torch.float64).expand_as(scores)
            applies = ~scores.isnan()
            soft = ((scores.nan_to_num() * share).sum(1) / (applies * share.abs()).sum(1)).numpy()
            soft[unanswered] = np.nan
            if np.isnan(soft).all():  # no reward is for this task
                continue
            strict = np.where(np.isnan(soft), np.nan, soft >= strict_rewards[task])
            kinds = [str(s.get("kind") or s.get("tag") or "") for s in samples]
            found[task] = Measurement(kinds, strict, soft, _preserved(images, columns["source_image"]))
            sheets.append(_sheet(samples, images, strict, _SHOWN[task]))
        return found, stack(sheets) if sheets else Image.new("RGB", (1, 1), "white")

    return measure


def _spread(indices: list[int], count: int) -> list[int]:
    """Return up to `count` of them, evenly spread."""
    count = min(count, len(indices))
    return [indices[i * len(indices) // count] for i in range(count)]


def _draw(pipeline, samples: list[dict], seed: int, batch_size: int, sampling: dict) -> list[Image.Image]:
    """Return a picture of each sample; batches have one size, noise is each sample's own."""
    by_size = defaultdict(list)
    for place, sample in enumerate(samples):
        by_size[sample["size"]].append(place)
    images: list[Image.Image | None] = [None] * len(samples)
    for (width, height), places in by_size.items():
        for start in range(0, len(places), batch_size):
            part = places[start : start + batch_size]
            sources = [samples[i]["source_image"] for i in part if "source_image" in samples[i]]
            drawn = pipeline(
                [samples[i]["prompt"] for i in part],
                image=sources or None,
                height=height,
                width=width,
                generator=[torch.Generator().manual_seed(seed + i) for i in part],
                **sampling,
            ).images
            for i, image in zip(part, drawn, strict=True):
                images[i] = image
    return images


def _sheet(samples: list[dict], images: list[Image.Image], strict: np.ndarray, limit: int) -> Image.Image:
    cells = []
    for sample, image, passed in list(zip(samples, images, strict, strict=True))[:limit]:
        shown = [sample["source_image"], image] if "source_image" in sample else [image]
        cells.append(Cell(sample["prompt"], shown, None if math.isnan(passed) else bool(passed)))
    return contact_sheet(cells, columns=6 if len(cells[0].images) == 1 else 3, edge=_THUMBNAIL)
