"""Parser of report sections: each rule, and generated reports."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.data.converters.radiology_reports import KINDS, parse_report
from llava.data.report_rows import report_question
from tests.support.releases import report


def test_a_report_in_the_usual_layout() -> None:
    parsed = parse_report(report("Lungs are\n clear.", "Normal.", "Cough,\n fever"))
    assert (parsed.findings, parsed.impression, parsed.reason) == ("Lungs are clear.", "Normal.", "Cough, fever")
    assert [section.kind for section in parsed.sections] == [
        "examination",
        "indication",
        "comparison",
        "findings",
        "impression",
    ]


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("Findings: Clear.\nImpression: Normal.", "findings", "Clear."),  # known names in any case
        ("FINDINGS AND IMPRESSION: Clear.", "findings", "Clear."),
        ("CONCLUSION:\nNormal.", "impression", "Normal."),
        ("FINDINGS: Clear.\nRECOMMENDATION(S): Repeat.", "findings", "Clear."),
        ("FINDINGS: Clear.\nPREPARATION: none", "findings", "Clear."),  # an unknown name in capitals ends a section
        (
            "FINDINGS: Clear.\nPlease note: old.",
            "findings",
            "Clear. Please note: old.",
        ),  # one in small letters does not
        ("FINDINGS:\nLUNGS: Clear.\nHEART: Large.\nIMPRESSION: x", "findings", "LUNGS: Clear. HEART: Large."),
        ("FINDINGS: a\nIMPRESSION: b\nFINDINGS: c", "findings", "a c"),
        ("FINDINGS: at 10:30 the tube: in place", "findings", "at 10:30 the tube: in place"),
        ("FINDINGS:\r\nClear.\r\n\r\nIMPRESSION:\r\nx", "findings", "Clear."),
        ("WET READ: Effusion.\n   FINAL REPORT\nFINDINGS: None seen.", "findings", "None seen."),
        (
            "FINDINGS: Clear.\n FINAL REPORT\n",
            "findings",
            "Clear.",
        ),  # no text after the mark: the text before it counts
        ("Lungs are clear.", "findings", ""),  # nothing is guessed
        ("Lungs are clear.", "preamble", "Lungs are clear."),
        ("", "findings", ""),
    ],
)
def test_rules(text: str, kind: str, expected: str) -> None:
    assert parse_report(text).text(kind) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("HISTORY: a\nINDICATION: b\nREASON FOR EXAM: c", "c"),
        ("HISTORY: a\nINDICATION: b", "b"),
        ("CLINICAL HISTORY: a", "a"),
        ("REASON FOR EXAMINATION:\n\nINDICATION: b", "b"),  # an empty section says nothing
        ("FINDINGS: x", ""),
    ],
)
def test_the_most_direct_reason_counts(text: str, expected: str) -> None:
    assert parse_report(text).reason == expected


QUESTION = "Provide a description of the findings in the radiology image"


def test_the_question_with_a_reason_is_that_of_llava_rad() -> None:
    expected = f"{QUESTION} given the following indication: cough // r/o"
    assert report_question("findings", "cough\n// r/o") == expected


@pytest.mark.parametrize("reason", [None, "", " \n"])
def test_the_question_without_a_reason_is_that_of_llava_rad(reason: str | None) -> None:
    assert report_question("findings", reason) == f"{QUESTION}."


NAMES = [name.upper() for names in KINDS.values() for name in names]
BODY = st.text(
    st.characters(codec="utf-8", exclude_characters=":\r", exclude_categories=("Cs", "Cc", "Zl", "Zp")), max_size=60
)


@given(st.lists(st.tuples(st.sampled_from(NAMES), BODY), min_size=1, max_size=8))
def test_generated_reports_come_back(sections: list[tuple[str, str]]) -> None:
    parsed = parse_report("".join(f" {name}:  {body}\n\n" for name, body in sections))
    found = [(section.name, section.text) for section in parsed.sections]
    assert found == [(name, " ".join(body.split())) for name, body in sections]


@given(st.text(st.sampled_from("FINDINGS:\n IMPRESION afr\r.FINAL REPORT\n")))
def test_any_text_is_read_and_no_word_is_lost(text: str) -> None:
    parsed = parse_report(text)
    words = " ".join(f"{section.name} {section.text}" for section in parsed.sections).replace(":", " ").split()
    rest = text.replace("\r", "\n").replace(":", " ").split()
    assert any(rest[start : start + len(words)] == words for start in range(len(rest) + 1))
    assert "FINAL REPORT" in text or words == rest
