"""From one value an item to a figure with an interval, and to the difference of two systems on the same items.

All figures are percentages. Intervals come from drawing whole images again; two scores are compared on the same draws.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llava.errors import ConfigError
from llava.utils.bootstrap import resamples

LEVEL = 0.95


@dataclass(frozen=True)
class Score:
    """One value an item, [n], NaN where the score does not look at the item.

    Attributes:
        values: shares between 0 and 1, [n].
        members: None for a plain mean; otherwise [k, n], which items belong to each of k groups, for a mean of the
            groups' means.
    """

    values: NDArray[np.float64]
    members: NDArray[np.bool_] | None = None

    @staticmethod
    def of(values: ArrayLike, groups: Sequence[Sequence[str]] | None = None) -> Score:
        """Return a score; `groups` names the groups of each item and asks for the mean of the groups' means."""
        array = np.asarray(values, dtype=np.float64)
        if groups is None:
            return Score(array)
        names = sorted({name for item in groups for name in item})
        members = np.array([[name in item for item in groups] for name in names], dtype=bool)
        return Score(array, members.reshape(len(names), len(array)))

    def mean(self, indices: NDArray[np.intp] | None = None) -> float:
        """Return the percentage over all items, or over those at `indices` (which may repeat); NaN over none."""
        values = self.values if indices is None else self.values[indices]
        asked = ~np.isnan(values)
        if self.members is None:
            return 100.0 * float(values[asked].mean()) if asked.any() else math.nan
        members = (self.members if indices is None else self.members[:, indices]) & asked
        sizes = members.sum(axis=1)
        if not sizes.any():
            return math.nan
        totals = members @ np.where(asked, values, 0.0)
        return 100.0 * float((totals[sizes > 0] / sizes[sizes > 0]).mean())

    @property
    def num_items(self) -> int:
        """How many items the score looks at."""
        return int((~np.isnan(self.values)).sum())


@dataclass(frozen=True, slots=True)
class Estimate:
    """A percentage, its interval and the number of items behind it."""

    value: float
    low: float
    high: float
    num_items: int

    def to_json(self) -> dict[str, Any]:
        """Return the fields; a figure over no item is null."""
        figures = {"value": self.value, "low": self.low, "high": self.high}
        return {name: None if math.isnan(x) else x for name, x in figures.items()} | {"num_items": self.num_items}


class Draws:
    """The resamples of one set of items, drawn once and used for every score of it."""

    def __init__(self, clusters: Sequence[Hashable], *, num_resamples: int = 500, seed: int = 0) -> None:
        self.num_items = len(clusters)
        self.indices = list(resamples(len(clusters), clusters=clusters, num_resamples=num_resamples, seed=seed))

    def estimate(self, score: Score) -> Estimate:
        """Return a score with its interval."""
        self._check(score)
        return self._of(score.mean(), [score.mean(indices) for indices in self.indices], score.num_items)

    def difference(self, score: Score, other: Score) -> Estimate:
        """Return `score - other`, both about the same items, with the interval of the difference."""
        self._check(score)
        self._check(other)
        differences = [score.mean(indices) - other.mean(indices) for indices in self.indices]
        return self._of(score.mean() - other.mean(), differences, score.num_items)

    def estimates(self, scores: Mapping[str, Score]) -> dict[str, Estimate]:
        """Return every score with its interval."""
        return {name: self.estimate(score) for name, score in scores.items()}

    def _check(self, score: Score) -> None:
        if len(score.values) != self.num_items:
            raise ConfigError(f"expected one value for each of {self.num_items} items, got {len(score.values)}")

    @staticmethod
    def _of(value: float, drawn: Sequence[float], num_items: int) -> Estimate:
        figures = np.asarray([figure for figure in drawn if not math.isnan(figure)])
        if figures.size == 0:
            return Estimate(value, math.nan, math.nan, num_items)
        low, high = np.quantile(figures, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Estimate(value, float(low), float(high), num_items)
