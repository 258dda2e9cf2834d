"""Figures from sums over reports: resamples, clusters, and strata."""

from __future__ import annotations

import numpy as np
import pytest

from llava.eval.reports.figures import Resampler, draw_counts, f1_of_counts, mean_figure, sacrebleu_interval


def test_resamples_are_those_of_the_published_generator() -> None:
    drawn = np.random.RandomState(3).randint(0, 5, (500, 5))
    expected = np.array([np.bincount(row, minlength=5) for row in drawn])
    assert (draw_counts(5, kind="percentile") == expected).all()


def test_resamples_are_drawn_one_after_another() -> None:
    np.random.seed(3)  # the published scorer draws from numpy's global generator
    first = np.bincount(np.random.choice(np.arange(7), size=7, replace=True), minlength=7)
    assert (draw_counts(7, kind="percentile")[0] == first).all()


def test_interval_of_a_mean() -> None:
    values = np.random.default_rng(0).random(40)
    drawn = np.random.RandomState(3).randint(0, 40, (500, 40))
    expected = np.percentile(values[drawn].mean(axis=1), [2.5, 50, 97.5])
    facts = Resampler(range(40)).estimate(mean_figure("x", values))
    assert [facts["ci_l"], facts["median"], facts["ci_h"]] == pytest.approx(list(expected), abs=1e-12)


def test_copies_of_patients_leave_the_clustered_interval_and_halve_the_other() -> None:
    values = np.random.default_rng(1).random(200)
    once = Resampler(range(200)).estimate(mean_figure("x", values))
    copied = Resampler([name for name in range(200) for _ in range(4)]).estimate(mean_figure("x", np.repeat(values, 4)))
    assert copied["clustered"] == pytest.approx(once["clustered"], abs=1e-9)
    ratio = (copied["ci_h"] - copied["ci_l"]) / (once["ci_h"] - once["ci_l"])
    # The width of 500 resamples has a standard error of about 5 %; a bound of 20 % on a ratio of two is 2.8 of them.
    assert ratio == pytest.approx(0.5, rel=0.2)


def test_value_of_chosen_reports() -> None:
    figure = mean_figure("x", [0.0, 1.0, 0.5])
    assert figure.value(np.array([False, True, True])) == 0.75


def test_a_single_report() -> None:
    facts = Resampler(["p"]).estimate(mean_figure("x", [0.25]))
    assert {facts[key] for key in ("value", "median", "ci_l", "ci_h")} == {0.25}
    assert facts["clustered"] == {"ci_l": 0.25, "ci_h": 0.25, "num_clusters": 1}


def test_sacrebleu_interval() -> None:
    drawn = np.arange(500.0)
    assert sacrebleu_interval(drawn) == (249.5 - 0.5 * (487 - 12), 249.5 + 0.5 * (487 - 12))


def test_f1_without_any_count_is_zero() -> None:
    zero, one = np.array([0.0, 1.0]), np.array([0.0, 0.0])
    assert list(f1_of_counts(zero, one, one)) == [0.0, 1.0]
