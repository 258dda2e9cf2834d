"""How far two judges agree about the same answers; two orders of one judge are two judges.

    scores A, scores B  --by question-->  exact, within one, correlations, weighted kappa, same winner
                                          each with an interval clustered by picture

Quadratic weighted kappa is written for numbers of any kind (means of two orders are halves): one minus the mean squared
difference over what it would be if the two judges' scores were drawn independently. For whole scores that is the usual
kappa with quadratic weights.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llava.errors import DataError
from llava.eval.judge.scores import Rated
from llava.eval.text_table import Cell, simple_table
from llava.utils.bootstrap import confidence_interval

Pairs = NDArray[np.float64]
"""Scores by judge A and by judge B, [n, 2]."""


def exact(pairs: Pairs) -> float:
    """Share of equal scores."""
    return float(np.mean(pairs[:, 0] == pairs[:, 1]))


def within_one(pairs: Pairs) -> float:
    """Share of scores at most one apart."""
    return float(np.mean(np.abs(pairs[:, 0] - pairs[:, 1]) <= 1.0))


def mean_difference(pairs: Pairs) -> float:
    """Mean of A minus B."""
    return float(np.mean(pairs[:, 0] - pairs[:, 1]))


def pearson(pairs: Pairs) -> float:
    """Linear correlation; NaN when a judge gives one score to all."""
    first, second = (pairs - pairs.mean(axis=0)).T
    size = math.sqrt(float(first @ first) * float(second @ second))
    return float(first @ second) / size if size > 1e-12 else math.nan


def spearman(pairs: Pairs) -> float:
    """Correlation of ranks, equal scores sharing their mean rank; NaN when a judge gives one score to all."""
    return pearson(np.stack([_ranks(pairs[:, 0]), _ranks(pairs[:, 1])], axis=1))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    means: NDArray[np.float64] = last - (counts - 1) / 2.0
    return means[place]


def kappa(pairs: Pairs) -> float:
    """Quadratic weighted kappa; NaN when both judges give one and the same score to all."""
    first, second = pairs.T
    by_chance = first.var() + second.var() + (first.mean() - second.mean()) ** 2
    return 1.0 - float(np.mean((first - second) ** 2)) / float(by_chance) if by_chance > 1e-12 else math.nan


MEASURES: dict[str, Callable[[Pairs], float]] = {
    "exact": exact,
    "within one": within_one,
    "Pearson": pearson,
    "Spearman": spearman,
    "weighted kappa": kappa,
    "mean difference": mean_difference,
}


def agreement(
    first: Mapping[str, tuple[float, float]],
    second: Mapping[str, tuple[float, float]],
    images: Mapping[str, str],
    *,
    num_resamples: int = 500,
    seed: int = 0,
) -> dict[str, Any]:
    """Return how far two sets of scores agree.

    Args:
        first: scores of reference and answer by question id, by judge A.
        second: the same by judge B.
        images: the picture of each question.
        num_resamples: of the intervals.
        seed: of the resampling.

    Returns:
        `num_questions` (with scores by both), and for `reference` and `answer` each measure with its interval; under
        `winner` the share of questions on which both prefer the same answer, or neither prefers one.

    Raises:
        DataError: no question has scores by both.
    """
    ids = [identity for identity in first if identity in second]
    if not ids:
        raise DataError(
            "the two sets of scores have no scored question in common; compare judgements of one answer file"
        )
    clusters = [images[identity] for identity in ids]
    table = np.array([(first[identity], second[identity]) for identity in ids])  # [n, judge, answer]
    report: dict[str, Any] = {"num_questions": len(ids)}
    for place, name in enumerate(("reference", "answer")):
        report[name] = {
            measure: _estimate(statistic, table[:, :, place], clusters, num_resamples, seed)
            for measure, statistic in MEASURES.items()
        }
    winners = np.sign(table[:, :, 1] - table[:, :, 0])
    report["winner"] = {"exact": _estimate(exact, winners, clusters, num_resamples, seed)}
    return report


def _estimate(
    statistic: Callable[[Pairs], float], pairs: Pairs, clusters: Sequence[str], num_resamples: int = 500, seed: int = 0
) -> dict[str, float | None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # a resample without spread must be seen, not averaged
        value = statistic(pairs)
        low, high = confidence_interval(pairs, statistic, clusters=clusters, num_resamples=num_resamples, seed=seed)
    return {name: None if math.isnan(x) else x for name, x in (("value", value), ("low", low), ("high", high))}


def of_judges(first: Sequence[Rated], second: Sequence[Rated], **options: Any) -> dict[str, Any]:
    """Return how far two files of scores about the same questions agree; see `agreement`.

    Raises:
        DataError: they are about other questions.
    """
    if {one.id for one in first} != {one.id for one in second}:
        raise DataError("the two files of scores hold different questions; compare judgements of one answer file")
    images = {one.id: one.image for one in first}
    report = agreement(_scored(first), _scored(second), images, **options)
    report["unscored"] = {
        "first": sum(one.scores is None for one in first),
        "second": sum(one.scores is None for one in second),
    }
    return report


def of_orders(rated: Sequence[Rated], **options: Any) -> dict[str, Any] | None:
    """Return how far a judge agrees with itself when the answers change places; None when one order was judged.

    `first place` is by how much a place at the front raises a score: the mean over both answers.
    """
    both = {
        one.id: (one.orders["12"], one.orders["21"])
        for one in rated
        if one.orders is not None and one.orders.get("12") is not None and one.orders.get("21") is not None
    }
    if not both:
        return None
    images = {one.id: one.image for one in rated}
    straight = {identity: pair[0] for identity, pair in both.items() if pair[0] is not None}
    swapped = {identity: pair[1] for identity, pair in both.items() if pair[1] is not None}
    report = agreement(straight, swapped, images, **options)
    # In order 12 the reference stands in front, in order 21 the answer.
    places = np.array(
        [
            (straight[identity][0] + swapped[identity][1], swapped[identity][0] + straight[identity][1])
            for identity in both
        ]
    )
    report["first place"] = _estimate(mean_difference, places / 2.0, [images[identity] for identity in both], **options)
    return report


def _scored(rated: Sequence[Rated]) -> dict[str, tuple[float, float]]:
    return {one.id: one.scores for one in rated if one.scores is not None}


def agreement_table(report: Mapping[str, Any]) -> str:
    """Return an agreement as text, one measure a line."""
    rows: list[list[Cell]] = [
        [measure, _cell(report["reference"][measure]), _cell(report["answer"][measure])] for measure in MEASURES
    ]
    rows.append(["same winner", "", _cell(report["winner"]["exact"])])
    if "first place" in report:
        rows.append(["gain of the first place", "", _cell(report["first place"])])
    return simple_table(["measure", "reference", "answer"], rows)


def _cell(estimate: Mapping[str, float | None]) -> str:
    value, low, high = ("-" if (x := estimate[key]) is None else f"{x:.3f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
