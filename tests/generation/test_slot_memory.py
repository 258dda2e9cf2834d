"""Memory for keys and values: the longest answer that fits."""

from __future__ import annotations

import pytest

from llava.generation.slot_memory import MIN_ANSWER, longest_answer


@pytest.mark.parametrize(
    ("wanted", "max_bytes", "expected"),
    [(1000, 10_100, 1000), (1000, 1000, 90), (1000, 999, 89), (1000, 50, MIN_ANSWER), (5, 50, 5)],
)
def test_an_answer_is_as_long_as_fits(wanted: int, max_bytes: int, expected: int) -> None:
    assert longest_answer(lambda num: 100 + 10 * num, wanted, max_bytes) == expected
