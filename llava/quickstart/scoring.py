"""What the quickstart claims, in numbers: one accuracy over all questions, against every control.

answers before, after, after on a grey image, majority --right or wrong--> shares, differences, clustered intervals
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from llava.eval.intervals import Draws, Score
from llava.eval.medvqa.controls import commonest_answers
from llava.eval.medvqa.items import Item
from llava.eval.medvqa.page import is_right
from llava.samples import Sample

RUNS = {
    "after": "after training",
    "after_blank": "after training, grey image",
    "majority": "commonest training answer of each question type",
    "before": "before training",
}
"""What the systems that are compared are called; `after` is the one that is judged."""

CONTROLS = ("after_blank", "majority")
"""A model that looks at its pictures beats both by more than chance."""


def question_type(sample: Sample) -> str:
    """Return the type of a row's question: the field `question_type`, else `answer_type`, else nothing."""
    return str(sample.meta.get("question_type") or sample.meta.get("answer_type") or "")


def majority_items(items: Sequence[Item], samples: Sequence[Sample], train: Sequence[Sample]) -> list[Item]:
    """Return the items as answered by the commonest training answer of each question's type.

    Args:
        items: the questions, one for each of `samples`.
        samples: their rows.
        train: the rows that the answers are counted in; a type that is not among them gets their commonest answer.
    """
    answers = commonest_answers(train, question_type)
    common = commonest_answers(train, lambda _: "everything")["everything"]
    return [
        replace(item, prediction=answers.get(question_type(sample), common), failed=False)
        for item, sample in zip(items, samples, strict=True)
    ]


def compare(runs: Mapping[str, Sequence[Item]], *, num_resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Return the accuracy of every run with its interval, and of `after` minus every other run.

    Args:
        runs: answers to the same questions by name of `RUNS`; `after` must be among them, and another run may hold
            answers to some of its questions only, which are then compared with `after` on these.
        num_resamples: resamples of the pictures.
        seed: of the resampling.

    Returns:
        `accuracy` and `difference` by run, `by_type` (share right by question type and run), `passed`: whether the
        differences to all `CONTROLS` are above zero by more than their 95 % interval.
    """
    items = runs["after"]
    draws = Draws([item.image for item in items], num_resamples=num_resamples, seed=seed)
    scores = {name: Score.of(_right(items, answers)) for name, answers in runs.items()}
    differences = {
        name: draws.difference(_on_the_same(scores["after"], score), score).to_json()
        for name, score in scores.items()
        if name != "after"
    }
    return {
        "num_questions": len(items),
        "num_images": len({item.image for item in items}),
        "accuracy": {name: draws.estimate(score).to_json() for name, score in scores.items()},
        "difference": differences,
        "by_type": by_type(runs),
        "passed": all((differences[name]["low"] or 0.0) > 0 for name in CONTROLS if name in differences),
    }


def _right(items: Sequence[Item], answers: Sequence[Item]) -> list[float]:
    """Return 1 or 0 for each of `items` that was answered, NaN for the others."""
    by_id = {answer.question_id: float(is_right(answer)) for answer in answers}
    return [by_id.get(item.question_id, math.nan) for item in items]


def _on_the_same(score: Score, other: Score) -> Score:
    """Return the score on the items that the other one looks at."""
    return Score.of(np.where(np.isnan(other.values), math.nan, score.values))


def by_type(runs: Mapping[str, Sequence[Item]]) -> dict[str, dict[str, float]]:
    """Return the percentage of right answers by question type and run; nothing when the data name no types."""
    table: dict[str, dict[str, float]] = {}
    for name, answers in runs.items():
        groups: dict[str, list[bool]] = defaultdict(list)
        for item in answers:
            for kind in item.types:
                groups[kind].append(is_right(item))
        for kind, hits in groups.items():
            table.setdefault(kind, {})[name] = 100.0 * sum(hits) / len(hits)
    return table
