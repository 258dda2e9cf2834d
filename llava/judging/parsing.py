"""A judge's reply to two scores, or to the reason why it holds none.

`literal` reads what the published scripts read: a first line of two numbers with one space between them. `strict` is
lenient about form (labels, tables, marks of emphasis, "8/10", reasoning before the answer) and strict about content:
exactly two scores that are on the scale and clearly belong to the two answers. A number of things is no score.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

LOWEST, HIGHEST = 1.0, 10.0
"""The scale of a score."""


Reason = Literal["empty", "unfinished reasoning", "no scores", "ambiguous scores", "off the scale"]


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Why a reply holds no scores; the reply itself stays with the rows, never in a message."""

    reason: Reason


Scores = tuple[float, float]
"""Of Assistant 1 and Assistant 2, in the order in which they stood."""

_SCORE = r"(-?\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*10(?:\.0+)?)?"
_BETWEEN = r"(?: ?(?:[,;|&]|and\b|vs\.?) ?| )"
_PAIR = re.compile(
    rf"(?:(?:overall )?(?:scores?|ratings?) ?[:=]? ?)?[\[({{|]? ?{_SCORE}{_BETWEEN}{_SCORE} ?[\])}}|]? ?[.;]?",
    re.IGNORECASE,
)
_WORDS = r"(?:(?:overall|score|rating|gets|is)[^\w.]{1,5}){0,3}"
_AFTER = "points?|pts|and|while|whereas|but|because|since|for|as|with|vs|due|the|this|it|its|assistant"
"""Words that may follow a score; behind a count comes the name of what is counted ("3 mistakes")."""

_NO_COUNT = rf"(?![\d%]|\.\d|-\d| ?[/%])(?! ?(?!(?:{_AFTER})\b)[^\W\d_])"
_LABELLED = re.compile(
    rf"assistant[ _-]?([12])[^\w.]{{0,20}}{_WORDS}(?<!-)(-?\d+(?:\.\d+)?)"
    rf"(?: ?/ ?10(?:\.0+)?(?![\d/]|\.\d)|(?: out of 10(?:\.0+)?)?{_NO_COUNT})",
    re.IGNORECASE,
)
"""Repetitions are bounded, so that no reply takes long to read."""

_REASONING = re.compile(r"<(/?)(?:think|thinking|reasoning)>", re.IGNORECASE)
_EMPHASIS = str.maketrans("", "", "*`#\"'")


def parse_literal(reply: str) -> Scores | Unreadable:
    """Read two numbers as the published scripts do; what made those stop is unreadable here.

    Numbers of any size count; infinite ones do not.
    """
    parts = reply.split("\n", maxsplit=1)[0].split(" ")
    if len(parts) != 2:
        return Unreadable("no scores" if reply.strip() else "empty")
    try:
        first, second = float(parts[0]), float(parts[1])
    except ValueError:
        return Unreadable("no scores")
    if not (math.isfinite(first) and math.isfinite(second)):
        return Unreadable("off the scale")
    return first, second


def parse_strict(reply: str) -> Scores | Unreadable:
    """Read two scores from a reply of any usual form."""
    text = _said(reply)
    if text is None:
        return Unreadable("unfinished reasoning")
    lines = [" ".join(line.translate(_EMPHASIS).split()) for line in text.splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        return Unreadable("empty")
    pair = _PAIR.fullmatch(lines[0])
    if pair is not None:
        return _on_scale(float(pair[1]), float(pair[2]))
    return _labelled("\n".join(lines))


def _said(reply: str) -> str | None:
    """Return a reply without what stands between marks of reasoning; None when the reasoning does not end.

    An end mark without a beginning ends reasoning too: some servers keep the first mark to themselves.
    """
    kept, start, inside = "", 0, False
    for mark in _REASONING.finditer(reply):
        if mark[1]:
            kept = kept if inside else ""
            inside = False
        elif not inside:
            kept += reply[start : mark.start()]
            inside = True
        start = mark.end()
    return None if inside else kept + reply[start:]


def _labelled(text: str) -> Scores | Unreadable:
    """Read `Assistant 1: 8` and `Assistant 2: 7`, in either order, wherever they stand."""
    found: dict[str, set[float]] = {"1": set(), "2": set()}
    for label, score in _LABELLED.findall(text):
        found[label].add(float(score))
    if not found["1"] or not found["2"]:
        return Unreadable("no scores")
    if len(found["1"]) > 1 or len(found["2"]) > 1:
        return Unreadable("ambiguous scores")
    return _on_scale(found["1"].pop(), found["2"].pop())


def _on_scale(first: float, second: float) -> Scores | Unreadable:
    if not (LOWEST <= first <= HIGHEST and LOWEST <= second <= HIGHEST):
        return Unreadable("off the scale")
    return first, second


PARSERS: dict[str, Callable[[str], Scores | Unreadable]] = {"literal": parse_literal, "strict": parse_strict}


def parser_of(defects: frozenset[str]) -> str:
    """Return the name of the parser that a set of defects asks for."""
    return "literal" if "literal_scores" in defects else "strict"
