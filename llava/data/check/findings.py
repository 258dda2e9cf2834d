"""What was found: a count and the row numbers of every rule, and the first findings in words.

A data file may break one rule in every row. Row numbers take four bytes each; words are kept for the first findings
of each rule only, so the list never outgrows the data.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from llava.data.check.rules import RULES, Level

FILE, AGAINST = 0, 1
"""Which of the two files: the one that is checked, and the one it is compared with."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding in words.

    Attributes:
        rule: key of `RULES`.
        file: `FILE` or `AGAINST`: the file `rows` count in.
        rows: row numbers, from 0; the first few where there are many.
        message: what was found; never text of a row.
        images: places in `Pictures` of those it is about.
        other_rows: rows of the file that was compared with.
    """

    rule: str
    file: int
    rows: tuple[int, ...]
    message: str
    images: tuple[int, ...] = ()
    other_rows: tuple[int, ...] = ()


@dataclass(slots=True)
class Found:
    """All findings of one rule in one file."""

    count: int = 0
    rows: array[int] = field(default_factory=lambda: array("I"))
    listed: list[Finding] = field(default_factory=list)


class Findings:
    """Collects findings.

    Args:
        max_listed: findings of one rule that are kept in words; a count and row numbers are kept of all.
    """

    def __init__(self, max_listed: int = 1000) -> None:
        self.max_listed = max_listed
        self._found: dict[tuple[str, int], Found] = {}

    def add(
        self,
        rule: str,
        file: int,
        rows: Sequence[int],
        message: str = "",
        *,
        images: Sequence[int] = (),
        other_rows: Sequence[int] = (),
        num_shown: int = 10,
    ) -> None:
        """Add one finding about these rows; `num_shown` of them are written with its words."""
        found = self._found.setdefault((rule, file), Found())
        found.count += 1
        found.rows.extend(rows)
        if len(found.listed) < self.max_listed:
            shown, others = tuple(rows[:num_shown]), tuple(other_rows[:num_shown])
            found.listed.append(Finding(rule, file, shown, message or RULES[rule].title, tuple(images), others))

    def of(self, rule: str, file: int) -> Found:
        """Return what one rule found in one file."""
        return self._found.get((rule, file), Found())

    def rules(self, level: Level | None = None) -> list[tuple[str, int]]:
        """Return `(rule, file)` of everything that was found, in the order of `RULES`."""
        order = {rule: place for place, rule in enumerate(RULES)}
        keys = sorted(self._found, key=lambda key: (order[key[0]], key[1]))
        return [key for key in keys if level is None or RULES[key[0]].level == level]

    def count(self, level: Level) -> int:
        """How many findings have this level."""
        return sum(self._found[key].count for key in self.rules(level))
