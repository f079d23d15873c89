"""Figures of scores: means and bootstrap intervals, over pictures or over kinds of them."""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import bootstrap

from .items import Item, Score

_RESAMPLES = 2000
Rows = Sequence[tuple[Item, Score]]


def figures_of_kinds(rows: Rows, measures: tuple[str, ...], mean_of_kinds: bool) -> dict:
    """Return a task's figures, as `figures` has them, and under `kinds` those of each kind.

    With `mean_of_kinds` the task's own are the unweighted means of its kinds'.
    """
    kinds = grouped(rows, lambda item: item.kind)
    of_kinds = {kind: figures(of_kind, measures) for kind, of_kind in kinds.items()}
    found = figures(rows, measures)
    if mean_of_kinds:
        found |= {name: round(float(np.mean([own[name] for own in of_kinds.values()])), 4) for name in measures}
        found["interval"] = mean_interval(*(_clusters(of_kind) for of_kind in kinds.values()))
    return {**found, "kinds": of_kinds}


def grouped(rows: Rows, name_of: Callable[[Item], str]) -> dict[str, list[tuple[Item, Score]]]:
    """Return rows by a name of their items, in the order in which the names come up."""
    found: dict[str, list] = {}
    for row in rows:
        found.setdefault(name_of(row[0]), []).append(row)
    return found


def figures(rows: Rows, measures: tuple[str, ...]) -> dict:
    """Return the mean of each measure, `n`, and the `interval` of the first."""
    values = np.array([score.values for _, score in rows], float)
    means = {name: round(float(mean), 4) for name, mean in zip(measures, values.mean(axis=0), strict=True)}
    return {**means, "n": len(rows), "interval": mean_interval(_clusters(rows))}


def _clusters(rows: Rows) -> np.ndarray:
    """Return sum and number of the first measure in each group of items, (G, 2)."""
    groups = grouped(rows, lambda item: item.group or item.id).values()
    return np.array([(sum(score.values[0] for _, score in group), len(group)) for group in groups], float)


def mean_interval(*strata: np.ndarray) -> list[float]:
    """Return the bootstrap interval of 95 % of a mean over strata, percentiles of 2,000 resamples, always the same.

    Args:
        strata: each (G, 2): sum and number of values in G groups. Whole groups are drawn anew, in each stratum apart,
            and the figure is the mean of the strata's means.
    """
    varying = [s for s in strata if len(s) > 1 and np.ptp(s[:, 0] / s[:, 1]) > 0]
    fixed = sum(float(s[:, 0].sum() / s[:, 1].sum()) for s in strata if not any(s is other for other in varying))
    if not varying:
        return [round(fixed / len(strata), 4)] * 2

    def mean_of_places(*places: np.ndarray, axis: int = -1) -> np.ndarray:
        drawn = [s[p.astype(int)] for s, p in zip(varying, places, strict=True)]
        return (fixed + sum(d[..., 0].sum(axis) / d[..., 1].sum(axis) for d in drawn)) / len(strata)

    found = bootstrap(
        [np.arange(len(s)) for s in varying], mean_of_places, n_resamples=_RESAMPLES, method="percentile",
        vectorized=True, rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return [round(float(found.low), 4), round(float(found.high), 4)]
