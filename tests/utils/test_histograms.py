"""Histograms: bars, marks, the tail, and the figures beside them."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from llava.utils.histograms import BASE, LEFT, MAX_BARS, TOP, WIDTH, Histogram, histogram, quantile


def made(counts: dict[int, int], **options: int) -> Histogram:
    """Return the histogram of counts that have one."""
    found = histogram("n", counts, **options)  # type: ignore[arg-type]
    assert found is not None
    return found


def numbers(found: Histogram) -> list[int]:
    """Return the number of values in each bar."""
    return [int(bar.title.split(": ")[1].split()[0].replace(",", "")) for bar in found.bars]


def test_a_bar_for_each_of_few_values() -> None:
    found = made({1: 3, 2: 6, 4: 1})
    assert [bar.title for bar in found.bars] == ["1: 3 rows", "2: 6 rows", "3: 0 rows", "4: 1 rows"]
    assert [text for _, text in found.ticks] == ["1", "2", "3", "4"]
    assert found.tallest == "6 rows" and found.note == "median 2, 90 % up to 2, largest 4"
    assert float(found.bars[1].y) == TOP and float(found.bars[1].height) == BASE - TOP
    assert float(found.bars[0].height) == (BASE - TOP) / 2 and float(found.bars[2].height) == 0
    assert float(found.ticks[0][0]) == pytest.approx(float(found.bars[0].x) + float(found.bars[0].width) / 2, abs=0.2)


def test_one_value_has_no_histogram() -> None:
    assert histogram("n", {7: 3}) is None and histogram("n", {}) is None


def test_a_long_tail_is_one_bar() -> None:
    counts = Counter({value: 100 for value in range(10)} | {5000: 2})
    found = made(counts)
    assert found.bars[-1].title == "10 or more: 2 rows" and found.ticks[-1][1] == "10+"
    assert len(found.bars) == 11 and found.note.endswith("largest 5,000")


@pytest.mark.parametrize("seed", range(20))
def test_every_value_is_in_a_bar(seed: int) -> None:
    rng = random.Random(seed)
    values = [int(rng.lognormvariate(rng.uniform(0, 8), rng.uniform(0.1, 1.5))) for _ in range(500)]
    found = made(Counter(values))
    assert sum(numbers(found)) == 500 and len(found.bars) <= MAX_BARS
    last = found.bars[-1]
    assert float(found.bars[0].x) >= LEFT and float(last.x) + float(last.width) <= WIDTH - LEFT
    assert 2 <= len(found.ticks) <= 12
    assert all(LEFT <= float(place) <= WIDTH - LEFT for place, _ in found.ticks)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9, 0.995, 1.0])
def test_quantiles_are_those_of_numpy(fraction: float) -> None:
    values = np.random.default_rng(0).integers(0, 50, 999)
    assert quantile(Counter(values.tolist()), fraction) == np.quantile(values, fraction, method="inverted_cdf")


def test_a_limit_is_a_line_where_the_bars_reach_it() -> None:
    counts = {value: 1 for value in range(100)}
    found = made(counts, limit=50)
    assert found.limit == f"{WIDTH / 2:.1f}" and found.note.endswith("; dashed: 50")
    assert made(counts, limit=500).limit is None and "dashed" not in made(counts, limit=500).note
