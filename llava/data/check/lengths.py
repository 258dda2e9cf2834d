"""Lengths of questions and answers in words, counted in one pass over the rows."""

from __future__ import annotations

from collections import Counter
from typing import Any

from llava.constants import IMAGE_TOKEN
from llava.samples import Conversation
from llava.utils.histograms import quantile

SIDES = {"human": "question", "gpt": "answer"}
"""Role of a turn to its name in the report."""

MOST = 10_000
"""Largest length that has a count of its own, so that the counts do not grow with the texts."""


class TextLengths:
    """Words of each question and answer.

    Attributes:
        words: number of turns by their words, for questions and answers.
    """

    def __init__(self) -> None:
        self.words: dict[str, Counter[int]] = {name: Counter() for name in SIDES.values()}

    def add(self, conversation: Conversation) -> None:
        """Count the turns of a conversation; image placeholders do not count as words."""
        for turn in conversation.turns:
            if name := SIDES.get(turn.role):
                self.words[name][min(len(turn.text.replace(IMAGE_TOKEN, " ").split()), MOST)] += 1

    def table(self) -> dict[str, dict[str, Any]]:
        """Return number, shortest, median, 90 % and longest of questions and of answers, if there are any."""
        return {
            name: {
                "number": sum(counts.values()),
                "shortest": min(counts),
                "median": quantile(counts, 0.5),
                "p90": quantile(counts, 0.9),
                "longest": max(counts),
            }
            for name, counts in self.words.items()
            if counts
        }
