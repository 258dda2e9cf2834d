"""Bootstrap intervals: width compared with theory, clusters, repeatability."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llava.errors import ConfigError
from llava.utils.bootstrap import confidence_interval, iter_resamples


def mean(values: np.ndarray) -> float:
    return float(values.mean())


def test_width_is_that_of_a_mean() -> None:
    values = np.random.default_rng(1).normal(size=400)
    low, high = confidence_interval(values, mean, num_resamples=2000)
    assert low < values.mean() < high
    assert (high - low) == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_clusters_of_equal_values_widen_the_interval_by_the_root_of_their_size() -> None:
    one_each = np.random.default_rng(2).normal(size=100)
    values, clusters = np.repeat(one_each, 9), np.repeat(np.arange(100), 9).tolist()
    free = confidence_interval(values, mean, num_resamples=1000)
    clustered = confidence_interval(values, mean, clusters=clusters, num_resamples=1000)
    assert (clustered[1] - clustered[0]) / (free[1] - free[0]) == pytest.approx(3.0, rel=0.15)


def test_resamples_keep_clusters_whole_and_repeat() -> None:
    clusters = ["a", "b", "a", "c", "b", "a"]
    first = list(iter_resamples(6, clusters=clusters, num_resamples=20, seed=4))
    again = list(iter_resamples(6, clusters=clusters, num_resamples=20, seed=4))
    assert all(np.array_equal(x, y) for x, y in zip(first, again, strict=True))
    for indices in first:
        counts = np.bincount(indices, minlength=6)
        assert counts[0] == counts[2] == counts[5] and counts[1] == counts[4]
        assert counts[0] + counts[1] + counts[3] == 3


def test_rows_of_values_and_empty_input() -> None:
    rows = np.array([[1.0, 0.0], [1.0, 1.0]] * 20)
    assert confidence_interval(rows, lambda part: float(part[:, 0].mean())) == (1.0, 1.0)
    assert all(math.isnan(bound) for bound in confidence_interval([], mean))
    assert all(math.isnan(bound) for bound in confidence_interval([1.0, 2.0], lambda part: float("nan")))


def test_wrong_number_of_clusters() -> None:
    with pytest.raises(ConfigError, match="2 clusters for 3 values"):
        confidence_interval([1, 2, 3], mean, clusters=["a", "b"])
