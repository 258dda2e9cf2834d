"""Judges without an endpoint, usable answers, and verdicts from scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from llava.instruct.preferences.judges import by_majority, by_reference
from llava.instruct.preferences.rows import Answered, answered_of
from llava.instruct.preferences.usable import is_refusal, left_out
from llava.instruct.preferences.verdicts import (
    MARGIN,
    ORDERS_DISAGREE,
    SCORE,
    TIE,
    Thresholds,
    Verdict,
    from_comparison,
    from_scores,
    mean_scores,
)


def answers(*texts: str, **fields: Any) -> Answered:
    return answered_of({"prompt": "Q?", "answers": list(texts), **fields}, "0")


@pytest.mark.parametrize(
    ("one", "scores"),
    [
        (answers("Yes, it is.", "It is normal", reference="yes"), [1.0, 0.0]),
        (answers("no", "a large mass", reference="a mass", answer_type="OPEN"), [0.0, pytest.approx(2 / 3)]),
        (answers("B", "lung", reference="liver", answer_type="CLOSED", choices=["lung", "liver"], answer_label="b"),
         [1.0, 0.0]),
        (answers("a", "b"), "no reference"),
        (answers("a", "b", reference="c", answer_type="essay"), "answer_type"),
    ],
)  # fmt: skip
def test_references(one: Answered, scores: Any) -> None:
    found = by_reference(one)
    assert scores in found if isinstance(scores, str) else found == scores


def test_majority() -> None:
    assert by_majority(answers("Yes.", "yes, it is", "No")) == [0.5, 0.5, 0.0]
    scores = by_majority(answers("left lung", "left lung base", "heart"))
    assert not isinstance(scores, str) and scores[2] == 0.0 and scores[0] == scores[1] == pytest.approx(0.4)
    assert isinstance(by_majority(answers("a", "b")), str)


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("Sorry.", True),
        ("I cannot interpret medical images.", True),
        ("As an AI language model, I have no eyes.", True),
        ("I am unable to view images", True),
        ("I\u2019m sorry", True),
        ("I cannot see a fracture.", False),
        ("No, sorry state of the lung", False),
        ("The view is lateral.", False),
    ],
)
def test_refusals(text: str, refused: bool) -> None:
    assert is_refusal(text) is refused


def test_answers_that_are_left_out() -> None:
    one = answers("a  b", " ", "a b", "cut", "Sorry, no.", "c", finishes=["stop"] * 3 + ["length"] + ["stop"] * 2)
    assert left_out(one) == {1: "empty", 2: "equal", 3: "unfinished", 4: "refusal"}


@pytest.mark.parametrize(
    ("scores", "limits", "found"),
    [
        ([1.0, 3.0], Thresholds(), (1, 0, "")),
        ([2.0, None, 5.0, 1.0], Thresholds(1.0), (2, 3, "")),
        ([2.0, 2.0], Thresholds(), (None, None, TIE)),
        ([2.0, 2.0], Thresholds(1.0, second_wins_ties=True), (1, 0, "")),
        ([2.0, 2.5], Thresholds(1.0), (None, None, MARGIN)),
        ([2.0, 5.0], Thresholds(1.0, 6.0), (None, None, SCORE)),
        ([2.0, 6.0], Thresholds(1.0, 6.0), (1, 0, "")),
        ([2.0, None], Thresholds(), (None, None, "fewer than two answers with a score")),
    ],
)
def test_verdicts_of_scores(scores: Sequence[float | None], limits: Thresholds, found: Any) -> None:
    verdict = from_scores(scores, limits)
    assert (verdict.preferred, verdict.rejected, verdict.failure) == found


def comparison(*scores: tuple[float, float] | None) -> dict[str, Any]:
    orders = {
        name: {"scores": pair and list(pair), "failure": "" if pair else "no scores"}
        for name, pair in zip(("12", "21"), scores, strict=False)
    }
    return {"answers": [0, 2], "orders": orders}


@pytest.mark.parametrize(
    ("one", "limits", "found"),
    [
        (comparison((8, 4), (7, 5)), Thresholds(1.0), Verdict(0, 2, margin=3.0)),
        (comparison((4, 8), (5, 7)), Thresholds(1.0), Verdict(2, 0, margin=3.0)),
        (comparison((8, 4), (5, 7)), Thresholds(1.0), Verdict(failure=ORDERS_DISAGREE)),
        (comparison((8, 4), (6, 6)), Thresholds(1.0), Verdict(failure=ORDERS_DISAGREE)),
        (comparison((6, 6), (6, 6)), Thresholds(1.0), Verdict(failure=TIE)),
        (comparison((8, 4), None), Thresholds(1.0), Verdict(failure="no scores")),
        (comparison((6, 6)), Thresholds(1.0, second_wins_ties=True), Verdict(2, 0)),
    ],
)
def test_both_orders_must_agree(one: dict[str, Any], limits: Thresholds, found: Verdict) -> None:
    assert from_comparison(one, limits) == found


def test_scores_are_means_over_comparisons_and_orders() -> None:
    other = {**comparison((2, 4)), "answers": [1, 2]}
    assert mean_scores(4, [comparison((8, 4), (6, 6)), other]) == [7.0, 2.0, pytest.approx(14 / 3), None]
