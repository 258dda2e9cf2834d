"""Verdicts: the preferred and the rejected answer to a question, from the scores of a judge.

scores of all answers, or comparisons of two in both orders --Thresholds--> preferred, rejected | failure
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TIE = "tie"
MARGIN = "margin below the minimum"
SCORE = "score below the minimum"
ORDERS_DISAGREE = "the orders disagree"


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Thresholds of a preference.

    Attributes:
        min_margin: smallest difference of the two scores; equal scores are never a preference.
        min_score: smallest score of the preferred answer, or None.
        second_wins_ties: equal scores prefer the second answer, whatever the margin.
    """

    min_margin: float = 0.0
    min_score: float | None = None
    second_wins_ties: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """Places of the preferred and the rejected answer, or the reason for no preference."""

    preferred: int | None = None
    rejected: int | None = None
    failure: str = ""
    margin: float = 0.0

    def fields(self) -> dict[str, Any]:
        """Return the fields of a row."""
        return {"preferred": self.preferred, "rejected": self.rejected, "failure": self.failure}


def compare(places: tuple[int, int], scores: tuple[float, float], limits: Thresholds) -> Verdict:
    """Return the verdict about two answers with these scores."""
    margin = abs(scores[0] - scores[1])
    if margin == 0 and not limits.second_wins_ties:
        return Verdict(failure=TIE)
    first_wins = scores[0] > scores[1]
    if 0 < margin < limits.min_margin:
        return Verdict(failure=MARGIN)
    if limits.min_score is not None and max(scores) < limits.min_score:
        return Verdict(failure=SCORE)
    return Verdict(*(places if first_wins else places[::-1]), margin=margin)


def from_scores(scores: Sequence[float | None], limits: Thresholds) -> Verdict:
    """Return the verdict on scored answers: the best against the worst; answers scored None are left out."""
    known = [place for place, score in enumerate(scores) if score is not None]
    if len(known) < 2:
        return Verdict(failure="fewer than two answers with a score")
    values = {place: score for place, score in enumerate(scores) if score is not None}
    best = max(known, key=lambda place: values[place])
    worst = min((place for place in known if place != best), key=lambda place: values[place])
    first, second = sorted((best, worst))
    return compare((first, second), (values[first], values[second]), limits)


def from_comparison(comparison: Mapping[str, Any], limits: Thresholds) -> Verdict:
    """Return the verdict of a comparison: `answers` (two places) and `orders` (scores of both, by order).

    All orders must have scores and prefer the same answer; the scores that count are their means.
    """
    first, second = comparison["answers"]
    orders = list(comparison["orders"].values())
    if missing := [order["failure"] for order in orders if order["scores"] is None]:
        return Verdict(failure=missing[0])
    one, other = ([order["scores"][side] for order in orders] for side in (0, 1))
    signs = {(a > b) - (a < b) or (-1 if limits.second_wins_ties else 0) for a, b in zip(one, other, strict=True)}
    if len(signs) > 1:
        return Verdict(failure=ORDERS_DISAGREE)
    return compare((first, second), (sum(one) / len(one), sum(other) / len(other)), limits)


def from_comparisons(comparisons: Sequence[Mapping[str, Any]], limits: Thresholds) -> Verdict:
    """Return the verdict with the largest margin, or the reason why the first comparison has none."""
    verdicts = [from_comparison(one, limits) for one in comparisons]
    decided = [one for one in verdicts if not one.failure]
    return max(decided, key=lambda one: one.margin) if decided else verdicts[0]


def verdict_of(judgment: Mapping[str, Any], limits: Thresholds) -> Verdict:
    """Return the verdict of a stored judgment under other thresholds."""
    if judgment.get("comparisons"):
        return from_comparisons(judgment["comparisons"], limits)
    if judgment.get("scores"):
        return from_scores(judgment["scores"], limits)
    return Verdict(failure=str(judgment["failure"]))


def mean_scores(num_answers: int, comparisons: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Return the mean score of each answer over comparisons and orders; None without a score."""
    found: list[list[float]] = [[] for _ in range(num_answers)]
    for one in comparisons:
        for order in one["orders"].values():
            for place, score in zip(one["answers"], order["scores"] or (), strict=False):
                found[place].append(score)
    return [sum(values) / len(values) if values else None for values in found]
