"""What is looked for: every rule with its level, its title and what to do about it.

An error says that training would stop, or that a score on the other file would mean nothing; a warning says that a
person should look. Which is which is part of the command's contract: errors end it with status 1.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Level = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class CheckRule:
    """One thing that is looked for.

    Attributes:
        level: `error` or `warning`.
        title: what was found, in a few words.
        hint: what to do about it.
        drops: whether `--fix` leaves such rows out.
    """

    level: Level
    title: str
    hint: str
    drops: bool = False


RULES: dict[str, CheckRule] = {
    "unreadable": CheckRule(
        "error", "row cannot be read", "correct the JSON there; an array ends at its first broken row", drops=True
    ),
    "row-type": CheckRule(
        "error", "row is no JSON object", "a row is an object with id, image and conversations", drops=True
    ),
    "text": CheckRule(
        "error",
        "text is not Unicode",
        "it has bytes that are not UTF-8, or half of a surrogate pair",
        drops=True,
    ),
    "id": CheckRule("error", "id has the wrong type", "write the id as text or as a whole number", drops=True),
    "image-field": CheckRule("error", "image has the wrong type", "write one file name, or a list of them", drops=True),
    "conversation": CheckRule(
        "error",
        "conversation cannot be read",
        'write a list of {"from": "human" or "gpt", "value": text}, a question first, in turns',
        drops=True,
    ),
    "places": CheckRule(
        "error",
        "place holders and images differ in number",
        "write one <image> for each image, or none to have them put in front",
        drops=True,
    ),
    "tokens": CheckRule("error", "row cannot be turned into tokens", "see the message", drops=True),
    "image-missing": CheckRule(
        "error", "image file is missing", "fetch the file, correct the name, or check --images", drops=True
    ),
    "image-broken": CheckRule(
        "error", "image cannot be decoded", "fetch the file again or leave the row out", drops=True
    ),
    "leak-bytes": CheckRule(
        "error", "same picture file in both files", "keep each picture in one file only", drops=True
    ),
    "leak-pixels": CheckRule(
        "error", "same picture, stored differently, in both files", "keep each picture in one file only", drops=True
    ),
    "leak-group": CheckRule(
        "error", "same patient or study in both files", "split by patient: llava data split --by patient", drops=True
    ),
    "leak-pair": CheckRule(
        "error", "same question about the same image in both files", "keep the row in one file only", drops=True
    ),
    "no-conversation": CheckRule(
        "warning", "not trainable: no conversation", "fill in or leave out the row", drops=True
    ),
    "no-answer": CheckRule("warning", "not trainable: no answer", "fill in or leave out the row", drops=True),
    "empty-text": CheckRule("warning", "empty question or answer", "fill in or leave out the row"),
    "answer-type": CheckRule(
        "warning", "answer_type is unknown", "evaluation needs OPEN, CLOSED, yes/no, other or number"
    ),
    "repeated-row": CheckRule(
        "warning", "same images and conversation as an earlier row", "keep one of them", drops=True
    ),
    "repeated-id": CheckRule("warning", "same id as an earlier row", "answers are joined by id; make ids unique"),
    "same-picture": CheckRule("warning", "one picture under several names", "give it one name"),
    "near-duplicate": CheckRule(
        "warning", "pictures that are nearly the same", "look at them; one picture cut or stored twice is a leak"
    ),
    "leak-name": CheckRule(
        "warning", "same image name in both files", "give --images to have the pictures themselves compared"
    ),
    "leak-question": CheckRule("warning", "same question on another image in both files", "usual for short questions"),
    "identifier-date": CheckRule("warning", "text that looks like a date", "remove it or replace it by a time span"),
    "identifier-number": CheckRule("warning", "text that looks like a record number", "remove it"),
    "identifier-phone": CheckRule("warning", "text that looks like a telephone number", "remove it"),
    "identifier-email": CheckRule("warning", "text that looks like an e-mail address", "remove it"),
    "identifier-name": CheckRule("warning", "text that looks like a name", "remove it"),
}

NOT_TRAINABLE = ("no-conversation", "no-answer")
"""Rules whose rows hold nothing to train."""


FILE, AGAINST = 0, 1
"""Which of the two files: the one that is checked, and the one it is compared with."""


@dataclass(frozen=True, slots=True)
class CheckFinding:
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
class RuleFindings:
    """All findings of one rule in one file."""

    count: int = 0
    rows: array[int] = field(default_factory=lambda: array("I"))
    listed: list[CheckFinding] = field(default_factory=list)


class CheckFindings:
    """Collects findings.

    Args:
        max_listed: findings of one rule that are kept in words; a count and row numbers are kept of all.
    """

    def __init__(self, max_listed: int = 1000) -> None:
        self.max_listed = max_listed
        self._found: dict[tuple[str, int], RuleFindings] = {}

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
        found = self._found.setdefault((rule, file), RuleFindings())
        found.count += 1
        found.rows.extend(rows)
        if len(found.listed) < self.max_listed:
            shown, others = tuple(rows[:num_shown]), tuple(other_rows[:num_shown])
            found.listed.append(CheckFinding(rule, file, shown, message or RULES[rule].title, tuple(images), others))

    def of(self, rule: str, file: int) -> RuleFindings:
        """Return what one rule found in one file."""
        return self._found.get((rule, file), RuleFindings())

    def rules(self, level: Level | None = None) -> list[tuple[str, int]]:
        """Return `(rule, file)` of everything that was found, in the order of `RULES`."""
        order = {rule: place for place, rule in enumerate(RULES)}
        keys = sorted(self._found, key=lambda key: (order[key[0]], key[1]))
        return [key for key in keys if level is None or RULES[key[0]].level == level]

    def count(self, level: Level) -> int:
        """How many findings have this level."""
        return sum(self._found[key].count for key in self.rules(level))
