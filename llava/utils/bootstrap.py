"""Bootstrap confidence intervals that resample whole clusters.

Questions about one image are not independent of each other, so images are resampled instead of questions.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llava.errors import ConfigError

LEVEL = 0.95
"""Share of resamples inside an interval."""

Statistic = Callable[[NDArray[Any]], float]


def iter_resamples(
    num_values: int, *, clusters: Sequence[Hashable] | None = None, num_resamples: int = 500, seed: int = 0
) -> Iterator[NDArray[np.intp]]:
    """Yield arrays of value indices, each from all clusters drawn with replacement.

    Args:
        num_values: number of values.
        clusters: cluster of each value; None for one cluster per value.
        num_resamples: number of arrays.
        seed: seed of the draws; with one seed, two systems are compared on the same resamples.

    Raises:
        ConfigError: `clusters` has another length than the values.
    """
    if clusters is not None and len(clusters) != num_values:
        raise ConfigError(f"got {len(clusters)} clusters for {num_values} values; expected one cluster per value")
    groups: dict[Hashable, list[int]] = {}
    for index in range(num_values):
        groups.setdefault(index if clusters is None else clusters[index], []).append(index)
    members = [np.asarray(group, dtype=np.intp) for group in groups.values()]
    for drawn in iter_draws(len(members), num_resamples=num_resamples, seed=seed):
        yield np.concatenate([members[index] for index in drawn])


def iter_draws(num_clusters: int, *, num_resamples: int = 500, seed: int = 0) -> Iterator[NDArray[np.intp]]:
    """Yield arrays of cluster numbers, each drawn with replacement; none without clusters."""
    generator = np.random.default_rng(seed)
    for _ in range(num_resamples if num_clusters else 0):
        yield generator.integers(num_clusters, size=num_clusters)


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
        values: one value or one row of values per item, [n] or [n, k].
        statistic: maps a resample of `values` to a number; resamples with NaN are ignored.
        clusters: cluster (image, patient) of each item; None resamples single items.
        num_resamples: number of resamples.
        seed: seed of the resampling.
        level: share of resamples inside the interval.

    Returns:
        (low, high); both NaN without values.
    """
    array = np.asarray(values)
    draws = iter_resamples(len(array), clusters=clusters, num_resamples=num_resamples, seed=seed)
    return percentile_interval(
        np.asarray([statistic(array[indices]) for indices in draws], dtype=np.float64), level=level
    )


def percentile_interval(statistics: NDArray[np.float64], *, level: float = LEVEL) -> tuple[float, float]:
    """Return the interval that contains the share `level` of the statistics, ignoring NaN."""
    found = statistics[~np.isnan(statistics)]
    if found.size == 0:
        return float("nan"), float("nan")
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(found, [tail, 1.0 - tail])
    return float(low), float(high)
