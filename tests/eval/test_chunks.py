"""Chunks are consecutive, complete, and empty rather than missing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.errors import ConfigError
from llava.utils.cli import chunk_of


@given(st.integers(0, 50), st.integers(1, 12))
def test_joined_chunks_are_the_items(num_items: int, num_chunks: int) -> None:
    items = list(range(num_items))
    parts = [chunk_of(items, num_chunks, index) for index in range(num_chunks)]
    assert [item for part in parts for item in part] == items
    assert all(len(part) <= -(-num_items // num_chunks) for part in parts)


def test_nine_items_in_eight_chunks() -> None:
    assert [len(chunk_of(range(9), 8, index)) for index in range(8)] == [2, 2, 2, 2, 1, 0, 0, 0]


@pytest.mark.parametrize(("num_chunks", "index"), [(0, 0), (2, 2), (2, -1)])
def test_impossible_chunks(num_chunks: int, index: int) -> None:
    with pytest.raises(ConfigError, match="chunk"):
        chunk_of([1, 2], num_chunks, index)
