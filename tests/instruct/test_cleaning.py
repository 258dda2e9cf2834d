"""All cleaning rules, as the original applies them and without its defects."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.errors import ConfigError
from llava.instruct.cleaning import (
    INFIXES,
    MODES,
    PREFIXES,
    REFUSALS,
    RULES,
    Cleaned,
    clean_answer,
    clean_fixed,
    clean_legacy,
)


def test_as_many_phrases_as_published() -> None:
    """65 beginnings, two of which have capitals and never match; 61 parts; 20 refusals."""
    assert (len(set(PREFIXES)), len(set(INFIXES)), len(set(REFUSALS))) == (63, 61, 20)
    assert all(phrase == phrase.lower() for phrase in (*PREFIXES, *REFUSALS))
    for phrases in (PREFIXES, INFIXES):
        assert [len(phrase) for phrase in phrases] == sorted(map(len, phrases), reverse=True)


@pytest.mark.parametrize(
    ("answer", "legacy", "fixed"),
    [
        # R1
        ("I do not have access to the image.", (None, "R1 dropped"), (None, "R1 dropped")),
        ("I'm SORRY, but no.", (None, "R1 dropped"), (None, "R1 dropped")),
        ("I\u2019m\u00a0sorry, but no.", (None, "R1 dropped"), (None, "R1 dropped")),
        (
            "We don\u2019t have direct access to it.",
            ("We don\u2019t have direct access to it.", "R5 kept"),
            (None, "R1 dropped"),
        ),
        ("The size is not specified in the caption.", (None, "R1 dropped"), (None, "R1 dropped")),
        ("Without seeing the scan, it is hard to say.", (None, "R1 dropped"), (None, "R1 dropped")),
        ("The image itself is not available.", (None, "R1 dropped"), (None, "R1 dropped")),
        # R1 matches too much
        (
            "Patients should have access to a nurse.",
            (None, "R1 dropped"),
            ("Patients should have access to a nurse.", "R5 kept"),
        ),
        ("A sorry state of the tooth.", (None, "R1 dropped"), ("A sorry state of the tooth.", "R5 kept")),
        ("I cannot see the tip.", (None, "R1 dropped"), ("I cannot see the tip.", "R5 kept")),
        ("I can't view it.", ("I can't view it.", "R5 kept"), (None, "R1 dropped")),
        (
            "I am unable to see the whole slide.",
            ("I am unable to see the whole slide.", "R5 kept"),
            (None, "R1 dropped"),
        ),
        # R2
        (
            "Based on the description, the MRI shows a rim.",
            ("The mri shows a rim.", "R2 cut"),
            ("The MRI shows a rim.", "R2 cut"),
        ),
        (
            "Yes, according to the figure caption, it is a cyst.",
            ("It is a cyst.", "R2 cut"),
            ("Yes, it is a cyst.", "R2 cut"),
        ),
        (
            "No, the image and the provided context indicate that it is whole.",
            ("It is whole.", "R2 cut"),
            ("No, it is whole.", "R2 cut"),
        ),
        (
            "According on the caption, the caption is long.",
            (None, "R2 dropped"),
            (None, "R2 dropped"),
        ),
        ("According to the description, ", ("", "R2 cut"), (None, "empty dropped")),
        # R3
        (
            "The mass, as mentioned in the caption, is round.",
            ("The mass,, is round.", "R3 cut"),
            ("The mass, is round.", "R3 cut"),
        ),
        (
            "The mass, as mentioned in the figure caption, is round.",
            ("The mass, is round.", "R3 cut"),
            ("The mass, is round.", "R3 cut"),
        ),
        (
            "It is dark. In the context of the CT scan provided, this is air.",
            ("It is dark. this is air.", "R3 cut"),
            ("It is dark. This is air.", "R3 cut"),
        ),
        (
            "However, the caption suggests that it is old; in the description it is new.",
            (None, "R3 dropped"),
            (None, "R3 dropped"),
        ),
        # R4
        ("The caption speaks of it.", (None, "R4 dropped"), (None, "R4 dropped")),
        ("CAPTION: none.", ("CAPTION: none.", "R5 kept"), (None, "R4 dropped")),
        (
            "A fuller description of the lesion needs a biopsy.",
            (None, "R4 dropped"),
            ("A fuller description of the lesion needs a biopsy.", "R5 kept"),
        ),
        # R5
        ("A round dark area.", ("A round dark area.", "R5 kept"), ("A round dark area.", "R5 kept")),
        ("", ("", "R5 kept"), (None, "empty dropped")),
    ],
)
def test_rules(answer: str, legacy: tuple[str | None, str], fixed: tuple[str | None, str]) -> None:
    for mode, expected in (("legacy", legacy), ("fixed", fixed)):
        found = clean_answer(answer, mode)
        assert (found.text, found.outcome) == expected


@pytest.mark.parametrize("phrase", REFUSALS)
def test_every_refusal(phrase: str) -> None:
    assert clean_legacy(f"Well, {phrase.upper()} x.") == Cleaned(None, "R1 dropped", phrase)


@pytest.mark.parametrize("phrase", PREFIXES)
def test_every_beginning(phrase: str) -> None:
    answer = phrase.capitalize() + "the MRI is dark."
    refused = any(refusal in phrase for refusal in REFUSALS)
    assert clean_legacy(answer) == (
        Cleaned(None, "R1 dropped", "cannot see the") if refused else Cleaned("The mri is dark.", "R2 cut", phrase)
    )
    start = next((f"{word}, the" for word in ("Yes", "No") if phrase.startswith(f"{word.lower()}, ")), "The")
    found = clean_fixed(answer)
    assert found.text == (None if refused else f"{start} MRI is dark.")


@pytest.mark.parametrize("phrase", INFIXES)
def test_every_part(phrase: str) -> None:
    joined = "It is dark" + phrase + " here." if phrase[0] in " ," else "So it is: " + phrase + "it is dark."
    found = clean_legacy(joined)
    assert (found.text, found.outcome) == (joined.replace(phrase, ""), "R3 cut")
    fixed = clean_fixed(joined)
    assert fixed.outcome == "R3 cut" and fixed.text is not None
    assert fixed.text.replace(" ", "") == joined.replace(phrase, "").replace(" ", "")
    assert "  " not in fixed.text


def test_unknown_mode() -> None:
    with pytest.raises(ConfigError, match="known: fixed, legacy"):
        clean_answer("x", "both")


FRAGMENTS = st.sampled_from(
    [*PREFIXES, *INFIXES, *REFUSALS, "Yes, ", "the caption ", "MRI ", "A cyst. ", "description of ", " ", "\n", "İ", ""]
)


@settings(deadline=None)
@given(st.lists(FRAGMENTS | st.text(max_size=8), max_size=6).map("".join), st.sampled_from(sorted(MODES)))
def test_any_answer(answer: str, mode: str) -> None:
    found = clean_answer(answer, mode)
    assert found.outcome in RULES
    assert (found.text is None) is found.outcome.endswith("dropped")
    if mode == "legacy" and found.text is not None:
        assert "caption" not in found.text and "description" not in found.text
        assert not any(phrase in answer.lower() for phrase in REFUSALS)
    if mode == "fixed" and found.text is not None:
        assert any(letter.isalnum() for letter in found.text) and found.text == found.text.strip()
        assert "caption" not in found.text.lower().replace("_", " ").split()
        assert len(found.text) <= len(answer) + 1 or "ß" in answer
    if found.outcome == "R5 kept" and mode == "legacy":
        assert found.text == answer
