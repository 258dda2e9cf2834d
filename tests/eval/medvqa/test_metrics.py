"""Published formulas against hand-computed values, and each defect with its switch."""

from __future__ import annotations

import math

import pytest

from llava.compat import parse_compat
from llava.errors import ConfigError
from llava.eval.medvqa.items import ScoredItem
from llava.eval.medvqa.metrics import PUBLISHED, legacy_scores

CANDIDATES = ["left lung", "right lung", "brain", "3"]


def item(prediction: str, reference: str, *, closed: bool = False) -> ScoredItem:
    return ScoredItem("1", "?", reference, prediction, closed, image="a.png")


def scores(prediction: str, reference: str, *, closed: bool = False, fix: str | None = None, **options) -> dict:
    defects = PUBLISHED - ({fix} if fix else set())
    columns = legacy_scores([item(prediction, reference, closed=closed)], defects=defects, **options)
    return {name: values[0] for name, values in columns.items()}


@pytest.mark.parametrize(
    ("prediction", "reference", "exact", "f1", "precision", "recall"),
    [
        ("the left lung is affected", "left lung", 0.5, 2 / 3, 0.5, 1.0),
        ("lung lung", "lung", 0.5, 1.0, 1.0, 1.0),
        ("left left lung", "left lung nodule", 2 / 3, 6 / 7, 1.0, 0.75),
        ("two nodules", "2 nodule", 0.5, 0.5, 0.5, 0.5),
        ("", "lung", 0.0, 0.0, 0.0, 0.0),
        ("lung", "", 0.0, 0.0, 0.0, 0.0),
    ],
)
def test_open_vectors(
    *, prediction: str, reference: str, exact: float, f1: float, precision: float, recall: float
) -> None:
    found = scores(prediction, reference, program="run_eval")
    assert found["exact match score"] == pytest.approx(exact)
    assert found["f1 score"] == pytest.approx(f1)
    assert found["precision"] == pytest.approx(precision)
    assert found["recall"] == pytest.approx(recall)
    assert math.isnan(found["yes/no accuracy"])


@pytest.mark.parametrize(
    ("prediction", "reference", "hit"),
    [("lung", "left lung", 1.0), ("lung", "right lung", 0.0), ("three", "3", 1.0), ("kidney", "left lung", 1.0)],
)
def test_candidate_matching(prediction: str, reference: str, hit: float) -> None:
    assert scores(prediction, reference, program="run_eval", candidates=CANDIDATES)["open accuracy"] == hit


def test_no_candidates_no_row() -> None:
    assert "open accuracy" not in scores("lung", "lung", program="run_eval")
    assert scores("lung", "lung", program="run_eval", candidates=[])["open accuracy"] == 0.0


@pytest.mark.parametrize(
    ("defect", "program", "closed", "prediction", "reference", "name", "broken", "fixed"),
    [
        ("precision_as_exact_match", "run_eval", False, "left lung", "lung", "exact match score", 0.5, 0.0),
        ("prediction_counts", "run_eval", False, "lung lung", "lung", "precision", 1.0, 0.5),
        ("first_candidate", "run_eval", False, "kidney", "left lung", "open accuracy", 1.0, 0.0),
        ("substring_open", "run_eval_batch", False, "left lung", "lung", "open accuracy", 1.0, 0.0),
        ("substring_closed", "run_eval_batch", True, "normal", "no", "yes/no accuracy", 1.0, 0.0),
        ("substring_closed", "run_eval", True, "normal", "no", "yes/no accuracy", 1.0, 0.0),
        ("yes_no_only", "run_eval", True, "left", "left", "yes/no accuracy", 0.0, 1.0),
        ("period_limit", "run_eval_batch", True, ". " * 32 + "n.o", "no", "yes/no accuracy", 0.0, 1.0),
    ],
)
def test_each_defect_has_a_switch(
    *, defect: str, program: str, closed: bool, prediction: str, reference: str, name: str, broken: float, fixed: float
) -> None:
    options = {"program": program, "closed": closed, "candidates": CANDIDATES}
    assert scores(prediction, reference, **options)[name] == pytest.approx(broken, abs=1e-6)
    assert scores(prediction, reference, fix=defect, **options)[name] == pytest.approx(fixed, abs=1e-6)


def test_bleu_switches() -> None:
    pytest.importorskip("nltk", reason="BLEU needs nltk")
    same = scores("left lower lung", "left lower lung", program="run_eval")
    assert same["bleu_score_3"] == pytest.approx(1.0)
    part = {"prediction": "left lung base", "reference": "left lung apex", "program": "run_eval"}
    assert scores(**part)["bleu_score_2"] == pytest.approx(0.5)
    assert scores(**part, fix="single_order_bleu")["bleu_score_2"] == pytest.approx(math.sqrt(2 / 3 * 0.5))
    assert scores(**part)["bleu_score"] < 1e-70
    assert scores(**part, fix="unsmoothed_bleu")["bleu_score"] > 0.05


def test_dropped_misses_only_on_request() -> None:
    items = [item("yes", "yes", closed=True), item("no", "yes", closed=True)]
    kept = legacy_scores(items, program="run_eval")["yes/no accuracy"]
    dropped = legacy_scores(items, program="run_eval", defects=PUBLISHED | {"dropped_closed_misses"})
    assert kept == [1.0, 0.0]
    assert dropped["yes/no accuracy"][0] == 1.0 and math.isnan(dropped["yes/no accuracy"][1])


def test_unknown_defects_are_named() -> None:
    with pytest.raises(ConfigError, match="substring_closed"):
        parse_compat("substring_close", "scores")
    with pytest.raises(ConfigError, match="nonsense"):
        legacy_scores([], program="run_eval", defects=frozenset({"nonsense"}))
    assert parse_compat("all", "scores") == PUBLISHED | {"dropped_closed_misses"}


def test_recall_of_closed_questions_is_of_the_batch_program() -> None:
    assert scores("the left side", "left", closed=True, program="run_eval_batch")["recall_closed"] == 1.0
    assert "recall_closed" not in scores("left", "left", closed=True, program="run_eval")
