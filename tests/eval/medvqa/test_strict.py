"""Strict scores: decisions by whole words, options, equality, failed answers, means over types."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from llava.eval.medvqa.controls import majority_answers
from llava.eval.medvqa.items import ScoredItem, make_item
from llava.eval.medvqa.metrics import is_unparsable, strict_scores
from llava.samples import from_row
from llava.scoring.metrics import closed_hit
from tests.support.eval_fakes import row


def make(prediction: str, reference: str, *, closed: bool, types: tuple[str, ...] = ()) -> ScoredItem:
    return ScoredItem("1", "?", reference, prediction, closed, types, "a.png")


def test_closed_hits() -> None:
    assert closed_hit(make("yes and no", "yes", closed=True)) == 1.0
    assert closed_hit(make("yes and no", "no", closed=True)) == 0.0
    assert closed_hit(make("Left.", "left", closed=True)) == 1.0
    assert closed_hit(make("left lung", "left", closed=True)) == 0.0
    assert is_unparsable(make("perhaps", "Yes.", closed=True))
    assert not is_unparsable(make("perhaps", "left", closed=True))
    assert not is_unparsable(make("perhaps", "yes", closed=False))


def test_means_over_types_weight_types_equally() -> None:
    items = [make("yes", "yes", closed=True, types=("PRES",))] * 3 + [make("yes", "no", closed=True, types=("POS",))]
    items += [make("yes", "no", closed=True, types=("POS", "PRES"))]
    scores = strict_scores(items)
    assert scores["closed accuracy"].mean() == pytest.approx(60.0)
    assert scores["closed accuracy, mean over types"].mean() == pytest.approx((75.0 + 0.0) / 2)
    assert math.isnan(scores["open recall"].mean())


def test_open_scores_count_words_of_both_sides() -> None:
    scores = strict_scores(
        [make("lung lung", "the lung", closed=False), make("right lung", "Right lung.", closed=False)]
    )
    assert scores["open exact match"].mean() == pytest.approx(50.0)
    assert scores["open recall"].mean() == pytest.approx(100.0)
    assert scores["open f1"].mean() == pytest.approx(100 * (2 / 3 + 1) / 2)
    assert "open recall, mean over types" not in scores


def test_failed_answers_are_never_right() -> None:
    items = [
        replace(make(text, text, closed=closed), failed=True) for text in ("A", "yes", "+") for closed in (False, True)
    ]
    scores = strict_scores(items)
    assert all(scores[name].mean() == 0.0 for name in scores)


@pytest.mark.parametrize(
    ("reference", "prediction", "exact", "recall", "f1"),
    [
        ("hepatitis A", "hepatitis", 0.0, 50.0, 200 / 3),
        ("type A dissection", "type dissection", 0.0, 200 / 3, 80.0),
        ("blood group A", "blood group A", 100.0, 100.0, 100.0),
        ("A", "A.", 100.0, 100.0, 100.0),
        ("A", "", 0.0, 0.0, 0.0),
        ("C5-C6", "C5-C6 - cervical", 0.0, 100.0, 80.0),
        ("non-contrast", "non-contrast CT, 1,000 HU", 0.0, 100.0, 100 * 4 / 7),
        ("Me\u0301nie\u0300re", "M\u00e9ni\u00e8re", 100.0, 100.0, 100.0),
    ],
)
def test_open_scores(reference: str, prediction: str, exact: float, recall: float, f1: float) -> None:
    scores = strict_scores([make(prediction, reference, closed=False)])
    assert scores["open exact match"].mean() == exact
    assert scores["open recall"].mean() == pytest.approx(recall)
    assert scores["open f1"].mean() == pytest.approx(f1)


def test_multiple_choice_rows_are_scored_by_option() -> None:
    meta = {"answer_type": "CLOSED", "choices": ["bone", "fat", "air"], "answer_label": "C"}
    sample = from_row({**row("q", "a.png", "Which?\nA: bone\nB: fat\nC: air", "C: air"), **meta})
    said = {"C": 1.0, "air": 1.0, "C. Air": 1.0, "(c) air": 1.0, "B": 0.0, "C or B": 0.0, "B: air": 0.0, "": 0.0}
    assert {text: closed_hit(make_item(sample, {"text": text})) for text in said} == said
    assert majority_answers([sample], source="train").closed == "c"


def test_no_items() -> None:
    assert math.isnan(strict_scores([])["closed accuracy"].mean())
