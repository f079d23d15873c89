"""Figures of scores: means and bootstrap intervals, over pictures or over kinds of them."""

from collections.abc import Callable, Sequence

import numpy as np

from .items import Item, Score

_RESAMPLES = 2000
Rows = Sequence[tuple[Item, Score]]


def figures_of_kinds(rows: Rows, measures: tuple[str, ...], mean_of_kinds: bool) -> dict:
    """Return a task's figures, as `figures` has them, and under `kinds` those of each kind, {} where there is but one.

    With `mean_of_kinds` the task's own are the unweighted means of its kinds'.
    """
    kinds = list(grouped(rows, lambda item: item.kind).items())
    of_kinds = {kind: figures([of_kind], measures) for kind, of_kind in kinds}
    found = figures([of_kind for _, of_kind in kinds] if mean_of_kinds else [rows], measures)
    return {**found, "kinds": of_kinds if len(kinds) > 1 else {}}


def grouped(rows: Rows, name_of: Callable[[Item], str]) -> dict[str, list[tuple[Item, Score]]]:
    """Return rows by a name of their items, in the order in which the names come up."""
    found: dict[str, list] = {}
    for row in rows:
        found.setdefault(name_of(row[0]), []).append(row)
    return found


def figures(strata: Sequence[Rows], measures: tuple[str, ...]) -> dict:
    """Return the mean of each measure over strata that weigh the same, `n`, and the `interval` of the first."""
    values = [np.array([score.values for _, score in rows], float).mean(axis=0) for rows in strata]
    means = {name: round(float(mean), 4) for name, mean in zip(measures, np.mean(values, axis=0), strict=True)}
    return {**means, "n": sum(map(len, strata)), "interval": mean_interval(*map(_clusters, strata))}


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
    rng = np.random.default_rng(0)
    drawn = [stratum[rng.integers(len(stratum), size=(_RESAMPLES, len(stratum)))].sum(axis=1) for stratum in strata]
    means = np.mean([sums[:, 0] / sums[:, 1] for sums in drawn], axis=0)
    return [round(float(edge), 4) for edge in np.percentile(means, (2.5, 97.5))]
