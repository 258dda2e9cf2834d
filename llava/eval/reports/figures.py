"""Corpus figures as functions of sums over reports, and their intervals.

    per-report statistics [n, k] --sum--> [k] --combine--> value
                                 --resampled sums [R, k]--> R values --> median, interval

Every figure here is such a function: a mean, an F1 of pooled counts, BLEU. A resample is a vector of weights, so all
resamples of a figure are one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llava.eval.intervals import Draws
from llava.utils.bootstrap import LEVEL

Array = NDArray[np.float64]

Combine = Callable[[Array], Array]
"""Maps sums [..., k] to values [...]."""

NUM_DRAWS = 500
PUBLISHED_SEED = 3
SACREBLEU_SEED = 12345

CHUNK = 100
"""Resamples whose weights are multiplied at once; bounds the memory."""


@dataclass(frozen=True)
class ReportFigure:
    """Figure of a set of reports.

    Attributes:
        name: name as printed.
        stats: statistics of each report, [n, k].
        combine: maps sums of `stats` to values.
        scale: scale of the values, such as `0-1`.
        direction: `higher` or `lower`, whichever is better.
        source: where labels, graphs or values came from.
        interval: `percentile` of the published tool, or `sacrebleu`.
    """

    name: str
    stats: Array
    combine: Combine
    scale: str = "0-1"
    direction: str = "higher"
    source: str = ""
    interval: str = "percentile"

    def value(self, chosen: NDArray[np.bool_] | None = None) -> float:
        """Return the figure of all reports, or of the chosen ones; NaN without any."""
        stats = self.stats if chosen is None else self.stats[chosen]
        return float(self.combine(stats.sum(axis=0))) if len(stats) else float("nan")


def mean_figure(name: str, values: Sequence[float] | Array, **facts: Any) -> ReportFigure:
    """Return the figure that is the mean of one value per report."""
    column = np.asarray(values, dtype=np.float64)
    return ReportFigure(name, np.stack([column, np.ones_like(column)], axis=1), _mean, **facts)


def _mean(sums: Array) -> Array:
    return np.divide(sums[..., 0], sums[..., 1])


def draw_counts(num_reports: int, *, kind: str, num_draws: int = NUM_DRAWS) -> NDArray[np.float32]:
    """Return how often each report is in each published resample, [num_draws, num_reports].

    Args:
        num_reports: number of reports.
        kind: `percentile` for numpy's legacy generator with seed 3, `sacrebleu` for that of sacrebleu.
        num_draws: number of resamples.
    """
    if kind == "sacrebleu":
        drawn = np.random.default_rng(SACREBLEU_SEED).choice(num_reports, size=(num_draws, num_reports), replace=True)
    else:
        drawn = np.random.RandomState(PUBLISHED_SEED).randint(0, num_reports, (num_draws, num_reports))
    counts = np.empty((num_draws, num_reports), dtype=np.float32)
    for row, indices in enumerate(drawn):
        counts[row] = np.bincount(indices, minlength=num_reports)
    return counts


@dataclass
class Resampler:
    """Resamples of one set of reports, drawn once and shared by all its figures.

    Args:
        clusters: patient of each report, for the clustered intervals.
        num_draws: number of resamples.
    """

    clusters: Sequence[Hashable]
    num_draws: int = NUM_DRAWS
    _counts: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    _sums: dict[tuple[int, str], tuple[Array, Array]] = field(default_factory=dict)

    @cached_property
    def _draws(self) -> Draws:
        return Draws(self.clusters, num_resamples=self.num_draws)

    @property
    def cluster_of(self) -> NDArray[np.intp]:
        """Number of the patient of each report, [n]."""
        return self._draws.cluster_of

    @property
    def num_clusters(self) -> int:
        """Number of patients."""
        return int(self._draws.weights.shape[1])

    def values(self, figure: ReportFigure, *, kind: str | None = None) -> Array:
        """Return the figure in each resample, [num_draws]; `kind` is that of the figure or `clustered`."""
        return figure.combine(self._resampled(figure.stats, kind or figure.interval))

    def _resampled(self, stats: Array, kind: str) -> Array:
        """Return the sums of statistics in each resample, [num_draws, k].

        Figures with common statistics share them.
        """
        key = (id(stats), kind)
        if key not in self._sums:
            if kind == "clustered":
                sums = self._draws.weights @ cluster_sums(stats, self.cluster_of, self.num_clusters)
            else:
                if kind not in self._counts:
                    self._counts[kind] = draw_counts(len(stats), kind=kind, num_draws=self.num_draws)
                counts = self._counts[kind]
                parts = [counts[at : at + CHUNK].astype(np.float64) @ stats for at in range(0, len(counts), CHUNK)]
                sums = np.concatenate(parts)
            self._sums[key] = (stats, sums)  # keep the statistics alive, so that their id is not reused
        return self._sums[key][1]

    def estimate(self, figure: ReportFigure) -> dict[str, Any]:
        """Return value, published interval and clustered interval of a figure as JSON values."""
        value = figure.value()
        drawn = self.values(figure)
        if figure.interval == "sacrebleu":
            median, (low, high) = value, sacrebleu_interval(drawn)
        else:
            low, median, high = (float(x) for x in np.percentile(drawn, _PERCENTILES))
        clustered = np.percentile(self.values(figure, kind="clustered"), _PERCENTILES)
        return {
            "value": value,
            "median": median,
            "ci_l": low,
            "ci_h": high,
            "clustered": {
                "ci_l": float(clustered[0]),
                "ci_h": float(clustered[2]),
                "num_clusters": self.num_clusters,
            },
            "scale": figure.scale,
            "direction": figure.direction,
            "source": figure.source,
        }


_TAIL = 50.0 * (1.0 - LEVEL)
_PERCENTILES = (_TAIL, 50.0, 100.0 - _TAIL)


def cluster_sums(stats: Array, cluster_of: NDArray[np.intp], num_clusters: int) -> Array:
    """Return the sums of statistics over the reports of each cluster, [num_clusters, k]."""
    sums = np.zeros((num_clusters, stats.shape[1]))
    np.add.at(sums, cluster_of, stats)
    return sums


def sacrebleu_interval(drawn: Array) -> tuple[float, float]:
    """Return the interval of sacrebleu: mean of the resamples, and half the distance of its 2.5 % ranks."""
    ordered = np.sort(drawn)
    rank = len(ordered) // 40
    half = 0.5 * (ordered[len(ordered) - rank - 1] - ordered[rank])
    return float(drawn.mean() - half), float(drawn.mean() + half)


def f1_of_counts(true: Array, false: Array, missed: Array) -> Array:
    """Return F1 from true positives, false positives and false negatives; 0 where there are none of them."""
    total = 2.0 * true + false + missed
    result: Array = np.divide(2.0 * true, total, out=np.zeros_like(total, dtype=np.float64), where=total > 0)
    return result
