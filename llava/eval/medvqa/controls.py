"""Controls of the scores: the questions on a gray image, and the most frequent answers as a baseline.

    score  -  score on the blank image  =  gain from the image

For a model that ignores the image, the interval of the gain contains zero.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from llava.errors import DataError
from llava.eval.intervals import Draws, ItemScores
from llava.eval.medvqa.items import ScoredItem
from llava.eval.medvqa.metrics import strict_scores
from llava.samples import Sample
from llava.scoring.choices import choices_of
from llava.scoring.decisions import is_closed
from llava.scoring.strict import strict_form

Kind = TypeVar("Kind")

BY_TYPE_SCORES = ("closed accuracy", "open recall")
"""Scores that are reported by question type and in the verdicts."""


@dataclass(frozen=True, slots=True)
class Majority:
    """Most frequent closed and open answer of rows; None without a row of that kind."""

    closed: str | None
    open: str | None
    source: str


def majority_answers(samples: Iterable[Sample], *, source: str) -> Majority:
    """Return the most frequent normalized answers; the first seen wins a tie.

    Args:
        samples: rows with answers: of the training set, or of the test set (which gives an upper bound).
        source: name of these rows in the results.
    """
    best = most_common_answers(samples, lambda row: is_closed(row.meta.get("answer_type"), answer_of(row)))
    return Majority(best.get(True), best.get(False), source)


def most_common_answers(samples: Iterable[Sample], kind_of: Callable[[Sample], Kind]) -> dict[Kind, str]:
    """Return the most frequent answer of every kind of row: its strict form, or the letter of an option.

    The first seen wins a tie.
    """
    counts: dict[Kind, Counter[str]] = defaultdict(Counter)
    for sample in samples:
        counts[kind_of(sample)][_counted_answer(sample)] += 1
    return {kind: counter.most_common(1)[0][0] for kind, counter in counts.items()}


def _counted_answer(sample: Sample) -> str:
    answer = answer_of(sample)
    label = choices_of(sample.meta)[1] if is_closed(sample.meta.get("answer_type"), answer) else ""
    return label or strict_form(answer)


def answer_of(sample: Sample) -> str:
    """Return the reference answer of a row: its second turn."""
    return sample.conversation.turns[1].text


def majority_items(items: Sequence[ScoredItem], answers: Majority) -> list[ScoredItem]:
    """Return the items with the majority answers as predictions."""
    said = {True: answers.closed or "", False: answers.open or ""}
    return [replace(item, prediction=said[item.closed], failed=False) for item in items]


def check_same_questions(items: Sequence[ScoredItem], other: Sequence[ScoredItem], *, what: str) -> None:
    """Check that two lists of items are about the same questions.

    Raises:
        DataError: ids or their order differ.
    """
    if [item.question_id for item in items] != [item.question_id for item in other]:
        raise DataError(f"{what} has other questions, or another order of them; join both with one test file")


def by_type(
    items: Sequence[ScoredItem], blank: Sequence[ScoredItem] | None, *, num_resamples: int, seed: int
) -> list[dict[str, Any]]:
    """Return, for every question type and score, the score and its gain from the image.

    Args:
        items: the answered questions; a question of several types counts for each.
        blank: the same questions answered on a gray image; with None, the gain is left out.
        num_resamples: number of resamples of the intervals.
        seed: seed of the resampling.

    Raises:
        DataError: `blank` is about other questions.
    """
    if blank is not None:
        check_same_questions(items, blank, what="the blank-image control")
    rows = []
    for name in sorted({name for item in items for name in item.types}):
        chosen = [index for index, item in enumerate(items) if name in item.types]
        part = [items[index] for index in chosen]
        draws = Draws([item.cluster for item in part], num_resamples=num_resamples, seed=seed)
        scores = strict_scores(part)
        blank_scores = strict_scores([blank[index] for index in chosen]) if blank is not None else {}
        for title in BY_TYPE_SCORES:
            if scores[title].num_items:
                rows.append({"type": name, "score": title, **_compared(draws, scores[title], blank_scores.get(title))})
    return rows


def _compared(draws: Draws, score: ItemScores, blank: ItemScores | None) -> dict[str, Any]:
    """Return the estimates of a score, of its control, and of their difference."""
    row: dict[str, Any] = {"answered": draws.estimate(score).to_json()}
    if blank is not None:
        row["blank"] = draws.estimate(blank).to_json()
        row["from_picture"] = draws.difference(score, blank).to_json()
    return row


def control_verdicts(scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return one sentence per control and score: whether the interval of their difference is above zero.

    Args:
        scores: the set `strict` of a report.
    """
    sentences = []
    for key, control in (("from_picture", "a gray image"), ("above_majority", "the majority answer")):
        for name in BY_TYPE_SCORES:
            estimate = scores[name].get(key)
            if estimate is None or estimate["low"] is None:
                continue
            above = "above" if estimate["low"] > 0 else "NOT above"
            numbers = f"{estimate['value']:+.2f} points [{estimate['low']:.2f}, {estimate['high']:.2f}]"
            sentences.append(f"{name} is {above} {control}: {numbers}")
    return sentences


def compare_sets(
    scores: dict[str, ItemScores],
    draws: Draws,
    *,
    blank: dict[str, ItemScores] | None,
    baseline: dict[str, ItemScores] | None,
) -> dict[str, dict[str, Any]]:
    """Return all scores with their intervals, controls and majority baselines."""
    result = {}
    for name, score in scores.items():
        row = _compared(draws, score, None if blank is None else blank[name])
        if baseline is not None:
            figure = baseline[name].mean()
            row["majority"] = None if math.isnan(figure) else figure
            row["above_majority"] = draws.difference(score, baseline[name]).to_json()
        result[name] = row
    return result
