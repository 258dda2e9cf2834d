"""Percentages with bootstrap intervals from one value per item, and paired differences of two systems.

Resampling is by image, not by item; two scores are compared on the same resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llava.errors import ConfigError
from llava.utils.bootstrap import iter_draws, percentile_interval


def percent_text(value: float | None, *, signed: bool = False) -> str:
    """Return a percentage with two decimals; `-` for None."""
    return "-" if value is None else format(value, "+.2f" if signed else ".2f")


def interval_text(estimate: Mapping[str, Any]) -> str:
    """Return an interval as `[low, high]`."""
    return f"[{percent_text(estimate['low'])}, {percent_text(estimate['high'])}]"


@dataclass(frozen=True)
class ItemScores:
    """Score with one value per item, [n]; NaN where the score does not apply to the item.

    Attributes:
        values: shares between 0 and 1, [n].
        members: membership of items in each of k groups, [k, n], for a mean of the groups' means; None for a plain
            mean.
    """

    values: NDArray[np.float64]
    members: NDArray[np.bool_] | None = None

    @staticmethod
    def of(values: ArrayLike, groups: Sequence[Sequence[str]] | None = None) -> ItemScores:
        """Return a score; with group names per item in `groups`, its mean is the mean of group means."""
        array = np.asarray(values, dtype=np.float64)
        if groups is None:
            return ItemScores(array)
        names = sorted({name for item in groups for name in item})
        members = np.array([[name in item for item in groups] for name in names], dtype=bool)
        return ItemScores(array, members.reshape(len(names), len(array)))

    def mean(self) -> float:
        """Return the percentage over all items; NaN without items."""
        return float(self.means(np.ones((1, len(self.values))), np.arange(len(self.values)))[0])

    def means(self, weights: NDArray[np.float64], cluster_of: NDArray[np.intp]) -> NDArray[np.float64]:
        """Return the percentage in each of R resamples, [R]; NaN where the score applies to no item.

        Args:
            weights: number of draws of each of C clusters, [R, C].
            cluster_of: cluster index of each item, [n].
        """
        asked = ~np.isnan(self.values)
        members = asked[None] if self.members is None else self.members & asked
        values = np.where(asked, self.values, 0.0)
        num_clusters = weights.shape[1]
        shares = np.full((len(members), len(weights)), math.nan)
        for group, chosen in enumerate(members):
            totals = weights @ np.bincount(cluster_of, values * chosen, num_clusters)
            sizes = weights @ np.bincount(cluster_of, chosen.astype(np.float64), num_clusters)
            np.divide(totals, sizes, out=shares[group], where=sizes > 0)
        present = ~np.isnan(shares)
        num_groups = present.sum(axis=0)
        sums = np.where(present, shares, 0.0).sum(axis=0)
        means: NDArray[np.float64] = np.full(len(weights), math.nan)
        np.divide(100.0 * sums, num_groups, out=means, where=num_groups > 0)
        return means

    @property
    def num_items(self) -> int:
        """Number of items that the score applies to."""
        return int((~np.isnan(self.values)).sum())


@dataclass(frozen=True, slots=True)
class Estimate:
    """Percentage with its interval and the number of items it covers."""

    value: float
    low: float
    high: float
    num_items: int

    def to_json(self) -> dict[str, Any]:
        """Return the fields; the figures are null without items."""
        figures = {"value": self.value, "low": self.low, "high": self.high}
        return {name: None if math.isnan(x) else x for name, x in figures.items()} | {"num_items": self.num_items}


class Draws:
    """Resamples of one set of items, drawn once and shared by all scores of it.

    >>> draws = Draws(["1.png", "1.png", "2.png", "3.png"])
    >>> found = draws.estimate(ItemScores.of([1, 1, 0, 1]))
    >>> found.value, found.low <= found.value <= found.high
    (75.0, True)

    Args:
        clusters: image of each item; items of one image are drawn together.
        num_resamples: number of resamples.
        seed: seed of the draws.
    """

    def __init__(self, clusters: Sequence[Hashable], *, num_resamples: int = 500, seed: int = 0) -> None:
        self.num_items = len(clusters)
        place = {name: index for index, name in enumerate(dict.fromkeys(clusters))}
        self.cluster_of = np.array([place[name] for name in clusters], dtype=np.intp)
        drawn = iter_draws(len(place), num_resamples=num_resamples, seed=seed)
        counts = [np.bincount(chosen, minlength=len(place)) for chosen in drawn]
        self.weights = np.array(counts, dtype=np.float64).reshape(len(counts), len(place))

    def estimate(self, score: ItemScores) -> Estimate:
        """Return the percentage of a score with its interval."""
        self._check(score)
        return self._of(score.mean(), self._means(score), score.num_items)

    def estimate_sums(
        self, stats: NDArray[np.float64], combine: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    ) -> Estimate:
        """Return a figure that is a function of sums over the items, such as an F1, with its interval.

        Args:
            stats: statistics of each item, [n, k].
            combine: maps sums [..., k] to values [...].
        """
        clusters = np.zeros((self.weights.shape[1], stats.shape[1]))
        np.add.at(clusters, self.cluster_of, stats)
        drawn = combine(self.weights @ clusters)
        return self._of(float(combine(stats.sum(axis=0))), drawn, len(stats))

    def difference(self, score: ItemScores, other: ItemScores) -> Estimate:
        """Return `score - other` with the interval of the difference; both scores cover the same items."""
        self._check(score)
        self._check(other)
        differences = self._means(score) - self._means(other)
        return self._of(score.mean() - other.mean(), differences, score.num_items)

    def _means(self, score: ItemScores) -> NDArray[np.float64]:
        return score.means(self.weights, self.cluster_of)

    def _check(self, score: ItemScores) -> None:
        if len(score.values) != self.num_items:
            raise ConfigError(f"expected one value for each of {self.num_items} items, got {len(score.values)}")

    @staticmethod
    def _of(value: float, drawn: NDArray[np.float64], num_items: int) -> Estimate:
        return Estimate(value, *percentile_interval(drawn), num_items)
