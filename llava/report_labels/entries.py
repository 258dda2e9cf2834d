"""Table entries of the labeler, and their compilation to one pattern per table."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    """Pattern of words in lower case, searched at word boundaries.

    Attributes:
        pattern: regular expression; a space matches white space or hyphens, and ` ?` also nothing.
        why: reason for an entry that is rare in the Indiana University reports.
    """

    pattern: str
    why: str = ""

    def regex(self) -> str:
        """Return the regular expression of this entry."""
        pattern = self.pattern.replace(" ?", r"[\s-]*").replace(" ", r"[\s-]+")
        return rf"\b(?:{pattern})(?![a-z])"


def entries(*patterns: str) -> tuple[Entry, ...]:
    """Return entries of common patterns."""
    return tuple(Entry(pattern) for pattern in patterns)


class Finder:
    """Search for any entry of a table; earlier entries win at one place.

    A text without any of the table's stems is not searched, which is most of the time.
    """

    def __init__(self, table: Iterable[Entry]) -> None:
        table = tuple(table)
        self.table = table
        self.pattern = re.compile("|".join(entry.regex() for entry in table))
        self._stems = required_stems(table)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Return start and end of all matches."""
        if self._stems is not None and not any(stem in text for stem in self._stems):
            return []
        return [match.span() for match in self.pattern.finditer(text)]


def named_alternatives(tables: dict[str, tuple[Entry, ...]]) -> re.Pattern[str]:
    """Return one pattern with a named group for each table; earlier tables win at one place."""
    return re.compile("|".join(f"(?P<{name}>{Finder(table).pattern.pattern})" for name, table in tables.items()))


_NESTED = re.compile(r"\((?:[^()]|\([^()]*\))*\)[?*+]?(?:\{[^}]*\})?|\[[^\]]*\][?*+]?|\\\w[?*+]?|\w\?")
_LITERAL = re.compile(r"[a-z]+")


def required_stems(table: Iterable[Entry]) -> tuple[str, ...] | None:
    """Return literals, one of which every match contains; None if an entry has none outside its groups."""
    stems: set[str] = set()
    for entry in table:
        for alternative in _top_level(entry.pattern):
            literals = _LITERAL.findall(_NESTED.sub("(", alternative))
            longest = max(literals, key=len, default="")
            if len(longest) < 3:
                return None
            stems.add(longest)
    return tuple(sorted(stem for stem in stems if not any(other in stem for other in stems - {stem})))


def _top_level(pattern: str) -> list[str]:
    """Return the alternatives of a pattern that are not inside parentheses."""
    parts, depth, start = [], 0, 0
    for index, char in enumerate(pattern):
        depth += (char == "(") - (char == ")")
        if char == "|" and depth == 0:
            parts.append(pattern[start:index])
            start = index + 1
    return [*parts, pattern[start:]]
