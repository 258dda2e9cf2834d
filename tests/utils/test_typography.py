"""Plain quotes, hyphens, spaces and half-width forms."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.utils.typography import INVISIBLE, plain_typography


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I\u2019m \u201csorry\u201d", 'I\'m "sorry"'),
        ("a\u00a0b\u202fc\u2003d", "a b c d"),
        ("1\u20132, \u22123, x\u2011ray", "1-2, -3, x-ray"),
        ("\uff08\uff21\uff0c\uff11\uff09", "(A,1)"),
        ("10\u00b2 \u00e9 \u8cea", "10\u00b2 \u00e9 \u8cea"),
    ],
)
def test_values(text: str, expected: str) -> None:
    assert plain_typography(text) == expected


@given(st.text())
def test_every_character_keeps_its_place(text: str) -> None:
    plain = plain_typography(text)
    assert len(plain) == len(text) and plain_typography(plain) == plain
    assert all(one == other for one, other in zip(text, plain, strict=True) if one.isascii())


def test_invisible_characters() -> None:
    assert "\ufeffa\u200bb\u00adc".translate(INVISIBLE) == "abc"
