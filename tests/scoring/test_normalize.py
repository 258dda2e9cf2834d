"""Published normalization against its test vectors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.scoring.normalize import CONTRACTIONS, normalize_answer

VECTORS = {
    "Yes.": "yes",
    "the left lung": "left lung",
    "X-ray": "x ray",
    "x - ray": "x ray",
    "T2-weighted": "t2 weighted",
    "1,000 cells": "1000 cells",
    "3.5 cm": "3.5 cm",
    "e.g. liver/spleen": "eg liver spleen",
    "two nodules": "2 nodules",
    "None": "0",
    "a,b": "b",
    "right(upper) lobe": "right upper lobe",
    "dont know": "don't know",
    "C5-C6": "c5 c6",
    "0.5-1.0 mm": "0.5 1.0 mm",
    "5.": "5",
    "": "",
    "the an a": "",
    "patient's: yes": "patient's: yes",
}


@pytest.mark.parametrize(("text", "expected"), VECTORS.items())
def test_vectors(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


def test_only_the_first_32_periods_are_deleted_unless_switched() -> None:
    text = "x. " * 40
    assert normalize_answer(text).count(".") == 8
    assert "." not in normalize_answer(text, all_periods=True)


def test_contractions_differ_by_apostrophes_only() -> None:
    assert len(CONTRACTIONS) > 100
    for written, right in CONTRACTIONS.items():
        assert written != right
        assert written.replace("'", "") == right.replace("'", "")
    assert not {"its", "id", "ill", "well", "were", "shell", "hell", "shed", "wed"} & set(CONTRACTIONS)


@given(st.text(alphabet="abc 12.,-?!()'ntTheAn", max_size=40))
def test_no_mark_and_no_outer_space_is_left(text: str) -> None:
    result = normalize_answer(text)
    assert result == " ".join(result.split())
    assert not set(result) & set("-?!(),")
