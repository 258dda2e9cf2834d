"""Cue lists of a language: negation, uncertainty, ends of clauses, and lists."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from llava.errors import DataError
from llava.symbolic.document import read_document
from llava.symbolic.patterns import compile_pattern, required_texts
from llava.symbolic.problems import Problems

CUES = Path(__file__).parent / "cues"

EXTRACTOR_VERSION = 2
"""Version of the code that reads texts; raise it with a change that gives a text another value."""

TEXTS = ("clause_words", "predicates", "before", "after", "both", "bare", "hedges")
PATTERNS = ("restarts", "contrasts", "harmless", "doubts")
OF_LISTS = ("alternatives", "additions", "verbs", "ends", "places")
CUE_KEYS = (*TEXTS, *PATTERNS, *OF_LISTS)


@dataclass(frozen=True, slots=True)
class Cues:
    """Compiled cue lists of one language.

    Attributes:
        boundary: ends of clauses.
        predicates: words that begin a new predicate, which cues before them do not negate.
        before: cues that negate what comes after them.
        after: cues that negate what comes before them.
        both: cues that do both.
        bare: those of them that negate only what comes after them if they stand directly between two matches.
        restarts: phrases with a new subject and a cue, which negates only what comes after it.
        contrasts: phrases with a link and a cue, which negates only what comes after it if another match does.
        harmless: phrases that contain a cue and negate nothing.
        hedges: phrases that make a match uncertain.
        links: words before the last item of a list.
        additions: those of them that need two items or more before.
        verbs: words between a cue and the first item of a list.
        ends: words that no item of a list has.
        places: words after which a link belongs to an item: "opacities in the left or right lobe".
        any: all cues, to pass over the texts that have none.
        parts: texts of which every text with a cue contains one; looking for them is faster still.
    """

    boundary: re.Pattern[str]
    predicates: re.Pattern[str]
    before: re.Pattern[str]
    after: re.Pattern[str]
    both: re.Pattern[str]
    bare: re.Pattern[str]
    restarts: re.Pattern[str]
    contrasts: re.Pattern[str]
    harmless: re.Pattern[str]
    hedges: re.Pattern[str]
    links: re.Pattern[str]
    additions: re.Pattern[str]
    verbs: re.Pattern[str]
    ends: re.Pattern[str]
    places: re.Pattern[str]
    any: re.Pattern[str]
    parts: tuple[str, ...]


def languages() -> list[str]:
    """Return the languages with cue lists."""
    return sorted(path.stem for path in CUES.glob("*.yaml"))


def cues_sha256(language: str) -> str:
    """Return the hash of a language's file of cues."""
    return hashlib.sha256((CUES / f"{language}.yaml").read_bytes()).hexdigest()


@cache
def read_cues(language: str) -> Cues:
    """Return the cue lists of a language.

    Raises:
        DataError: the language has no cue lists, or one of their patterns is refused.
    """
    if language not in languages():
        raise DataError(f"language {language!r} has no cue lists; known: {', '.join(languages())}")
    problems = Problems()
    keys = problems.map(read_document(CUES / f"{language}.yaml"), "cues", CUE_KEYS)
    texts = {key: problems.texts(keys[key], key) for key in CUE_KEYS}
    patterns = {key: tuple(compile_pattern(pattern).pattern for pattern in texts[key]) for key in PATTERNS}
    both, doubts = texts["both"], patterns["doubts"]
    cues = (*texts["before"], *texts["after"], *both, *texts["hedges"])
    needed = frozenset(cues).union(*map(required_texts, doubts))
    return Cues(
        boundary=re.compile(rf"[;,:]|[.!?](?=\s|$)|{_any_word(texts['clause_words']).pattern}"),
        predicates=_any_word(texts["predicates"]),
        before=_any_word((*texts["before"], *both)),
        after=_any_word((*texts["after"], *both)),
        both=_any_word(both),
        bare=_any_word(texts["bare"]),
        restarts=_any_word((), patterns["restarts"]),
        contrasts=_any_word((), patterns["contrasts"]),
        harmless=_any_word((), (*patterns["harmless"], *doubts)),
        hedges=_any_word(texts["hedges"], doubts),
        links=_any_word((*texts["alternatives"], *texts["additions"])),
        additions=_any_word(texts["additions"]),
        verbs=_any_word(texts["verbs"]),
        ends=_any_word((*texts["ends"], *texts["verbs"])),
        places=_any_word(texts["places"]),
        any=_any_word(cues, doubts),
        parts=tuple(cue for cue in sorted(needed) if not any(other in cue for other in needed - {cue})),
    )


def _any_word(texts: tuple[str, ...], patterns: tuple[str, ...] = ()) -> re.Pattern[str]:
    """Return a pattern of whole words or phrases, the longest first; `patterns` come before them."""
    longest = map(re.escape, sorted(texts, key=len, reverse=True))
    return re.compile(r"(?<![\w'-])(?:" + "|".join([*patterns, *longest]) + r")(?![\w'-])")
