"""How sure a score is: intervals from resampling whole clusters.

Questions about one image are not independent of each other, so the image is what is drawn again, not the question.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llava.errors import ConfigError

LEVEL = 0.95
"""The share of resamples inside an interval."""

Statistic = Callable[[NDArray[Any]], float]


def resamples(
    num_values: int, *, clusters: Sequence[Hashable] | None = None, num_resamples: int = 500, seed: int = 0
) -> Iterator[NDArray[np.intp]]:
    """Yield index arrays, each the values of as many clusters, drawn with replacement, as there are.

    Args:
        num_values: how many values there are.
        clusters: the cluster of each value; None makes every value its own.
        num_resamples: how many arrays to yield.
        seed: the same seed gives the same arrays, so that two systems can be compared on the same resamples.
    """
    if clusters is not None and len(clusters) != num_values:
        raise ConfigError(f"one cluster a value is needed: got {len(clusters)} clusters for {num_values} values")
    groups: dict[Hashable, list[int]] = {}
    for index in range(num_values):
        groups.setdefault(index if clusters is None else clusters[index], []).append(index)
    members = [np.asarray(group, dtype=np.intp) for group in groups.values()]
    generator = np.random.default_rng(seed)
    for _ in range(num_resamples if members else 0):
        drawn = generator.integers(len(members), size=len(members))
        yield np.concatenate([members[index] for index in drawn])


def confidence_interval(
    values: ArrayLike,
    statistic: Statistic,
    *,
    clusters: Sequence[Hashable] | None = None,
    num_resamples: int = 500,
    seed: int = 0,
    level: float = LEVEL,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of `statistic(values)`.

    Args:
        values: one value or one row of values an item, [n] or [n, k].
        statistic: maps a resample of `values` to a number; a resample on which it is not a number is left out.
        clusters: the cluster (image, patient) of each item; None resamples single items.
        num_resamples: how many resamples to draw.
        seed: of the resampling.
        level: the share of resamples inside the interval.

    Returns:
        (low, high); both NaN when there is no value.
    """
    array = np.asarray(values)
    draws = resamples(len(array), clusters=clusters, num_resamples=num_resamples, seed=seed)
    return percentiles(np.asarray([statistic(array[indices]) for indices in draws], dtype=np.float64), level=level)


def percentiles(statistics: NDArray[np.float64], *, level: float = LEVEL) -> tuple[float, float]:
    """Return the interval that holds the share `level` of the statistics that are numbers; NaN where none is."""
    found = statistics[~np.isnan(statistics)]
    if found.size == 0:
        return float("nan"), float("nan")
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(found, [tail, 1.0 - tail])
    return float(low), float(high)
