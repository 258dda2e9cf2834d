"""Summary of judged questions by type, by domain and overall, as published and with intervals.

    gpt4_score            mean score of the reference answers
    pred_score            mean score of the answers under test
    pred_relative_score   100 x mean of (answer / reference), a mean of ratios: LLaVA-Med's figure
    ratio_of_means        100 x mean(answer) / mean(reference): LLaVA's figure

The two relative figures differ if the reference's score varies; published tables contain either.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from llava.data.groups import image_name_key
from llava.errors import DataError
from llava.eval.intervals import Draws, interval_text, percent_text
from llava.eval.judge.cases import DOMAINS
from llava.eval.judge.scores import Rated
from llava.utils.bootstrap import LEVEL, confidence_interval, percentile_interval
from llava.utils.reporting import Cell, text_table

SUMMARY_VERSION = "1"
"""Version of the figures; incremented whenever a figure of the same scores changes."""

TYPES = ("conversation", "detailed_description")
OVERALL = "overall"

DomainRule = Literal["first", "all"]
"""Whether a question of several domains counts for the first of them, as published, or for all."""

PUBLISHED_ROWS = ("gpt4_score", "pred_score", "pred_relative_score", "data_size")

Figures = NDArray[np.float64]


def groups_of(rated: Sequence[Rated], *, domains: DomainRule = "first") -> dict[str, NDArray[np.bool_]]:
    """Return the members of each group, [n]: types, domains, overall; published names are first."""
    kinds = [(one.type,) if one.type else () for one in rated]
    fields = [one.domains[:1] if domains == "first" else one.domains for one in rated]
    groups = {}
    for known, names in ((TYPES, kinds), (DOMAINS, fields)):
        found = {name for item in names for name in item}
        for name in (*(name for name in known if name in found), *sorted(found - set(known))):
            groups[name] = np.array([name in item for item in names], dtype=bool)
    return groups | {OVERALL: np.ones(len(rated), dtype=bool)}


def score_summary(
    rated: Sequence[Rated], *, domains: DomainRule = "first", num_resamples: int = 500, seed: int = 0
) -> dict[str, Any]:
    """Return all figures of judged questions as JSON values.

    Args:
        rated: the judged questions.
        domains: domains that a question of several domains counts for.
        num_resamples: number of resamples of the intervals; images are resampled, not questions.
        seed: seed of the resampling.

    Returns:
        `groups`: for each group `data_size` (questions with scores), `asked`, and value, low and high of the figures
        named above; `failures`: number of questions without a score, by reason; `mean_words` if the rows contain the
        answers.
    """
    reference = np.array([math.nan if one.scores is None else one.scores[0] for one in rated])
    answer = np.array([math.nan if one.scores is None else one.scores[1] for one in rated])
    draws = Draws([image_name_key(one.image) for one in rated], num_resamples=num_resamples, seed=seed)
    return {
        "summary_version": SUMMARY_VERSION,
        "domains": domains,
        "groups": {
            name: _group(reference, answer, members, draws)
            for name, members in groups_of(rated, domains=domains).items()
        },
        "failures": dict(Counter(one.failure for one in rated if one.failure).most_common()),
        "mean_words": _mean_words(rated),
        "intervals": {"level": LEVEL, "clusters": "image", "num_resamples": num_resamples, "seed": seed},
    }


def _group(reference: Figures, answer: Figures, members: NDArray[np.bool_], draws: Draws) -> dict[str, Any]:
    """Return the figures of one group; scores are [n], NaN without a score."""
    scored = members & ~np.isnan(reference)
    first, second = np.where(scored, reference, 0.0), np.where(scored, answer, 0.0)
    count = scored.astype(np.float64)
    relative = np.divide(second, first, out=np.zeros_like(first), where=scored)
    return {
        "data_size": int(scored.sum()),
        "asked": int(members.sum()),
        "gpt4_score": quotient(first, count, draws),
        "pred_score": quotient(second, count, draws),
        "pred_relative_score": quotient(100.0 * relative, count, draws),
        "ratio_of_means": quotient(100.0 * second, first, draws),
    }


def quotient(top: Figures, bottom: Figures, draws: Draws) -> dict[str, float | None]:
    """Return `sum(top) / sum(bottom)` with its interval; None if the denominator is zero.

    Args:
        top: numerators, one per item, [n].
        bottom: denominators, one per item, [n].
        draws: the resamples of the items.
    """
    if bottom.sum() == 0.0:
        return {"value": None, "low": None, "high": None}
    num_clusters = draws.weights.shape[1]
    tops, bottoms = (draws.weights @ np.bincount(draws.cluster_of, part, num_clusters) for part in (top, bottom))
    drawn = tops[bottoms > 0] / bottoms[bottoms > 0]
    low, high = percentile_interval(drawn) if drawn.size else (None, None)
    return {"value": float(top.sum() / bottom.sum()), "low": low, "high": high}


def _mean_words(rated: Sequence[Rated]) -> dict[str, float] | None:
    """Return the mean lengths of the two answers in words; judges tend to prefer the longer answer."""
    counts = [one.num_words for one in rated if one.num_words is not None]
    if not counts:
        return None
    reference, answer = np.array(counts, dtype=np.float64).mean(axis=0)
    return {"reference": float(reference), "answer": float(answer)}


def published_table(summary: Mapping[str, Any]) -> str:
    """Return the table in the layout of v1.5: groups as columns, the four published figures as rows."""
    groups = summary["groups"]
    rows: list[list[Cell]] = []
    for name in PUBLISHED_ROWS:
        cells: list[Cell] = [name]
        for group in groups.values():
            value = group[name] if name == "data_size" else group[name]["value"]
            cells.append("-" if value is None else value)
        rows.append(cells)
    return text_table(["", *groups], rows)


def interval_table(summary: Mapping[str, Any]) -> str:
    """Return a table with one row per group: numbers of questions, mean scores, relative figures."""
    rows: list[list[Cell]] = []
    for name, group in summary["groups"].items():
        cells: list[Cell] = [name, group["data_size"], group["asked"]]
        for key in ("gpt4_score", "pred_score"):
            cells.append(percent_text(group[key]["value"]))
        for key in ("pred_relative_score", "ratio_of_means"):
            cells.append(f"{percent_text(group[key]['value'])} {interval_text(group[key])}")
        rows.append(cells)
    headers = ["group", "scored", "asked", "reference", "answer", "mean of ratios, %", "ratio of means, %"]
    return text_table(headers, rows)


def review_text(name: str, rated: Sequence[Rated], *, minus_one_counts: bool = False) -> str:
    """Return the text of LLaVA's own summary of a review file: mean scores and ratios by category.

    Args:
        name: name of the review in the heading.
        rated: its rows.
        minus_one_counts: count unreadable replies as -1 and -1, as published.
    """
    pairs: dict[str, list[tuple[float, float]]] = {}
    for one in rated:
        scores = (-1.0, -1.0) if minus_one_counts and one.scores is None else one.scores
        if scores is not None:
            for group in ("all", one.type or "no category"):
                pairs.setdefault(group, []).append(scores)
    lines = [f"GPT-4 vs. {name}"]
    for group in sorted(pairs):
        first, second = np.array(pairs[group]).mean(axis=0)
        share = f"{100.0 * second / first:.1f}" if first else "-"
        lines.append(f"{group} {first:.3f} {second:.3f} {share}")
    return "\n".join([*lines, "=" * 33])


Pairs = NDArray[np.float64]
"""Scores of n items by judge A and by judge B, [n, 2]."""


def exact(pairs: Pairs) -> float:
    """Return the share of equal scores."""
    return float(np.mean(pairs[:, 0] == pairs[:, 1]))


def within_one(pairs: Pairs) -> float:
    """Return the share of scores that differ by at most one."""
    return float(np.mean(np.abs(pairs[:, 0] - pairs[:, 1]) <= 1.0))


def mean_difference(pairs: Pairs) -> float:
    """Return the mean of A minus B."""
    return float(np.mean(pairs[:, 0] - pairs[:, 1]))


def pearson_correlation(pairs: Pairs) -> float:
    """Return the linear correlation; NaN if a judge gives the same score to all items."""
    first, second = (pairs - pairs.mean(axis=0)).T
    size = math.sqrt(float(first @ first) * float(second @ second))
    return float(first @ second) / size if size > 1e-12 else math.nan


def spearman_correlation(pairs: Pairs) -> float:
    """Return the rank correlation, with mean ranks for ties; NaN if a judge gives all items one score."""
    return pearson_correlation(np.stack([_ranks(pairs[:, 0]), _ranks(pairs[:, 1])], axis=1))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    means: NDArray[np.float64] = last - (counts - 1) / 2.0
    return means[place]


def weighted_kappa(pairs: Pairs) -> float:
    """Return the quadratic weighted kappa; NaN if both judges give one and the same score to all items."""
    first, second = pairs.T
    by_chance = first.var() + second.var() + (first.mean() - second.mean()) ** 2
    return 1.0 - float(np.mean((first - second) ** 2)) / float(by_chance) if by_chance > 1e-12 else math.nan


MEASURES: dict[str, Callable[[Pairs], float]] = {
    "exact": exact,
    "within one": within_one,
    "Pearson": pearson_correlation,
    "Spearman": spearman_correlation,
    "weighted kappa": weighted_kappa,
    "mean difference": mean_difference,
}
"""Measures of agreement by name."""


def agreement(
    first: Mapping[str, tuple[float, float]],
    second: Mapping[str, tuple[float, float]],
    images: Mapping[str, str],
    *,
    num_resamples: int = 500,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the agreement of two sets of scores.

    Args:
        first: scores of reference and answer by question id, by judge A.
        second: the same by judge B.
        images: the image of each question, by question id.
        num_resamples: number of resamples of the intervals.
        seed: seed of the resampling.

    Returns:
        `num_questions` (with scores by both), and for `reference` and `answer` each measure with its interval; under
        `winner` the share of questions on which both prefer the same answer, or neither prefers one.

    Raises:
        DataError: no question has scores by both.
    """
    ids = [identity for identity in first if identity in second]
    if not ids:
        raise DataError(
            "the two sets of scores have no scored question in common; compare judgments of one answer file"
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
        warnings.simplefilter("error", RuntimeWarning)  # a resample without variance must not be averaged silently
        value = statistic(pairs)
        low, high = confidence_interval(pairs, statistic, clusters=clusters, num_resamples=num_resamples, seed=seed)
    return {name: None if math.isnan(x) else x for name, x in (("value", value), ("low", low), ("high", high))}


def of_judges(first: Sequence[Rated], second: Sequence[Rated], **options: Any) -> dict[str, Any]:
    """Return the agreement of two files of scores of the same questions; see `agreement`.

    Raises:
        DataError: the files hold different questions.
    """
    if {one.id for one in first} != {one.id for one in second}:
        raise DataError("the two files of scores hold different questions; compare judgments of one answer file")
    images = {one.id: image_name_key(one.image) for one in first}
    report = agreement(_scored(first), _scored(second), images, **options)
    report["unscored"] = {
        "first": sum(one.scores is None for one in first),
        "second": sum(one.scores is None for one in second),
    }
    return report


def of_orders(rated: Sequence[Rated], **options: Any) -> dict[str, Any] | None:
    """Return the agreement of a judge with itself in both orders; None if only one was judged.

    `first place` is the gain in score of the first position, the mean over both answers.
    """
    both = {
        one.id: (one.orders["12"], one.orders["21"])
        for one in rated
        if one.orders is not None and one.orders.get("12") is not None and one.orders.get("21") is not None
    }
    if not both:
        return None
    images = {one.id: image_name_key(one.image) for one in rated}
    straight = {identity: pair[0] for identity, pair in both.items() if pair[0] is not None}
    swapped = {identity: pair[1] for identity, pair in both.items() if pair[1] is not None}
    report = agreement(straight, swapped, images, **options)
    # In order 12 the reference is in first position, in order 21 the answer.
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
    """Return an agreement as a text table, one row per measure."""
    rows: list[list[Cell]] = [
        [measure, _cell(report["reference"][measure]), _cell(report["answer"][measure])] for measure in MEASURES
    ]
    rows.append(["same winner", "", _cell(report["winner"]["exact"])])
    if "first place" in report:
        rows.append(["gain of the first place", "", _cell(report["first place"])])
    return text_table(["measure", "reference", "answer"], rows)


def _cell(estimate: Mapping[str, float | None]) -> str:
    value, low, high = ("-" if (x := estimate[key]) is None else f"{x:.3f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
