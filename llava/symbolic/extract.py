"""Extraction of the value of a node from a text, with negation and uncertainty inside of clauses.

text --normalize--> matches of the rules --cues of the clause--> candidates --highest priority--> value
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from llava.errors import DataError
from llava.symbolic.document import read_document
from llava.symbolic.patterns import MAX_TEXT
from llava.symbolic.problems import Problems
from llava.symbolic.structure import CONFLICT, NO_MATCH, ExtractRule, RuleNode
from llava.utils.typography import APOSTROPHES

CUES = Path(__file__).parent / "cues"

CUE_KEYS = ("clause_words", "before", "after", "harmless", "hedges")

WORDS_BEFORE = 8
"""Maximum number of words between a cue and the match after it."""

WORDS_AFTER = 3
"""Maximum number of words between a match and the cue after it."""

NEGATED_PRIORITY = 0.5
"""Amount subtracted from a negated match's priority, so that a positive mention of another value wins."""

WORD = re.compile(r"\S*\w\S*")

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Extraction:
    """Value read from a text: a node's value, `__no_match__` or `__conflict__`, and its uncertainty."""

    value: str
    hedged: bool = False


@dataclass(frozen=True, slots=True)
class Cues:
    """Compiled cue lists of one language.

    Attributes:
        boundary: ends of clauses.
        before: cues that negate what comes after them.
        after: cues that negate what comes before them.
        harmless: phrases that contain a cue and negate nothing.
        hedges: phrases that make a match uncertain.
        any: all cues, to pass over the texts that have none.
        parts: texts of which every text with a cue contains one; looking for them is faster still.
    """

    boundary: re.Pattern[str]
    before: re.Pattern[str]
    after: re.Pattern[str]
    harmless: re.Pattern[str]
    hedges: re.Pattern[str]
    any: re.Pattern[str]
    parts: tuple[str, ...]


def languages() -> list[str]:
    """Return the languages with cue lists."""
    return sorted(path.stem for path in CUES.glob("*.yaml"))


@cache
def read_cues(language: str) -> Cues:
    """Return the cue lists of a language.

    Raises:
        DataError: the language has no cue lists.
    """
    if language not in languages():
        raise DataError(f"language {language!r} has no cue lists; known: {', '.join(languages())}")
    problems = Problems()
    keys = problems.map(read_document(CUES / f"{language}.yaml"), "cues", CUE_KEYS)
    lists = {key: problems.texts(keys[key], key) for key in CUE_KEYS}
    words = {key: _any_word(texts) for key, texts in lists.items()}
    boundary = re.compile(rf"[;,:]|[.!?](?=\s|$)|{words['clause_words'].pattern}")
    cues = {*lists["before"], *lists["after"], *lists["hedges"]}
    parts = tuple(cue for cue in sorted(cues) if not any(other in cue for other in cues - {cue}))
    every = _any_word(tuple(cues))
    return Cues(boundary, words["before"], words["after"], words["harmless"], words["hedges"], every, parts)


def _any_word(texts: tuple[str, ...]) -> re.Pattern[str]:
    """Return a pattern of whole words or phrases, the longest first."""
    longest = sorted(texts, key=len, reverse=True)
    return re.compile(r"(?<![\w'-])(?:" + "|".join(re.escape(text) for text in longest) + r")(?![\w'-])")


def normalize(text: str) -> str:
    """Return a text as lower-case NFKC, cut to `MAX_TEXT`, single-spaced, without invisible characters."""
    text = text[:MAX_TEXT]
    if not text.isascii() or not text.isprintable():
        text = unicodedata.normalize("NFKC", text).translate(APOSTROPHES)
        text = "".join(_visible(character) for character in text)
    return " ".join(text.lower().split())[:MAX_TEXT]


def _visible(character: str) -> str:
    category = unicodedata.category(character)
    return "" if category == "Cf" else " " if category in ("Cc", "Cs") else character


@lru_cache(maxsize=8192)
def extract(node: RuleNode, text: str) -> Extraction:
    """Return the value that a text gives to a node.

    Example::

        extract(rules.node("diagnosis"), "AML, not MM.")  # Extraction("AML", hedged=False)
    """
    text = normalize(text)
    found = _tagged(node, text) if node.answer_format == "tag" else _candidates(node, text)
    if not found:
        return Extraction(NO_MATCH)
    top = max(priority for priority, _, _ in found)
    winning = [(value, hedged) for priority, value, hedged in found if priority == top]
    hedged = all(hedged for _, hedged in winning)
    if len({value for value, _ in winning}) > 1:
        return Extraction(CONFLICT, hedged)
    if hedged and node.uncertain != "value":
        return Extraction((node.abstain if node.uncertain == "abstain" else None) or NO_MATCH, hedged)
    return Extraction(winning[0][0], hedged)


