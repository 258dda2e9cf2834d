"""Words of a text by position."""

from __future__ import annotations

import re
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from llava.symbolic.words import WordIndex

WORD = re.compile(r"\S*\w\S*")
"""What a word is, and how words were counted before: in quadratic time where runs have no letter."""


@settings(max_examples=300, deadline=None)
@given(text=st.text("ab1_ -.,'\u00e9\u4e2d ", max_size=24), data=st.data())
def test_counts_are_those_of_the_definition(text: str, data: st.DataObject) -> None:
    begin, end = (data.draw(st.integers(0, len(text))) for _ in range(2))
    assert WordIndex(text).count(begin, end) == len(WORD.findall(text[begin:end]))


def test_counting_takes_no_longer_in_long_runs() -> None:
    text = "no " + "-" * 100_000 + " aml" * 25_000
    started = time.process_time()
    index = WordIndex(text)
    assert index.count(2, len(text)) == 25_000
    assert [index.count(0, place) for place in range(100_100, 200_000, 4)][-1] == 24_999
    assert time.process_time() - started < 20  # 0.1 s, and centuries with the expression
