"""Comparison of prediction files on the same references: differences with intervals and p-values.

    files --same ids and references--> figures of each --whole patients drawn--> interval of the difference
                                                       --whole patients swapped--> p-value, Holm over all comparisons

The p-value is that of a sign-flip test: under the null hypothesis the two systems can be exchanged for any patient.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from llava.errors import DataError
from llava.eval.reports.figures import Array, ReportFigure, Resampler, cluster_sums
from llava.eval.reports.rows import ReportPair
from llava.utils.bootstrap import percentile_interval

NUM_FLIPS = 2000
FLIP_SEED = 0

TOLERANCE = 1e-12
"""Differences that are equal but for rounding."""


def check_same_reports(files: Sequence[str], reports: Sequence[Sequence[ReportPair]]) -> None:
    """Check that files have the same ids and references in the same order.

    Raises:
        DataError: they differ; names file and row, and both counts where they differ.
    """
    first = reports[0]
    for file, pairs in zip(files[1:], reports[1:], strict=True):
        for one, other in zip(first, pairs, strict=False):
            what = "id" if one.id != other.id else "reference" if one.reference != other.reference else None
            if what is not None:
                raise DataError(
                    f"{file}, row {other.index}: the {what} differs from that of {files[0]}; only predictions for the "
                    f"same reports, in the same order, can be compared"
                )
        if len(first) != len(pairs):
            row = min(len(first), len(pairs))
            raise DataError(
                f"{file}, row {row}: the file has {len(pairs)} rows, but {files[0]} has {len(first)}; only predictions "
                f"for the same reports can be compared"
            )


def compare_figures(
    systems: Sequence[Sequence[ReportFigure]], clusters: Sequence[Any], *, num_draws: int
) -> list[dict[str, Any]]:
    """Return the differences of each pair of systems, the first pair first.

    Args:
        systems: figures of each system; those with a name in both systems of a pair are compared.
        clusters: patient of each report.
        num_draws: number of resamples.

    Returns:
        `{"first", "second", "differences": {name: {"value", "ci_l", "ci_h", "p_value", "p_holm", ...}}}` for each pair.
        A difference is first minus second; `p_holm` is adjusted for all figures of all pairs.
    """
    resampler = Resampler(clusters, num_draws)
    pairs = []
    for one, other in combinations(range(len(systems)), 2):
        known = {figure.name: figure for figure in systems[other]}
        shared = [(figure, known[figure.name]) for figure in systems[one] if figure.name in known]
        differences = {figure.name: _difference(figure, second, resampler) for figure, second in shared}
        pairs.append({"first": one, "second": other, "differences": differences})
    cells = [cell for pair in pairs for cell in pair["differences"].values()]  # type: ignore[attr-defined]
    for cell, adjusted in zip(cells, holm([cell["p_value"] for cell in cells]), strict=True):
        cell["p_holm"] = adjusted
    return pairs


def _difference(one: ReportFigure, other: ReportFigure, resampler: Resampler) -> dict[str, Any]:
    drawn = resampler.values(one, kind="clustered") - resampler.values(other, kind="clustered")
    low, high = percentile_interval(drawn)
    return {
        "value": one.value() - other.value(),
        "ci_l": low,
        "ci_h": high,
        "p_value": flip_p_value(one, other, resampler),
        "first": one.value(),
        "second": other.value(),
        "scale": one.scale,
        "direction": one.direction,
        "source": [one.source, other.source],
    }


def flip_p_value(one: ReportFigure, other: ReportFigure, resampler: Resampler, *, num_flips: int = NUM_FLIPS) -> float:
    """Return the two-sided p-value of the sign-flip test that exchanges the systems for whole patients."""
    num = resampler.num_clusters
    first = cluster_sums(one.stats, resampler.cluster_of, num)
    second = cluster_sums(other.stats, resampler.cluster_of, num)
    change = second - first
    generator = np.random.default_rng(FLIP_SEED)
    observed = abs(one.value() - other.value())
    num_extreme = 0
    for start in range(0, num_flips, _CHUNK):
        swapped = generator.integers(0, 2, size=(min(_CHUNK, num_flips - start), num)).astype(np.float64)
        moved: Array = swapped @ change
        values = one.combine(first.sum(axis=0) + moved) - other.combine(second.sum(axis=0) - moved)
        num_extreme += int((np.abs(values) >= observed - TOLERANCE).sum())
    return (1 + num_extreme) / (1 + num_flips)


_CHUNK = 200
"""Exchanges that are computed at once; bounds the memory."""


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted by Holm's method, in the given order."""
    order = np.argsort(p_values, kind="stable")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