def fired(node: RuleNode, text: str) -> list[tuple[str, str]]:
    """Return value and pattern of every match that is not negated, whatever its priority."""
    text = normalize(text)
    context = _Context(text, read_cues(node.language))
    return [
        (rule.value, pattern.pattern)
        for rule in node.extract
        if not rule.only_negated
        for pattern in rule.patterns
        for match in pattern.finditer(text)
        if not (rule.negatable and context.is_negated(match.span()))
    ]


def _tagged(node: RuleNode, text: str) -> list[tuple[float, str, bool]]:
    """Return the values between tags, `<node>value</node>`."""
    name = re.escape(node.id.lower())
    written = re.findall(rf"<{name}>([^<]*)</{name}>", text)
    values = {normalize(value): value for value in node.values}
    return [(0.0, values[word.strip()], False) for word in written if word.strip() in values]


def _candidates(node: RuleNode, text: str) -> list[tuple[float, str, bool]]:
    """Return priority, value and uncertainty of every match that counts."""
    found: list[tuple[float, str, bool]] = []
    context: _Context | None = None
    for rule, needed in node.finders:
        # Looking for plain texts first is several times faster than the patterns, few of which match.
        if needed and not any(part in text for part in needed):
            continue
        for pattern in rule.patterns:
            for match in pattern.finditer(text):
                if context is None:
                    context = _Context(text, read_cues(node.language))
                value, priority = _value(rule, context, match.span())
                if value is not None:
                    found.append((priority, value, context.is_hedged(match.span())))
    return found


def _value(rule: ExtractRule, context: _Context, span: Span) -> tuple[str | None, float]:
    """Return the value of a match, None if it does not count, and its priority."""
    negated = rule.negatable and context.is_negated(span)
    if rule.only_negated:
        return (rule.value if negated else None), rule.priority - NEGATED_PRIORITY
    if negated:
        return rule.negated, rule.priority - NEGATED_PRIORITY
    return rule.value, rule.priority


class _Context:
    """Clauses and cues of one text."""

    def __init__(self, text: str, cues: Cues) -> None:
        self.text = text
        self.before: list[Span] = []
        self.after: list[Span] = []
        self.hedges: list[Span] = []
        if not any(part in text for part in cues.parts) or cues.any.search(text) is None:
            return
        ends = [match.span() for match in cues.boundary.finditer(text)]
        self.clause_starts = [0, *(end for _, end in ends)]
        self.clause_ends = [*(start for start, _ in ends), len(text)]
        harmless = [match.span() for match in cues.harmless.finditer(text)]
        self.before = [match.span() for match in cues.before.finditer(text) if not _inside(match.span(), harmless)]
        self.after = [match.span() for match in cues.after.finditer(text) if not _inside(match.span(), harmless)]
        self.hedges = [match.span() for match in cues.hedges.finditer(text)]

    def clause(self, span: Span) -> Span:
        """Return the clause of a match, from where it begins to where its last part ends."""
        begin = self.clause_starts[bisect_right(self.clause_starts, span[0]) - 1]
        return begin, self.clause_ends[bisect_left(self.clause_ends, span[1])]

    def is_negated(self, span: Span) -> bool:
        """Return whether a cue before or after a match, in its clause, negates it."""
        if not self.before and not self.after:
            return False
        begin, end = self.clause(span)
        cue = last_before(self.before, span[0])
        if cue and begin <= cue[0] and self.num_words(cue[1], span[0]) <= WORDS_BEFORE:
            return True
        cue = first_after(self.after, span[1])
        return cue is not None and cue[1] <= end and self.num_words(span[1], cue[0]) <= WORDS_AFTER

    def is_hedged(self, span: Span) -> bool:
        """Return whether the clause of a match has a hedge outside of the match."""
        if not self.hedges:
            return False
        begin, end = self.clause(span)
        before, after = last_before(self.hedges, span[0]), first_after(self.hedges, span[1])
        return bool(before and begin <= before[0]) or bool(after and after[1] <= end)

    def num_words(self, begin: int, end: int) -> int:
        """Return the number of words between two positions."""
        return len(WORD.findall(self.text[begin:end]))


def last_before(spans: list[Span], position: int) -> Span | None:
    """Return the last of sorted spans that ends at or before a position."""
    index = bisect_right(spans, position, key=lambda span: span[1])
    return spans[index - 1] if index else None


def first_after(spans: list[Span], position: int) -> Span | None:
    """Return the first of sorted spans that begins at or after a position."""
    index = bisect_left(spans, (position, 0))
    return spans[index] if index < len(spans) else None


def _inside(span: Span, others: list[Span]) -> bool:
    index = bisect_right(others, span[0], key=lambda other: other[0])
    return index > 0 and span[1] <= others[index - 1][1]
