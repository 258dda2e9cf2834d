"""Options by letter, by text or by both; what names two options; closed answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.scoring.choices import LETTERS, choices_of, is_closed_hit, named_options

ORGANS = ("heart", "left lung", "lung", "Both A and C", "type B dissection")


@pytest.mark.parametrize(
    ("answer", "places"),
    [
        ("C", {2}),
        ("(c)", {2}),
        ("C.", {2}),
        ("lung", {2}),
        ("The lung.", {2}),
        ("C) Lung", {2}),
        ("lung (C)", {2}),
        ("**C**", {2}),
        ("The answer is C. The image shows it.", {2}),
        ("Option C\nbecause of the density", {2}),
        ("It is the left lung", {1}),
        ("A", {0}),
        ("A because it beats", {0}),
        ("D: both A and C", {3}),
        ("Both A and C", {3}),
        ("type B dissection", {4}),
        ("\uff23\uff1alung", {2}),
        ("C.Lung", {2}),
        ("C\uff0elung", {2}),
        ("$C$", {2}),
        ("\\boxed{C}", {2}),
        ("The answer is $\\boxed{\\text{C. Lung}}$", {2}),
        ("\\textbf{lung}", {2}),
        ("C.heart", {0, 2}),
        ("\\boxed{F}", set()),
        ("A or C", {0, 2}),
        ("A, C", {0, 2}),
        ("C: heart", {0, 2}),
        ("heart and lung", {0, 2}),
        ("A: heart C: lung", {0, 2}),
        ("not C", set()),
        ("It isn't the lung", set()),
        ("F", set()),
        ("?", set()),
        ("", set()),
        ("kidney", set()),
        ("type C fracture", set()),
    ],
)
def test_options_that_an_answer_names(answer: str, places: set[int]) -> None:
    assert named_options(answer, ORGANS) == places


@given(st.lists(st.sampled_from(["liver", "2 cm", "T2-weighted", "no lesion", "hepatitis A"]), min_size=2, unique=True))
def test_every_option_is_named_by_letter_text_and_both(choices: list[str]) -> None:
    for place, choice in enumerate(choices):
        letter = LETTERS[place].upper()
        for answer in (letter, choice, f"{letter}: {choice}", f"{letter}. {choice}", f"({letter.lower()}) {choice}."):
            assert named_options(answer, choices) == {place}, answer
        other = choices[place - 1]
        assert named_options(f"{letter}: {other}", choices) != {place}


def test_options_with_one_text_are_one_option() -> None:
    assert named_options("lung", ("lung", "heart", "Lung.")) == named_options("C", ("lung", "heart", "Lung.")) == {0}


def test_letters_as_texts_in_another_order() -> None:
    assert named_options("A", ("B", "A")) == {0} and named_options("A: B", ("B", "A")) == {0}


@pytest.mark.parametrize("reference", ["A", "+", "-", "the", "?!", "None"])
@pytest.mark.parametrize("answer", ["", " ", ".", "an", "*"])
def test_an_answer_without_content_is_never_right(reference: str, answer: str) -> None:
    assert not is_closed_hit(reference, answer)
    assert is_closed_hit(reference, reference)


@pytest.mark.parametrize("answer", ["Yes, a mass.", "\uff39\uff25\uff33", "\u201cYes\u201d", "answer: yes"])
def test_yes_in_every_form_decides(answer: str) -> None:
    assert is_closed_hit("Yes.", answer) and not is_closed_hit("no", answer)


@pytest.mark.parametrize(
    "meta",
    [{}, {"choices": ["x", "y"]}, {"choices": "xy", "answer_label": "A"}, {"choices": ["x", 1], "answer_label": "A"}]
    + [{"choices": ["x", "y"], "answer_label": label} for label in ("C", "AB", "", None, 1)],
)
def test_fields_of_another_form_are_not_choices(meta: dict[str, object]) -> None:
    assert choices_of(meta) == ((), "")


def test_fields_of_a_multiple_choice_row() -> None:
    assert choices_of({"choices": ["x", "y"], "answer_label": "B"}) == (("x", "y"), "b")
