"""Strict scores: decisions by whole words, equality, means over types."""

from __future__ import annotations

import math

import pytest

from llava.eval.medvqa.items import ScoredItem
from llava.eval.medvqa.metrics import closed_hit, is_unparsable, strict_scores


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


def test_no_items() -> None:
    assert math.isnan(strict_scores([])["closed accuracy"].mean())
