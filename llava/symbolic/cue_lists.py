"""Cue lists of a language: negation, uncertainty, ends of clauses, and lists."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from llava.errors import DataError
from llava.symbolic.document import read_document
from llava.symbolic.patterns import compile_pattern, required_texts
from llava.symbolic.problems import Problems

CUES = Path(__file__).parent / "cues"

LISTS = ("clause_words", "before", "after", "also_before", "harmless", "hedges")
WORDS = ("be", "links", "alternatives", "additions", "articles", "subjects", "verbs", "statements")
CUE_KEYS = (*LISTS, "doubts", *WORDS)


@dataclass(frozen=True, slots=True)
class Cues:
    """Compiled cue lists of one language.

    Attributes:
        boundary: ends of clauses.
        before: cues that negate what comes after them.
        after: cues that negate what comes before them.
        harmless: phrases that contain a cue and negate nothing.
        hedges: phrases that make a match uncertain.
        words: further lists by key of the file.
        any: all cues, to pass over the texts that have none.
        parts: texts of which every text with a cue contains one; looking for them is faster still.
    """

    boundary: re.Pattern[str]
    before: re.Pattern[str]
    after: re.Pattern[str]
    harmless: re.Pattern[str]
    hedges: re.Pattern[str]
    words: dict[str, re.Pattern[str]]
    any: re.Pattern[str]
    parts: tuple[str, ...]


def languages() -> list[str]:
    """Return the languages with cue lists."""
    return sorted(path.stem for path in CUES.glob("*.yaml"))


@cache
def read_cues(language: str) -> Cues:
    """Return the cue lists of a language.

    Raises:
        DataError: the language has no cue lists, or a pattern of `doubts` is refused.
    """
    if language not in languages():
        raise DataError(f"language {language!r} has no cue lists; known: {', '.join(languages())}")
    problems = Problems()
    keys = problems.map(read_document(CUES / f"{language}.yaml"), "cues", CUE_KEYS)
    lists = {key: problems.texts(keys[key], key) for key in CUE_KEYS}
    doubts = tuple(compile_pattern(pattern).pattern for pattern in lists["doubts"])
    harmless, hedges = (_any_word(lists[key], doubts) for key in ("harmless", "hedges"))
    boundary = re.compile(rf"[;,:]|[.!?](?=\s|$)|{_any_word(lists['clause_words']).pattern}")
    cues = {*lists["before"], *lists["after"], *lists["hedges"]}
    needed = cues.union(*map(required_texts, doubts))
    parts = tuple(cue for cue in sorted(needed) if not any(other in cue for other in needed - {cue}))
    words = {key: _any_word(lists[key]) for key in ("also_before", *WORDS)}
    before, after = _any_word(lists["before"]), _any_word(lists["after"])
    return Cues(boundary, before, after, harmless, hedges, words, _any_word(tuple(cues), doubts), parts)


def _any_word(texts: tuple[str, ...], patterns: tuple[str, ...] = ()) -> re.Pattern[str]:
    """Return a pattern of whole words or phrases, the longest first; `patterns` come before them."""
    longest = map(re.escape, sorted(texts, key=len, reverse=True))
    return re.compile(r"(?<![\w'-])(?:" + "|".join([*patterns, *longest]) + r")(?![\w'-])")
