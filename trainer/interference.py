"""What each stage of a run does to each task: the interference matrix, with intervals of 95 %.

All measurings draw the same prompts and edits with the same noise, so differences are taken sample by sample.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..core.files import write_file
from .held_out import Measurement, known

INTERFERENCE_FILE = "interference.json"
_Z = 1.959964  # of a normal distribution, 95 %
_DIGITS = 6  # of figures in the file; with as few as are shown, those would be rounded twice


def share_interval(values: np.ndarray) -> tuple[float, float]:
    """Return Wilson's interval of a share of ones (N,), 0 to 1; it also holds near 0 and 1. nan is left out."""
    values = known(values)
    n, share = len(values), float(values.mean())
    center = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    return max(0.0, center - half), min(1.0, center + half)


def paired_difference(before: np.ndarray, after: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Return the mean of `after - before` (N,) and its interval, of the same samples; nan in either is left out.

    With fewer than 2 samples nothing is known: 0, from minus to plus infinity.

    Raises:
        ValueError: other numbers of samples.
    """
    if before.shape != after.shape:
        raise ValueError(f"paired values: found {before.shape} and {after.shape}, expected the same")
    change = known(after - before)
    if len(change) < 2:
        return 0.0, (-math.inf, math.inf)
    half = _Z * float(change.std(ddof=1)) / math.sqrt(len(change))
    return float(change.mean()), (float(change.mean()) - half, float(change.mean()) + half)


def has_fallen(before: np.ndarray, after: np.ndarray, max_drop: float) -> bool:
    """Whether a task has lost more than `max_drop`, and not by chance: the whole interval is below 0."""
    return is_fall(*paired_difference(before, after), max_drop)


def is_fall(difference: float, interval: Sequence[float], max_drop: float) -> bool:
    """Whether a paired difference is a loss of more than `max_drop`, and none by chance."""
    return difference < -max_drop and interval[1] < 0


def _difference(before: np.ndarray, after: np.ndarray) -> dict | None:
    """Return `paired_difference` as figures of the matrix, None where nothing is known."""
    difference, interval = paired_difference(before, after)
    if math.isinf(interval[0]):
        return None
    return {"difference": round(difference, _DIGITS), "interval": [round(edge, _DIGITS) for edge in interval]}


def _known_mean(values: np.ndarray) -> float | None:
    return round(float(known(values).mean()), _DIGITS) if len(known(values)) else None


def matrix(measured: dict[str, dict[str, Measurement]], max_drop: float) -> dict[str, dict[str, dict]]:
    """Return stage -> task -> figures.

    Args:
        measured: stage -> task -> what was measured after it, in order; the first is what training started from.
        max_drop: a task that falls by more in a stage has `negative_transfer`.

    Returns:
        For each `strict`, `soft`, `n`, `interval` (of strict), `kinds` (strict of each) and, from the second stage on,
        `change`: `difference` of strict to the stage before, its `interval`, `negative_transfer`. For edits also
        `preserved`, and from the second stage on `drift`: its `difference` to the start, and the `interval`.
    """
    found: dict[str, dict[str, dict]] = {}
    previous: dict[str, Measurement] = {}
    first: dict[str, Measurement] = next(iter(measured.values()), {})
    for stage, tasks in measured.items():
        found[stage] = {}
        for task, now in tasks.items():
            kinds = {kind: [i for i, k in enumerate(now.kinds) if k == kind] for kind in dict.fromkeys(now.kinds)}
            entry = {
                "strict": round(now.mean(), _DIGITS),
                "soft": round(float(known(now.soft).mean()), _DIGITS),
                "n": len(known(now.strict)),
                "interval": [round(edge, _DIGITS) for edge in share_interval(now.strict)],
                "kinds": {kind: _known_mean(now.strict[places]) for kind, places in kinds.items()},
            }
            if task in previous and (change := _difference(previous[task].strict, now.strict)):
                fell = has_fallen(previous[task].strict, now.strict, max_drop)
                entry["change"] = {**change, "negative_transfer": fell}
            if now.preserved is not None:
                entry["preserved"] = _known_mean(now.preserved)
                start = first[task].preserved if task in first and tasks is not first else None
                if start is not None and (drift := _difference(start, now.preserved)):
                    entry["drift"] = drift
            found[stage][task] = entry
        previous = tasks
    return found


def figure_text(entry: dict | None) -> str:
    """Return a task's figures of one stage as text, such as `0.716 (0.687 to 0.743)`; `-` where there are none."""
    if entry is None:
        return "-"
    low, high = entry["interval"]
    return f"{entry['strict']:.3f} ({low:.3f} to {high:.3f})"


def write_matrix(path: Path, found: dict[str, dict[str, dict]]) -> None:
    """Write the matrix as JSON, as a whole or not at all."""
    write_file(path, json.dumps(found, indent=2) + "\n")
