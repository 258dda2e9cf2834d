"""Replies of the report judge: every accepted form, and the kinds of replies without a rating."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.eval.reports.error_prompt import (
    CATEGORIES,
    EXAMPLES,
    INSIGNIFICANT_HEADER,
    SIGNIFICANT_HEADER,
    judge_messages,
)
from llava.eval.reports.error_replies import Rating, Unread, parse_rating

FIRST, SECOND = [1, 0, 2, 0, 0, 3], [0, 1, 0, 0, 0, 0]
NAMES = list(CATEGORIES.values())
EXPECTED: Rating = {
    "clinically_significant": dict(zip(NAMES, FIRST, strict=True)),
    "clinically_insignificant": dict(zip(NAMES, SECOND, strict=True)),
}


def pairs(counts: list[int], form: str = "({}, {})", outer: str = "[{}]", between: str = ", ") -> str:
    return outer.format(between.join(form.format(*pair) for pair in zip("ABCDEF", counts, strict=True)))


def lines(first: str, second: str, between: str = "\n") -> str:
    return f"{SIGNIFICANT_HEADER}{first}{between}{INSIGNIFICANT_HEADER}{second}"


STANDARD = lines(pairs(FIRST), pairs(SECOND))

READABLE = {
    "square": STANDARD,
    "round": lines(pairs(FIRST, outer="({})"), pairs(SECOND, outer="({})")),
    "no outer brackets": lines(pairs(FIRST, outer="{}"), pairs(SECOND, outer="{}")),
    "no brackets": lines(pairs(FIRST, "{}: {}", "{}"), pairs(SECOND, "{}: {}", "{}")),
    "inner square": lines(pairs(FIRST, "[{}, {}]"), pairs(SECOND, "[{}, {}]")),
    "quoted letters": lines(pairs(FIRST, '("{}", {})'), pairs(SECOND, "('{}', {})")),
    "equals": lines(pairs(FIRST, "{}={}", "{}"), pairs(SECOND, "{} = {}", "{}")),
    "missing newline": lines(pairs(FIRST), pairs(SECOND), " "),
    "no space at all": lines(pairs(FIRST), pairs(SECOND), ""),
    "explanation after": STANDARD + "\nExplanation: A, 7 because (B, 9).",
    "text before": "Here are the counts you asked for.\n" + STANDARD,
    "upper case": STANDARD.upper(),
    "Markdown": STANDARD.replace("Number", "**Number").replace("type:", "type:**"),
    "Markdown list": lines("\n" + pairs(FIRST, "- {}: {}", "{}", "\n"), "\n" + pairs(SECOND, "- {}: {}", "{}", "\n")),
    "Markdown bold letters": lines(
        "\n" + pairs(FIRST, "- **{}**: {}", "{}", "\n"), "\n" + pairs(SECOND, "- **{}**: {}", "{}", "\n")
    ),
    "names beside letters": lines(
        pairs(FIRST, "({}) false positive: {}", "{}"), pairs(SECOND, "({}) false positive: {}", "{}")
    ),
    "other order of severities": f"{INSIGNIFICANT_HEADER}{pairs(SECOND)}\n{SIGNIFICANT_HEADER}{pairs(FIRST)}",
    "reasoning": f"<think>{lines(pairs(SECOND), pairs(FIRST))}</think>\n{STANDARD}",
    "reasoning without opening": f"so A is 4</think>{STANDARD}",
    "code fence": f"```\n{STANDARD}\n```",
    "JSON by letter": json.dumps(
        {
            "clinically_significant": dict(zip("ABCDEF", FIRST, strict=True)),
            "clinically_insignificant": dict(zip("ABCDEF", SECOND, strict=True)),
        }
    ),
    "JSON by name": "```json\n" + json.dumps(EXPECTED, indent=1) + "\n```",
    "JSON with other keys": json.dumps(
        {
            "explanation": "x",
            "Clinically significant errors": dict(zip(["(a)", "(b)", "(c)", "(d)", "(e)", "(f)"], FIRST, strict=True)),
            "Clinically insignificant errors": [list(pair) for pair in zip("ABCDEF", SECOND, strict=True)],
        }
    ),
}


TYPOGRAPHY = {
    "curly quotes": str.maketrans({'"': "\u201c", "'": "\u2019"}),
    "full width": {code: code + 0xFEE0 for code in range(0x21, 0x7F)},
    "no-break spaces": {0x20: 0xA0},
    "long dashes": {0x2D: 0x2014},
}
"""Replacements of the characters of a reply."""


@pytest.mark.parametrize("typography", TYPOGRAPHY)
@pytest.mark.parametrize("name", [name for name in READABLE if "reasoning" not in name])
def test_accepted_forms_in_other_typography(name: str, typography: str) -> None:
    assert parse_rating(READABLE[name].translate(TYPOGRAPHY[typography])) == EXPECTED


def test_zero_width_characters_between_words() -> None:
    assert parse_rating("\ufeff" + STANDARD.replace(" ", "\u200b ")) == EXPECTED


def test_quotes_within_a_json_text_stay() -> None:
    reply = json.dumps({"explanation": "the \u201cnew\u201d effusion", **EXPECTED}, ensure_ascii=False)
    assert parse_rating(reply) == EXPECTED


@pytest.mark.parametrize("name", READABLE)
def test_accepted_forms(name: str) -> None:
    assert parse_rating(READABLE[name]) == EXPECTED


UNREADABLE = [
    ("", "empty"),
    (" \n", "empty"),
    ("I'm sorry, but I can't assist with that request.", "refused"),
    ("I\u2019m sorry, but I can\u2019t assist with that request.", "refused"),
    ("I\u00a0am\u202funable to rate these reports.", "refused"),
    ("\ufeffI can\u02bct do this.", "refused"),
    ("I must decline.", "refused"),
    ("I\u200b'm not able to comply.", "refused"),
    ("The response was filtered \u2014 content\u2011filter.", "filtered"),
    (lines(pairs(FIRST).replace("3", "\u22123"), pairs(SECOND)), "malformed"),
    ("As an AI model I do not read radiographs.", "refused"),
    ("The response was filtered due to the content management policy.", "filtered"),
    (STANDARD[:-30], "cut short"),
    (SIGNIFICANT_HEADER + pairs(FIRST), "cut short"),
    (SIGNIFICANT_HEADER + pairs(FIRST)[:20], "cut short"),
    (SIGNIFICANT_HEADER, "cut short"),
    ("<think>the candidate", "cut short"),
    (READABLE["JSON by name"].removeprefix("```json\n")[:80], "cut short"),
    ("The candidate has two errors.", "malformed"),
    (lines(pairs(FIRST).replace("(F, 3)", "(A, 3)"), pairs(SECOND)), "malformed"),
    (lines(pairs(FIRST).replace("3", "-3"), pairs(SECOND)), "malformed"),
    (lines(pairs(FIRST).replace("3", "9" * 5000), pairs(SECOND)), "malformed"),
    (lines(pairs(FIRST).replace("3", "2.5"), pairs(SECOND)), "malformed"),
    (lines(pairs(FIRST).replace(", (F, 3)", ""), pairs(SECOND)), "malformed"),
    (lines("[1, 0, 2, 0, 0, 3]", "[0, 1, 0, 0, 0, 0]"), "malformed"),
    (json.dumps({"clinically_significant": {"A": 1}, "clinically_insignificant": {"A": 1}}), "malformed"),
]
"""Replies without a rating, and why."""


@pytest.mark.parametrize(("reply", "reason"), UNREADABLE)
def test_replies_without_a_rating(reply: str, reason: str) -> None:
    read = parse_rating(reply)
    assert isinstance(read, Unread)
    assert read.reason == reason


def test_a_readable_severity_is_kept() -> None:
    read = parse_rating(SIGNIFICANT_HEADER + pairs(FIRST))
    assert isinstance(read, Unread)
    assert read.rating == {**EXPECTED, "clinically_insignificant": None}


@given(st.text(max_size=200))
def test_any_text_is_read_or_has_a_reason(text: str) -> None:
    read = parse_rating(text)
    assert isinstance(read, Unread) or all(read.values())


COUNTS = st.lists(st.integers(min_value=0, max_value=99), min_size=6, max_size=6)


@given(COUNTS, COUNTS)
def test_counts_are_read_exactly(first: list[int], second: list[int]) -> None:
    expected = [dict(zip(NAMES, counts, strict=True)) for counts in (first, second)]
    read = parse_rating(lines(pairs(first), pairs(second)))
    assert read == dict(zip(EXPECTED, expected, strict=True))


def test_the_prompt() -> None:
    system, user = judge_messages("THE REFERENCE", "THE CANDIDATE")
    assert (system["role"], user["role"]) == ("system", "user")
    assert user["content"].count("##") == len(EXAMPLES) + 1
    assert user["content"].endswith('"""THE REFERENCE"""\nCandidate Findings:\n"""THE CANDIDATE"""\nErrors:')
    assert user["content"].count(SIGNIFICANT_HEADER) == len(EXAMPLES) + 1


def test_the_examples_are_in_the_form_that_is_asked_for() -> None:
    for example in judge_messages("", "")[1]["content"].split("\n##\n")[1:-1]:
        assert not isinstance(parse_rating(example.split("Errors:")[1]), Unread)
