"""Figures of judged reports: mean errors by category and severity, error-free shares, judge agreement.

Reports without a readable rating are counted by reason and excluded from all figures. Intervals resample patients.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llava.eval.judge.summary import Pairs, exact, mean_difference, spearman_correlation, within_one
from llava.eval.reports.error_prompt import CATEGORIES
from llava.eval.reports.error_replies import SEVERITIES, Rating
from llava.eval.reports.figures import ReportFigure, Resampler, mean_figure
from llava.utils.bootstrap import confidence_interval

TOTALS = ("significant", "insignificant", "total")


@dataclass(frozen=True, slots=True)
class JudgedReport:
    """Rating of one report: its number, patient, and counts, or the reason why it has none."""

    index: int
    patient: str
    rating: Rating | None
    failure: str = ""

    def total(self, name: str) -> int:
        """Return the number of errors of a severity, or in total."""
        assert self.rating is not None
        severities = {"significant": SEVERITIES[:1], "insignificant": SEVERITIES[1:]}.get(name, SEVERITIES)
        return sum(sum((self.rating[severity] or {}).values()) for severity in severities)


def error_summary(judged: Sequence[JudgedReport], *, num_draws: int = 500) -> dict[str, Any]:
    """Return the figures of judged reports as JSON values; means are errors per report.

    Keys: `num_reports`, `num_read`, `unread` (counts by reason), and `metrics` by name with value, ci_l and ci_h.
    """
    read = [one for one in judged if one.rating is not None]
    summary: dict[str, Any] = {
        "num_reports": len(judged),
        "num_read": len(read),
        "unread": dict(Counter(one.failure for one in judged if one.rating is None).most_common()),
    }
    resampler = Resampler([one.patient for one in read], num_draws)
    return {
        **summary,
        "metrics": {figure.name: _estimate(figure, resampler) for figure in _figures(read)} if read else {},
    }


def _figures(read: Sequence[JudgedReport]) -> list[ReportFigure]:
    totals = {name: np.array([one.total(name) for one in read], dtype=np.float64) for name in TOTALS}
    figures = [
        mean_figure(f"{name} errors", values, direction="lower", scale="errors") for name, values in totals.items()
    ]
    figures.append(mean_figure("error-free", totals["total"] == 0))
    figures.append(mean_figure("without significant errors", totals["significant"] == 0))
    for severity in SEVERITIES:
        for category in CATEGORIES.values():
            counts = [(one.rating or {}).get(severity) or {} for one in read]
            values = [float(row[category]) for row in counts]
            name = f"{category}, {severity.removeprefix('clinically_')}"
            figures.append(mean_figure(name, values, direction="lower", scale="errors"))
    return figures


def _estimate(figure: ReportFigure, resampler: Resampler) -> dict[str, Any]:
    low, high = np.percentile(resampler.values(figure, kind="clustered"), [2.5, 97.5])
    facts = {"scale": figure.scale, "direction": figure.direction, "num_clusters": resampler.num_clusters}
    return {"value": figure.value(), "ci_l": float(low), "ci_h": float(high), **facts}


def mean_absolute_difference(pairs: Pairs) -> float:
    """Return the mean distance of two judges' counts; the published figure of agreement."""
    return float(np.mean(np.abs(pairs[:, 0] - pairs[:, 1])))


def kendall_tau(pairs: Pairs) -> float:
    """Return Kendall's tau-b; NaN if a judge gives all reports the same count."""
    first, second = (np.sign(column[:, None] - column[None, :]) for column in pairs.T)
    size = math.sqrt(float((first != 0).sum()) * float((second != 0).sum()))
    return float((first * second).sum()) / size if size else math.nan


MEASURES: dict[str, Callable[[Pairs], float]] = {
    "exact": exact,
    "within one": within_one,
    "mean absolute difference": mean_absolute_difference,
    "mean difference": mean_difference,
    "Spearman": spearman_correlation,
    "Kendall tau-b": kendall_tau,
}
"""Measures of the agreement of two judges by name."""


def judge_agreement(
    first: Sequence[JudgedReport], second: Sequence[JudgedReport], *, num_draws: int = 500
) -> dict[str, Any]:
    """Return the agreement of two judges of the same reports, on the reports that both rated.

    Keys: `num_reports`, `unread` (numbers of each judge), and for `significant`, `insignificant` and `total` errors the
    measures with value, ci_l and ci_h.
    """
    pairs = [(one, other) for one, other in zip(first, second, strict=True) if one.rating and other.rating]
    report: dict[str, Any] = {
        "num_reports": len(pairs),
        "unread": [sum(one.rating is None for one in side) for side in (first, second)],
    }
    patients = [one.patient for one, _ in pairs]
    for name in TOTALS if pairs else ():
        table = np.array([[one.total(name), other.total(name)] for one, other in pairs], dtype=np.float64)
        report[name] = {measure: _measure(run, table, patients, num_draws) for measure, run in MEASURES.items()}
    return report


def _measure(
    measure: Callable[[Pairs], float], table: Pairs, patients: Sequence[str], num_draws: int
) -> Mapping[str, float | None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # a resample without variance must not be averaged silently
        value = measure(table)
        low, high = confidence_interval(table, measure, clusters=patients, num_resamples=num_draws)
    return {key: None if math.isnan(x) else x for key, x in (("value", value), ("ci_l", low), ("ci_h", high))}
