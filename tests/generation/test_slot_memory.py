"""Memory for keys and values: the longest answer that fits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from llava.generation.protocol import UNLIMITED, Sampling
from llava.generation.slot_memory import MIN_ANSWER, OPEN_ANSWER, answer_limit, longest_answer


@pytest.mark.parametrize(
    ("wanted", "max_bytes", "expected"),
    [(1000, 10_100, 1000), (1000, 1000, 90), (1000, 999, 89), (1000, 50, MIN_ANSWER), (5, 50, 5)],
)
def test_an_answer_is_as_long_as_fits(wanted: int, max_bytes: int, expected: int) -> None:
    assert longest_answer(lambda num: 100 + 10 * num, wanted, max_bytes) == expected


@pytest.mark.parametrize(
    ("wanted", "max_bytes", "expected"),
    [
        (500, None, 500),
        (UNLIMITED, None, 100_000),
        (500, 10_100, 500),
        (5000, 10_100, 1000),  # all of the memory, which ends it
        (UNLIMITED, 10_100, 1000),  # more than a quarter, as it is short
        (UNLIMITED, 20_000, OPEN_ANSWER),
        (UNLIMITED, 60_000, 1490),  # a quarter
        (UNLIMITED, 10_000_000, 100_000),  # the context
    ],
)
def test_an_answer_without_a_limit_leaves_memory_to_others(wanted: int, max_bytes: int | None, expected: int) -> None:
    request: Any = SimpleNamespace(sampling=Sampling(max_new_tokens=wanted), limit=0)
    found = answer_limit(request, 100_000, lambda requests: 100 + 10 * requests[0].limit, max_bytes)
    assert found == expected
