"""Rules of the check, with level, title and hint, and the collection of findings.

An error means that training would stop, or that a score on the other file would be invalid. A warning needs a manual
review. The levels are part of the contract of the command: with errors, its exit status is 1.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Level = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class CheckRule:
    """Rule of the check.

    Attributes:
        level: `error` or `warning`.
        title: short description of a finding.
        hint: how to fix it.
        drops: whether `--fix` omits such rows.
    """

    level: Level
    title: str
    hint: str
    drops: bool = False


RULES: dict[str, CheckRule] = {
    "unreadable": CheckRule(
        "error", "row cannot be read", "correct the JSON; an array ends at its first broken row", drops=True
    ),
    "no-rows": CheckRule(
        "error", "file has no rows", "an export that was stopped leaves an empty file; export it again"
    ),
    "wrapped": CheckRule(
        "error",
        "rows are inside a field of an object",
        "write the list itself as the file, or one row per line",
        drops=True,
    ),
    "row-type": CheckRule(
        "error", "row is not a JSON object", "write an object with id, image and conversations", drops=True
    ),
    "text": CheckRule(
        "error",
        "text is not Unicode",
        "remove bytes that are not UTF-8 and halves of surrogate pairs",
        drops=True,
    ),
    "id": CheckRule("error", "id has the wrong type", "write the id as text or as an integer", drops=True),
    "image-field": CheckRule("error", "image has the wrong type", "write one file name or a list of them", drops=True),
    "conversation": CheckRule(
        "error",
        "conversation cannot be read",
        'write a list of {"from": "human" or "gpt", "value": text} that alternates and starts with human',
        drops=True,
    ),
    "pair": CheckRule(
        "error",
        "preference pair cannot be used",
        "both sides need the same questions and images, and answers that differ",
        drops=True,
    ),
    "label": CheckRule(
        "error",
        "labeled answer cannot be used",
        "write true or false, and a conversation that ends with an answer",
        drops=True,
    ),
    "places": CheckRule(
        "error",
        "number of placeholders differs from number of images",
        "write one <image> per image, or none to insert them at the start",
        drops=True,
    ),
    "tokens": CheckRule("error", "row cannot be tokenized", "see the message", drops=True),
    "image-missing": CheckRule(
        "error", "image file is missing", "download the file, correct the name, or check --images", drops=True
    ),
    "image-broken": CheckRule(
        "error", "image cannot be decoded", "download the file again or remove the row", drops=True
    ),
    "leak-bytes": CheckRule("error", "same image file in both files", "keep each image in one file only", drops=True),
    "leak-pixels": CheckRule(
        "error", "same image, stored differently, in both files", "keep each image in one file only", drops=True
    ),
    "leak-group": CheckRule(
        "error", "same patient or study in both files", "split by patient: llava data split --by patient", drops=True
    ),
    "leak-pair": CheckRule(
        "error", "same question about the same image in both files", "keep the row in one file only", drops=True
    ),
    "nothing-trained": CheckRule("error", "only empty answers, so no row to train on", "add rows with an answer"),
    "no-conversation": CheckRule("warning", "not trainable: no conversation", "complete or remove the row", drops=True),
    "no-answer": CheckRule("warning", "not trainable: no answer", "complete or remove the row", drops=True),
    "only-empty-answers": CheckRule(
        "warning", "not trainable: no answer with text", "complete or remove the row", drops=True
    ),
    "empty-answer": CheckRule(
        "warning",
        "empty answer, which is not trained",
        "complete it; llava train --compat empty_answers trains it as it is",
    ),
    "empty-text": CheckRule("warning", "empty question", "complete or remove the row"),
    "answer-type": CheckRule(
        "warning", "answer_type is unknown", "evaluation requires OPEN, CLOSED, yes/no, other or number"
    ),
    "repeated-row": CheckRule(
        "warning", "same images and conversation as an earlier row", "keep one of them", drops=True
    ),
    "repeated-id": CheckRule("warning", "same id as an earlier row", "answers are joined by id; make ids unique"),
    "same-picture": CheckRule("warning", "one image under several names", "use one name"),
    "near-duplicate": CheckRule(
        "warning", "near-duplicate images", "review them; an image that was cropped or stored twice is a leak"
    ),
    "leak-name": CheckRule(
        "warning", "same image name in both files", "pass --images to compare the images themselves"
    ),
    "leak-question": CheckRule("warning", "same question on another image in both files", "usual for short questions"),
    "identifier-date": CheckRule("warning", "text that looks like a date", "remove it or replace it with a time span"),
    "identifier-number": CheckRule("warning", "text that looks like a record number", "remove it"),
    "identifier-phone": CheckRule("warning", "text that looks like a telephone number", "remove it"),
    "identifier-email": CheckRule("warning", "text that looks like an e-mail address", "remove it"),
    "identifier-name": CheckRule("warning", "text that looks like a name", "remove it"),
}

NOT_TRAINABLE = ("no-conversation", "no-answer", "only-empty-answers")
"""Rules for rows without anything to train on."""


FILE, AGAINST = 0, 1
"""Numbers of the checked file and of the file that it is compared with."""


@dataclass(frozen=True, slots=True)
class CheckFinding:
    """Finding with a message.

    Attributes:
        rule: key of `RULES`.
        file: `FILE` or `AGAINST`: the file of `rows`.
        rows: row numbers, from 0; at most the first few.
        message: description; never contains text of a row.
        images: places of its images in the `ImageScan`.
        other_rows: row numbers in the other file.
    """

    rule: str
    file: int
    rows: tuple[int, ...]
    message: str
    images: tuple[int, ...] = ()
    other_rows: tuple[int, ...] = ()


@dataclass(slots=True)
class RuleFindings:
    """Findings of one rule in one file."""

    count: int = 0
    rows: array[int] = field(default_factory=lambda: array("I"))
    listed: list[CheckFinding] = field(default_factory=list)


class CheckFindings:
    """Collection of findings: per rule, the count, the row numbers and the first messages.

    Args:
        max_listed: maximum number of messages per rule; counts and row numbers are complete.
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
        """Add a finding about these rows; its message lists the first `num_shown` of them."""
        found = self._found.setdefault((rule, file), RuleFindings())
        found.count += 1
        found.rows.extend(rows)
        if len(found.listed) < self.max_listed:
            shown, others = tuple(rows[:num_shown]), tuple(other_rows[:num_shown])
            found.listed.append(CheckFinding(rule, file, shown, message or RULES[rule].title, tuple(images), others))

    def of(self, rule: str, file: int) -> RuleFindings:
        """Return the findings of one rule in one file."""
        return self._found.get((rule, file), RuleFindings())

    def rules(self, level: Level | None = None) -> list[tuple[str, int]]:
        """Return `(rule, file)` of all findings, in the order of `RULES`."""
        order = {rule: place for place, rule in enumerate(RULES)}
        keys = sorted(self._found, key=lambda key: (order[key[0]], key[1]))
        return [key for key in keys if level is None or RULES[key[0]].level == level]

    def count(self, level: Level) -> int:
        """Return the number of findings of this level."""
        return sum(self._found[key].count for key in self.rules(level))
