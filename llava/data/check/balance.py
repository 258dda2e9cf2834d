"""What the rows are about: how often each answer type, question type, organ, ... occurs, and how large rows are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from llava.data.check.identifiers import identifier_rules
from llava.errors import DataError
from llava.samples import Sample
from llava.scoring.decisions import decision, is_closed

FIELDS = (
    "answer_type",
    "question_type",
    "content_type",
    "image_organ",
    "organ",
    "location",
    "modality",
    "domain",
    "view",
    "label",
    "disease",
    "source",
    "license",
    "official_split",
)
"""Fields that sort rows into classes, where a row has them."""

MAX_CLASSES = 200
MAX_CHARACTERS = 40
"""A class is a word or two; longer values are texts, which have no place in a report."""

OTHER = "(other)"
"""Classes beyond `MAX_CLASSES`, and those that look like identifiers."""


class Balance:
    """Counts classes; what is kept does not grow with the rows.

    Attributes:
        counts: rows by class, by field.
        turns: rows by number of questions.
        images: rows by number of images.
    """

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {}
        self.turns: Counter[int] = Counter()
        self.images: Counter[int] = Counter()

    def add(self, value: Mapping[str, Any], sample: Sample | None) -> None:
        """Count one row: its fields, and its conversation where it has one that can be read."""
        for name in FIELDS:
            for word in _classes(value.get(name)):
                self._count(name, word)
        if sample is None:
            return
        turns = sample.conversation.turns
        self.turns[sum(turn.role == "human" for turn in turns)] += 1
        self.images[len(sample.images)] += 1
        answer = next((turn.text for turn in turns if turn.role == "gpt"), None)
        if answer is not None and len(turns) == 2 and _closed(sample, answer):
            self._count("closed answers", decision(answer) or "neither yes nor no")

    def _count(self, name: str, word: str) -> None:
        counter = self.counts.setdefault(name, Counter())
        if word not in counter and (len(counter) >= MAX_CLASSES or identifier_rules([word])):
            word = OTHER
        counter[word] += 1

    def tables(self) -> dict[str, dict[str, int]]:
        """Return the classes of every field, the most frequent first."""
        return {name: dict(counter.most_common()) for name, counter in self.counts.items()}


def _closed(sample: Sample, answer: str) -> bool:
    try:
        return is_closed(sample.meta.get("answer_type"), answer)
    except DataError:
        return False


def _classes(value: Any) -> list[str]:
    """Return the classes a field names: a word, a list of words, or the true ones of an object of flags."""
    if isinstance(value, Mapping):
        return [_short(name) for name, flag in value.items() if flag is True]
    if isinstance(value, list):
        return [_short(part) for part in value if isinstance(part, str | int)]
    return [_short(value)] if isinstance(value, str | int) and str(value).strip() else []


def _short(value: Any) -> str:
    word = str(value).strip()
    return word if len(word) <= MAX_CHARACTERS else "(long text)"
