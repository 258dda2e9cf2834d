"""Parsing of replies to scores: accepted and refused forms, and robustness to any reply."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.judging.parsing import Unreadable, parse_literal, parse_strict, parser_of


@pytest.mark.parametrize(
    "reply",
    [
        "8 7\nBoth answers...",
        "8, 7",
        "\n\n  8   7  \nwhy",
        "**8 7**",
        "Scores: 8 7.",
        "8/10 7/10",
        "8 out of 10, 7 out of 10",
        "[8, 7]",
        "(8, 7)",
        "| 8 | 7 |",
        "8 and 7",
        "8.0 7",
        "8; 7",
        "Assistant 1: 8\nAssistant 2: 7",
        "Assistant 2: 7/10. Assistant 1: 8/10.",
        "**Assistant 1** - Score: 8, **Assistant 2** - Score: 7",
        '{"assistant_1": 8, "assistant_2": 7}',
        "<think>Assistant 1: 3? Assistant 2: 4?</think>\n8 7\nwhy",
        "3 4 perhaps</think>8 7",
        "<think>1 2</think><THINK>3 4</THINK>8 7",
        "Assistant 1: 8, Assistant 2: 7. So Assistant 1 gets 8.",
        "Assistant 1 score: 8, Assistant 2 score: 7",
        "Assistant 1: 8/10\nAssistant 2: 7/10",
        "Assistant 1: 8 / 10 Clear.\nAssistant 2: 7 / 10 Vague.",
        "Assistant 1: 8.\nAssistant 2: 7.",
        "Assistant 1: 8 out of 10 because it is right. Assistant 2: 7 out of 10.",
        "Assistant 1: 8 points and Assistant 2: 7 points",
        "Assistant 1 gets 8 while Assistant 2 gets 7",
        "Assistant 1: 8 for its detail, Assistant 2: 7 (shorter)",
        "Assistant 1: 8\nThis one is right.\nAssistant 2: 7\nThis one is not.",
        "| Assistant 1 | 8 |\n| Assistant 2 | 7 |",
        "Assistant 1: 3 mistakes. Assistant 2: 5 errors.\nAssistant 1: 8\nAssistant 2: 7",
    ],
)
def test_strict_reads_every_common_form(reply: str) -> None:
    assert parse_strict(reply) == (8.0, 7.0)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("", "empty"),
        (" \n** ", "empty"),
        ("<think>8 7", "unfinished reasoning"),
        ("I cannot help with that.", "no scores"),
        ("8", "no scores"),
        ("8/10", "no scores"),
        ("8 7 6", "no scores"),
        ("The first answer is better, 8 to 7.", "no scores"),
        ("Assistant 1: 8", "no scores"),
        ("Assistant 1: 8, Assistant 2: 7. Assistant 1: 9", "ambiguous scores"),
        ("0 5", "off the scale"),
        ("11 5", "off the scale"),
        ("-8 7", "off the scale"),
        ("Assistant 1: -8, Assistant 2: 7", "off the scale"),
        ("85 90", "off the scale"),
        ("nan nan", "no scores"),
        ("Assistant 1: 3 mistakes were made. Assistant 2: 5 mistakes were made.", "no scores"),
        ("Assistant 1: 1 paragraph\nAssistant 2: 2 errors", "no scores"),
        ("Assistant 1: 3 major errors, Assistant 2: 5 of them", "no scores"),
        ("Assistant 1: 10 out of 10 findings, Assistant 2: 8 out of 10 findings", "no scores"),
        ("Assistant 1 is 2 times as long. Assistant 2 is 3 lines.", "no scores"),
        ("Assistant 1: 8 %, Assistant 2: 7%", "no scores"),
        ("Assistant 1: 2-3 words, Assistant 2: 7 words", "no scores"),
        ("Assistant 1: 8 /20, Assistant 2: 7 /20", "no scores"),
    ],
)
def test_strict_says_why_not(reply: str, reason: str) -> None:
    assert parse_strict(reply) == Unreadable(reason)


def test_literal_reads_what_the_published_scripts_read() -> None:
    assert parse_literal("8 7\nwhy") == (8.0, 7.0)
    assert parse_literal("85 0.5") == (85.0, 0.5)
    assert parse_literal("8 0") == (8.0, 0.0)
    for reply in ("8, 7", "8  7", " 8 7", "8 7 ", "\n8 7", "Scores: 8 7", "8/10 7/10"):
        assert parse_literal(reply) == Unreadable("no scores"), reply
    assert parse_literal("inf 7") == Unreadable("off the scale")
    assert parse_literal("") == Unreadable("empty")


@given(st.text(alphabet="0123456789 ./-,:\n*|[](){}<>think assistant_Scoredn", max_size=80) | st.text(max_size=80))
def test_any_reply_is_two_scores_or_a_reason(reply: str) -> None:
    strict, literal = parse_strict(reply), parse_literal(reply)
    assert isinstance(strict, Unreadable) or all(1.0 <= score <= 10.0 for score in strict)
    assert isinstance(literal, Unreadable) or len(literal) == 2


@given(st.integers(1, 10), st.integers(1, 10), st.sampled_from(["{} {}", "{}, {}", "Assistant 1: {}\nAssistant 2: {}"]))
def test_written_scores_are_read_back(first: int, second: int, form: str) -> None:
    assert parse_strict(form.format(first, second) + "\n\nAssistant 1 was clear.") == (first, second)


def test_long_replies_are_read_in_time() -> None:
    start = time.monotonic()
    for piece in ("assistant 1 - ", "- ", " ", "<think>", "8 ", "assistant 1: score "):
        parse_strict(piece * 5000)
    assert time.monotonic() - start < 60  # a tenth of a second, unless an expression takes the square of the length


def test_parser_by_defects() -> None:
    assert parser_of(frozenset()) == "strict" and parser_of(frozenset({"literal_scores"})) == "literal"
