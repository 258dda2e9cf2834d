"""Strict words: articles, marks, Unicode forms, and what must not vanish."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.scoring.strict import same_words, strict_form, strict_pair, strict_words

EQUAL = [
    ("a mass", "mass"),
    ("A mass", "Mass."),
    ("The left lung", "left lung"),
    ("Yes. A mass", "yes mass"),
    ("THERE IS A MASS", "there is a mass"),
    ("hepatitis A", "Hepatitis a."),
    ("type A dissection", "type a dissection"),
    ("A", "(a)"),
    ("X-ray", "x ray"),
    ("L2\u20133", "L2-3"),
    ("MR \u2014 FLAIR", "MR-FLAIR"),
    ("1,000 cells", "1000 cells"),
    ("\uff13\uff0e\uff15\u3000cm", "3.5 cm"),
    ("\u201clung\u201d", "lung"),
    ("\u2018lung\u2019", "'lung'"),
    ("patient\u2019s left", "patient's left"),
    ("\u53f3\u80ba\u3002", "\u53f3\u80ba"),
    ("\u80dd\u810f\uff0c\u813e\u810f", "\u80dd\u810f\u3001\u813e\u810f"),
    ("\uff23\uff34\uff01", "CT"),
    ("soft\u00adtissue\u200b", "softtissue"),
    ("two nodules", "2 nodules"),
    ("don\u2019t know", "dont know"),
    ("**Left**", "left"),
    ("pre- and post-contrast", "pre and post contrast"),
    ("\u2212", "-"),
    ("< 5 mm", "<5 mm"),
    ("\uff1c5", "<5"),
    (">=5", "\u2265 5"),
    ("\u22121.5", "-1.5"),
    ("+1", "1"),
    ("3 \u2013 5 cm", "3-5 cm"),
    ("- 1 lesion", "1 lesion"),
    ("T2 -> T1", "T2, T1"),
]

DIFFERENT = [
    ("hepatitis A", "hepatitis"),
    ("Vitamin A, low", "vitamin low"),
    ("group A streptococcus", "group streptococcus"),
    ("A or B", "or B"),
    ("A", "?"),
    ("A", "the"),
    ("+", "-"),
    ("+", ""),
    ("-", "?"),
    ("the", ""),
    ("HER2+", "HER2-"),
    ("10\u2075", "105"),
    ("L2,3", "L23"),
    ("<5", ">5"),
    ("<5", "5"),
    ("> 2 cm", "2 cm"),
    ("<=5", "<5"),
    ("\u22655", "\u22645"),
    ("-1", "1"),
    ("-0.5", "+0.5"),
    ("p<0.05", "p>0.05"),
    ("< -2.5", "< 2.5"),
]


@pytest.mark.parametrize(("first", "second"), EQUAL)
def test_two_spellings_of_one_answer_are_equal(first: str, second: str) -> None:
    assert same_words(*strict_pair(first, second)) and same_words(*strict_pair(second, first))


@pytest.mark.parametrize(("first", "second"), DIFFERENT)
def test_answers_that_differ_in_meaning_are_not_equal(first: str, second: str) -> None:
    assert not same_words(*strict_pair(first, second)) and not same_words(*strict_pair(second, first))


@pytest.mark.parametrize(
    "elsewhere", [" - plain", " / other", ", 1,000 cells", "; axial", " (left) view", " - 2,500 - x"]
)
@pytest.mark.parametrize("term", ["C5-C6", "T1-weighted", "perivascular/interstitial", "non-contrast", "PA(upright)"])
def test_a_mark_elsewhere_leaves_the_words_of_a_term(term: str, elsewhere: str) -> None:
    wanted = strict_words(term)
    assert len(wanted) > 1 and strict_words(term + elsewhere)[: len(wanted)] == wanted


def test_no_text_equals_an_empty_answer() -> None:
    assert not same_words(*strict_pair("", "")) and strict_words(" \n") == []


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
@given(text=st.text(alphabet="abeo AT\u00e9\u00f6\u0153\u5de6\u80ba\uff21\uff0c1.,-'", max_size=20))
def test_unicode_forms_of_a_text_are_equal(form: str, text: str) -> None:
    assert strict_words(unicodedata.normalize(form, text)) == strict_words(text)


@given(st.text(max_size=40))
def test_words_hold_no_space_and_their_form_is_stable(text: str) -> None:
    words = strict_words(text)
    assert all(word and not any(map(str.isspace, word)) for word in words)
    assert bool(words) or not any(character.isalnum() for character in text)


@given(st.lists(st.sampled_from(["hepatitis", "A", "mass", "X-ray", "lung", "(left)", "3.5"]), max_size=5))
def test_the_form_of_an_answer_equals_the_answer(parts: list[str]) -> None:
    text = " ".join(["lesion", *parts])
    assert same_words(*strict_pair(text, strict_form(text)))
