"""Bytes of written data files."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.errors import DataError
from llava.utils.jsonl import file_text

VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), st.lists)


@given(st.lists(st.dictionaries(st.text(max_size=3), VALUES, max_size=3), max_size=5), st.booleans())
def test_rows_come_back(rows: list[Any], lines: bool) -> None:
    text = b"".join(file_text(rows, lines=lines)).decode()
    found = [json.loads(line) for line in text.split("\n") if line] if lines else json.loads(text)
    assert found == rows and (not text or text.endswith("\n"))


@pytest.mark.parametrize("lines", [True, False])
def test_what_no_file_can_hold_is_named(lines: bool) -> None:
    with pytest.raises(DataError, match="row 1 holds half of a surrogate pair"):
        list(file_text([{"id": "é"}, {"id": "\ud800"}], lines=lines))
