"""Agreement of judges against scipy, by hand, and under clustered resampling."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from llava.errors import DataError
from llava.eval.judge import summary
from llava.eval.judge.scores import Rated

scores = st.integers(1, 10)


def kappa_from_table(pairs: np.ndarray) -> float:
    """Quadratic weighted kappa from the table of whole scores, as textbooks write it."""
    table = np.zeros((10, 10))
    for first, second in pairs.astype(int):
        table[first - 1, second - 1] += 1
    table /= table.sum()
    weights = (np.arange(10)[:, None] - np.arange(10)[None]) ** 2
    chance = np.outer(table.sum(axis=1), table.sum(axis=0))
    return 1.0 - (weights * table).sum() / (weights * chance).sum()


@given(st.lists(st.tuples(scores, scores), min_size=2, max_size=30))
@settings(max_examples=60, deadline=None)
def test_measures_against_references(values: list[tuple[int, int]]) -> None:
    pairs = np.array(values, dtype=np.float64)
    constant = len(set(pairs[:, 0])) == 1 or len(set(pairs[:, 1])) == 1
    if constant:
        assert math.isnan(summary.pearson_correlation(pairs)) and math.isnan(summary.spearman_correlation(pairs))
    else:
        assert summary.pearson_correlation(pairs) == pytest.approx(stats.pearsonr(*pairs.T).statistic, abs=1e-9)
        assert summary.spearman_correlation(pairs) == pytest.approx(stats.spearmanr(*pairs.T).statistic, abs=1e-9)
    if len(set(pairs.flatten())) > 1:
        assert summary.weighted_kappa(pairs) == pytest.approx(kappa_from_table(pairs), abs=1e-9)
    else:
        assert math.isnan(summary.weighted_kappa(pairs))


def one(number: int, first: tuple[float, float] | None, second: tuple[float, float] | None = None) -> Rated:
    orders = None if second is None else {"12": first, "21": second}
    return Rated(str(number), "conversation", ("mri",), f"{number // 2}", first, orders=orders)


def test_two_judges_by_hand() -> None:
    first = [one(0, (8, 7)), one(1, (6, 6)), one(2, (9, 3)), one(3, (5, 8)), one(4, None)]
    second = [one(4, (1, 1)), one(0, (8, 8)), one(1, (7, 5)), one(2, (9, 4)), one(3, (2, 8))]
    report = summary.of_judges(first, second, num_resamples=100)
    assert report["num_questions"] == 4 and report["unscored"] == {"first": 1, "second": 0}
    # references: 8-8, 6-7, 9-9, 5-2; answers: 7-8, 6-5, 3-4, 8-8
    assert report["reference"]["exact"]["value"] == 0.5
    assert report["reference"]["within one"]["value"] == 0.75
    assert report["reference"]["mean difference"]["value"] == pytest.approx((0 - 1 + 0 + 3) / 4)
    assert report["answer"]["exact"]["value"] == 0.25 and report["answer"]["within one"]["value"] == 1.0
    # winners: reference-neither, neither-reference, reference-reference, answer-answer
    assert report["winner"]["exact"]["value"] == 0.5
    for measure in summary.MEASURES:
        estimate = report["reference"][measure]
        assert estimate["low"] <= estimate["value"] + 1e-9 and estimate["value"] <= estimate["high"] + 1e-9
    table = summary.agreement_table(report)
    assert "weighted kappa" in table and "gain" not in table


def test_questions_of_one_image_are_drawn_together() -> None:
    """Both questions of image 0 agree, both of image 1 do not: a resample holds 0, 1 or 2 of the images."""
    first = [one(number, (5, 5)) for number in range(4)]
    second = [one(number, (5, 5) if number < 2 else (9, 9)) for number in range(4)]
    estimate = summary.of_judges(first, second, num_resamples=200)["answer"]["exact"]
    assert estimate == {"value": 0.5, "low": 0.0, "high": 1.0}
    assert summary.of_judges(first, second, num_resamples=0)["answer"]["exact"]["low"] is None


def test_constant_judges_have_no_correlation_and_no_nan_in_json() -> None:
    same = [one(number, (5, 5)) for number in range(4)]
    report = summary.of_judges(same, same)
    assert report["answer"]["Pearson"] == {"value": None, "low": None, "high": None}
    assert report["answer"]["exact"]["value"] == 1.0
    json.dumps(report, allow_nan=False)
    assert "- [-, -]" in summary.agreement_table(report)


def test_two_orders_of_one_judge() -> None:
    """The answer in first position gets two points more."""
    rows = [one(number, (8.0, 4.0), (6.0, 6.0)) for number in range(3)] + [one(9, (8.0, 4.0))]
    report = summary.of_orders(rows, num_resamples=20)
    assert report is not None and report["num_questions"] == 3
    assert report["first place"] == {"value": 2.0, "low": 2.0, "high": 2.0}
    assert report["winner"]["exact"]["value"] == 0.0 and report["reference"]["mean difference"]["value"] == 2.0
    assert "gain of the first place" in summary.agreement_table(report)
    assert summary.of_orders([one(0, (8.0, 4.0))]) is None


def test_other_questions_are_refused() -> None:
    with pytest.raises(DataError, match="different questions"):
        summary.of_judges([one(0, (1, 1))], [one(1, (1, 1))])
    with pytest.raises(DataError, match="in common"):
        summary.of_judges([one(0, None)], [one(0, (1, 1))])
