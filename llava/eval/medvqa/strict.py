"""The medical VQA scores to trust: whole words, one decision an answer, exact equality, every miss counted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from llava.eval.intervals import Score
from llava.eval.medvqa.items import Item
from llava.eval.medvqa.metrics import token_overlap
from llava.scoring.decisions import DECISIONS, decision
from llava.scoring.normalize import normalize


def is_unparsable(item: Item) -> bool:
    """Say whether a yes/no question got an answer without a decision."""
    return item.closed and _clean(item.reference) in DECISIONS and decision(item.prediction) is None


def closed_hit(item: Item) -> float:
    """Return 1 when the decision is right (yes/no), or when the answer is the reference (any other closed question)."""
    reference = _clean(item.reference)
    if reference in DECISIONS:
        return float(decision(item.prediction) == reference)
    return float(_clean(item.prediction) == reference)


def strict_scores(items: Sequence[Item]) -> dict[str, Score]:
    """Return every strict score of the items; with question types, also the means over them."""
    closed = [closed_hit(item) if item.closed else math.nan for item in items]
    exact = [math.nan if item.closed else float(_clean(item.prediction) == _clean(item.reference)) for item in items]
    overlaps = [
        (math.nan,) * 3 if item.closed else token_overlap(_words(item.reference), _words(item.prediction))
        for item in items
    ]
    f1, _, recall = zip(*overlaps, strict=True) if overlaps else ((), (), ())
    scores = {
        "closed accuracy": Score.of(closed),
        "open exact match": Score.of(exact),
        "open f1": Score.of(f1),
        "open recall": Score.of(recall),
    }
    types = [item.types for item in items]
    if any(types):
        scores["closed accuracy, mean over types"] = Score.of(closed, types)
        scores["open recall, mean over types"] = Score.of(recall, types)
    return scores


def _clean(text: str) -> str:
    return normalize(text, all_periods=True)


def _words(text: str) -> Counter[str]:
    return Counter(_clean(text).split())
