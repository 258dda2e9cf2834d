"""Check of preference pairs and labeled answers: lengths, and what length alone explains.

A rule that always prefers the longer answer is right in far more than half of the pairs of some public sets; a model
that is trained on such pairs may learn length and nothing else.
"""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np

from llava.data.check.row_index import as_array, uint32_array
from llava.samples import Conversation, Preference
from llava.scoring.decisions import words_of

SIDES = ("chosen", "rejected")


class PairLengths:
    """Words of both answers of each pair."""

    def __init__(self) -> None:
        self.words: dict[str, array[int]] = {name: uint32_array() for name in SIDES}

    def __len__(self) -> int:
        return len(self.words[SIDES[0]])

    def add(self, pair: Preference) -> None:
        """Add a pair; of answers in several turns all words count."""
        for name, side in zip(SIDES, (pair.chosen, pair.rejected), strict=True):
            self.words[name].append(_num_words(side))

    def table(self) -> dict[str, Any] | None:
        """Return pair counts, words by side, and the share of longer preferred answers; None without pairs.

        `longer_wins` is the share of pairs that the rule "the longer answer wins" gets right, in which answers of
        equal length count as a half, as a coin would decide them.
        """
        if not len(self):
            return None
        chosen, rejected = (as_array(self.words[name]).astype(np.int64) for name in SIDES)
        longer, equal = float((chosen > rejected).mean()), float((chosen == rejected).mean())
        words = {name: _summary(values) for name, values in zip(SIDES, (chosen, rejected), strict=True)}
        return {
            "pairs": len(self),
            "words": words,
            "longer_wins": round(longer + equal / 2, 4),
            "equal_length": round(equal, 4),
        }


LABELS = ("bad", "good")


class LabelLengths:
    """Words of single answers with a label."""

    def __init__(self) -> None:
        self.words: dict[str, array[int]] = {name: uint32_array() for name in LABELS}

    def add(self, conversation: Conversation, *, is_good: bool) -> None:
        """Add an answer."""
        self.words[LABELS[is_good]].append(_num_words(conversation))

    def table(self) -> dict[str, Any] | None:
        """Return counts and words of good and bad answers, and the share of longer good ones, if any.

        `longer_is_good` is the share of all combinations of a good and a bad answer in which the good one is longer;
        equal lengths count as a half. It is None where one of the labels is missing.
        """
        bad, good = (as_array(self.words[name]).astype(np.int64) for name in LABELS)
        if not len(bad) + len(good):
            return None
        ordered = np.sort(bad)
        below = np.searchsorted(ordered, good, "left") + np.searchsorted(ordered, good, "right")
        return {
            "answers": len(bad) + len(good),
            "good": len(good),
            "words": {name: _summary(part) for name, part in (("good", good), ("bad", bad)) if len(part)},
            "longer_is_good": round(float(below.mean()) / (2 * len(bad)), 4) if len(bad) and len(good) else None,
        }


def _num_words(conversation: Conversation) -> int:
    return sum(len(words_of(turn.text)) for turn in conversation.turns if turn.role == "gpt")


def _summary(values: np.ndarray[Any, np.dtype[np.int64]]) -> dict[str, float]:
    low, middle, high, most = np.quantile(values, [0.0, 0.5, 0.9, 1.0], method="higher").tolist()
    mean = round(float(values.mean()), 2)
    return {"mean": mean, "shortest": int(low), "median": int(middle), "p90": int(high), "longest": int(most)}


def pair_lines(table: dict[str, Any]) -> list[str]:
    """Return the table as lines."""
    lines = [
        f"preference pairs: {table['pairs']}; 'the longer answer wins' is right in {100 * table['longer_wins']:.1f} % "
        f"(a coin: 50 %)"
    ]
    return lines + _word_lines(table)


def label_lines(table: dict[str, Any]) -> list[str]:
    """Return the table of labels as lines."""
    share, rule = 100 * table["good"] / table["answers"], table["longer_is_good"]
    text = "all have the same label" if rule is None else f"the longer of two is the good one in {100 * rule:.1f} %"
    return [f"labeled answers: {table['answers']}, of which {share:.1f} % are good; {text}", *_word_lines(table)]


def _word_lines(table: dict[str, Any]) -> list[str]:
    return [
        f"  words of {name} answers: " + ", ".join(f"{title} {value:g}" for title, value in words.items())
        for name, words in table["words"].items()
    ]
