"""Figures, their intervals and paired differences."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from llava.errors import ConfigError
from llava.eval.intervals import Draws, ItemScores
from llava.utils.bootstrap import confidence_interval


def test_mean_leaves_out_what_is_not_asked() -> None:
    score = ItemScores.of([1.0, math.nan, 0.0, 1.0])
    assert score.mean() == pytest.approx(200 / 3)
    assert score.num_items == 3
    assert math.isnan(ItemScores.of([math.nan]).mean())
    assert math.isnan(ItemScores.of([], []).mean())


def test_intervals_are_those_of_the_plain_bootstrap() -> None:
    generator = np.random.default_rng(5)
    values = np.where(generator.random(90) < 0.2, math.nan, generator.random(90))
    clusters = [int(name) for name in generator.integers(0, 25, size=90)]
    groups = [("a", "b")[: 1 + int(generator.integers(2))] if name % 3 else ("c",) for name in clusters]
    draws = Draws(clusters, num_resamples=60, seed=3)

    def plain(part: np.ndarray) -> float:
        return 100 * float(np.nanmean(part))

    expected = confidence_interval(values, plain, clusters=clusters, num_resamples=60, seed=3)
    estimate = draws.estimate(ItemScores.of(values))
    assert (estimate.low, estimate.high) == pytest.approx(expected)

    def by_group(part: np.ndarray) -> float:
        chosen = part.astype(int)
        means = [np.nanmean([values[i] for i in chosen if name in groups[i]]) for name in "abc"]
        return 100 * float(np.nanmean(means))

    expected = confidence_interval(np.arange(90), by_group, clusters=clusters, num_resamples=60, seed=3)
    estimate = draws.estimate(ItemScores.of(values, groups))
    assert (estimate.low, estimate.high) == pytest.approx(expected)


def test_difference_is_paired() -> None:
    generator = np.random.default_rng(0)
    base = generator.integers(0, 2, size=300).astype(float)
    better = base.copy()
    better[np.flatnonzero(base == 0)[:6]] = 1.0
    draws = Draws(list(range(300)), num_resamples=400)
    estimate = draws.difference(ItemScores.of(better), ItemScores.of(base))
    assert estimate.value == pytest.approx(2.0)
    assert 0.0 < estimate.low < 2.0 < estimate.high < 5.0
    alone = draws.estimate(ItemScores.of(better))
    assert alone.high - alone.low > 2 * (estimate.high - estimate.low)


def test_no_figure_is_null_in_json() -> None:
    estimate = Draws(["a", "b"]).estimate(ItemScores.of([math.nan, math.nan]))
    assert estimate.to_json() == {"value": None, "low": None, "high": None, "num_items": 0}


@pytest.mark.parametrize("groups", [None, [("x",), ("y",), ("y",)]])
def test_resamples_without_items_are_left_out_silently(groups: list[tuple[str, ...]] | None) -> None:
    draws = Draws(["a", "b", "b"], num_resamples=60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate = draws.estimate(ItemScores.of([1.0, math.nan, math.nan], groups))
    assert (estimate.value, estimate.low, estimate.high, estimate.num_items) == (100.0, 100.0, 100.0, 1)


def test_sizes_are_checked() -> None:
    with pytest.raises(ConfigError, match="each of 2 items, got 3"):
        Draws(["a", "b"]).estimate(ItemScores.of([1.0, 0.0, 1.0]))
