"""Parsing of a judge's reply: two scores, or the reason why it has none.

`literal` accepts what the published scripts accept: a first line of two numbers separated by one space.
`first_line` is the same after commas have become spaces, as STLLaVA-Med reads its judge. `strict` is lenient
about form (labels, tables, emphasis, "8/10", reasoning before the answer) and strict about content:
exactly two scores that are on the scale and clearly belong to the two answers. Counts ("3 mistakes") are not scores.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

LOWEST, HIGHEST = 1.0, 10.0
"""Scale of a score."""

Reason = Literal["empty", "unfinished reasoning", "no scores", "ambiguous scores", "off the scale"]


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Reason why a reply has no scores; it contains no text of the reply, so messages may show it."""

    reason: Reason


Scores = tuple[float, float]
"""Scores of Assistant 1 and Assistant 2."""

_SCORE = r"(-?\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*10(?:\.0+)?)?"
_BETWEEN = r"(?: ?(?:[,;|&]|and\b|vs\.?) ?| )"
_PAIR = re.compile(
    rf"(?:(?:overall )?(?:scores?|ratings?) ?[:=]? ?)?[\[({{|]? ?{_SCORE}{_BETWEEN}{_SCORE} ?[\])}}|]? ?[.;]?",
    re.IGNORECASE,
)
_WORDS = r"(?:(?:overall|score|rating|gets|is)[^\w.]{1,5}){0,3}"
_AFTER = "points?|pts|and|while|whereas|but|because|since|for|as|with|vs|due|the|this|it|its|assistant|answer"
"""Words that may follow a score; any other word after a number makes it a count ("3 mistakes")."""

_NO_COUNT = rf"(?![\d%]|\.\d|-\d| ?[/%])(?! ?(?!(?:{_AFTER})\b)[^\W\d_])"
_LABELED = re.compile(
    rf"(?:assistant|answer)[ _-]?([12])[^\w.]{{0,20}}{_WORDS}(?<!-)(-?\d+(?:\.\d+)?)"
    rf"(?: ?/ ?10(?:\.0+)?(?![\d/]|\.\d)|(?: out of 10(?:\.0+)?)?{_NO_COUNT})",
    re.IGNORECASE,
)
"""Pattern of one labeled score; its repetitions are bounded, which bounds the time per reply."""

_REASONING = re.compile(r"<(/?)(?:think|thinking|reasoning)>", re.IGNORECASE)
_EMPHASIS = str.maketrans("", "", "*`#\"'")


def parse_literal(reply: str) -> Scores | Unreadable:
    """Return two numbers as the published scripts read them; other replies are unreadable.

    Numbers of any size are accepted, infinite ones are not.
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


def parse_first_line(reply: str) -> Scores | Unreadable:
    """Return two numbers as STLLaVA-Med reads them: `8,9` is valid, `8, 9` has three parts and is not."""
    return parse_literal(reply.split("\n", maxsplit=1)[0].replace(",", " "))


def parse_strict(reply: str) -> Scores | Unreadable:
    """Return the two scores of a reply in any common form."""
    text = without_reasoning(reply)
    if text is None:
        return Unreadable("unfinished reasoning")
    lines = [" ".join(line.translate(_EMPHASIS).split()) for line in text.splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        return Unreadable("empty")
    pair = _PAIR.fullmatch(lines[0])
    if pair is not None:
        return _on_scale(float(pair[1]), float(pair[2]))
    return _labeled("\n".join(lines))


def without_reasoning(reply: str) -> str | None:
    """Return a reply without the text between reasoning tags; None if the reasoning does not end."""
    # A closing tag without an opening one ends reasoning too, since some servers omit the opening tag.
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


def _labeled(text: str) -> Scores | Unreadable:
    """Return the scores of `Assistant 1: 8` and `Assistant 2: 7`, in either order, anywhere in the text."""
    found: dict[str, set[float]] = {"1": set(), "2": set()}
    for label, score in _LABELED.findall(text):
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


PARSERS: dict[str, Callable[[str], Scores | Unreadable]] = {
    "literal": parse_literal,
    "first_line": parse_first_line,
    "strict": parse_strict,
}
"""Parsers by name."""


def parser_of(defects: frozenset[str]) -> str:
    """Return the name of the parser that a set of defects selects."""
    return "literal" if "literal_scores" in defects else "strict"
