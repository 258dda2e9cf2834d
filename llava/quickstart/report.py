"""Result page of a quickstart: accuracy with controls, answers, loss curves, times, chat command."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llava.eval.intervals import Draws, ItemScores
from llava.eval.medvqa.controls import most_common_answers
from llava.eval.medvqa.items import ScoredItem
from llava.eval.medvqa.page import case_html, choose_examples, is_right
from llava.imaging.decode import load_image
from llava.samples import Sample
from llava.train.curves import curve, series
from llava.utils.charts import LineChart
from llava.utils.json_rows import read_records
from llava.utils.jsonl import write_atomic
from llava.utils.reporting import fact_lines, render_page

RUNS = {
    "after": "after training",
    "after_blank": "after training, gray image",
    "majority": "most common training answer of each question type",
    "before": "before training",
}
"""Titles of the compared runs; `after` is compared with every other run."""

CONTROLS = ("after_blank", "majority")
"""Controls that a model which uses its images exceeds by more than chance."""


def question_type(sample: Sample) -> str:
    """Return the question type of a row: field `question_type`, else `answer_type`, else empty."""
    return str(sample.meta.get("question_type") or sample.meta.get("answer_type") or "")


def majority_items(items: Sequence[ScoredItem], samples: Sequence[Sample], train: Sequence[Sample]) -> list[ScoredItem]:
    """Return the items with the most common training answer of each question's type as prediction.

    Args:
        items: the questions, one for each of `samples`.
        samples: their rows.
        train: the rows in which answers are counted; a type without rows gets the most common answer of all.
    """
    answers = most_common_answers(train, question_type)
    common = most_common_answers(train, lambda _: "everything")["everything"]
    return [
        replace(item, prediction=answers.get(question_type(sample), common), failed=False)
        for item, sample in zip(items, samples, strict=True)
    ]


def compare_runs(
    runs: Mapping[str, Sequence[ScoredItem]], *, num_resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Return the accuracy of every run and the differences of `after` to them, with intervals.

    Args:
        runs: answers to the same questions by name of `RUNS`; `after` is required. A run with answers to some of the
            questions only is compared with `after` on these.
        num_resamples: number of resamples of the images.
        seed: seed of the resampling.

    Returns:
        `accuracy` and `difference` by run, `by_type` (accuracy by question type and run), `passed`: whether the 95 %
        intervals of the differences to all `CONTROLS` are above zero.
    """
    items = runs["after"]
    draws = Draws([item.cluster for item in items], num_resamples=num_resamples, seed=seed)
    scores = {name: ItemScores.of(_right(items, answers)) for name, answers in runs.items()}
    differences = {
        name: draws.difference(_on_the_same(scores["after"], score), score).to_json()
        for name, score in scores.items()
        if name != "after"
    }
    return {
        "num_questions": len(items),
        "num_images": len({item.cluster for item in items}),
        "accuracy": {name: draws.estimate(score).to_json() for name, score in scores.items()},
        "difference": differences,
        "by_type": by_type(runs),
        "passed": all((differences[name]["low"] or 0.0) > 0 for name in CONTROLS if name in differences),
    }


def _right(items: Sequence[ScoredItem], answers: Sequence[ScoredItem]) -> list[float]:
    """Return 1 (right) or 0 for each of `items` that was answered, NaN for the others."""
    by_id = {answer.question_id: float(is_right(answer)) for answer in answers}
    return [by_id.get(item.question_id, math.nan) for item in items]


def _on_the_same(score: ItemScores, other: ItemScores) -> ItemScores:
    """Return the score restricted to the items of the other score."""
    return ItemScores.of(np.where(np.isnan(other.values), math.nan, score.values))


def by_type(runs: Mapping[str, Sequence[ScoredItem]]) -> dict[str, dict[str, float]]:
    """Return the percentage of right answers by question type and run; empty if the data name no types."""
    shares: dict[str, dict[str, float]] = {}
    for name, answers in runs.items():
        groups: dict[str, list[bool]] = defaultdict(list)
        for item in answers:
            for kind in item.types:
                groups[kind].append(is_right(item))
        for kind, hits in groups.items():
            shares.setdefault(kind, {})[name] = 100.0 * sum(hits) / len(hits)
    return shares


NUM_EXAMPLES = 3


def write_page(
    path: Path,
    *,
    result: Mapping[str, Any],
    items: Sequence[ScoredItem],
    blank: Sequence[ScoredItem],
    image_folder: Path,
    curves: Mapping[str, Path],
    facts: Mapping[str, Any],
    reason: str,
    times: Sequence[Sequence[str]],
    notice: str,
    chat: str,
) -> None:
    """Write the result page.

    Args:
        path: HTML file to write.
        result: the result of `compare_runs`.
        items: the answers after training.
        blank: the same with a gray image.
        image_folder: folder of the image names.
        curves: metrics files of the trained stages by title; absent files are left out.
        facts: further facts to list (parts, data).
        reason: chosen size and the reason for it.
        times: stage, forecast and measured seconds.
        notice: description of the data, shown below the heading and beside the examples.
        chat: command that chats with the result.
    """
    shown = choose_examples(items, blank, NUM_EXAMPLES)
    opener = partial(load_image, root=image_folder)
    text = render_page(
        "quickstart.html",
        title="Quickstart",
        notice=notice,
        verdict=verdict_text(result),
        accuracy=accuracy_rows(result),
        runs=[title for name, title in RUNS.items() if name in result["accuracy"]],
        types=type_rows(result),
        cases=[case_html(items[index], blank[index], opener) for index in shown],
        chat=chat,
        curves=[one for name, file in curves.items() if (one := _loss_chart(name, file)) is not None],
        reason=reason,
        times=times,
        provenance=fact_lines(facts),
    )
    write_atomic(path, text)


def _loss_chart(title: str, metrics: Path) -> LineChart | None:
    """Return the chart of the loss in a metrics file; None without a file or with a single value."""
    values = series(list(read_records(metrics))).get("loss") if metrics.is_file() else None
    return None if values is None else replace(curve("loss", values), name=title)


def verdict_text(result: Mapping[str, Any]) -> str:
    """Return the result in one sentence: whether the model uses its images, and by which numbers."""
    differences = [
        f"{result['difference'][name]['value']:+.1f} points {_interval(result['difference'][name])} over {RUNS[name]!r}"
        for name in CONTROLS
    ]
    opening = "The model looks at its images" if result["passed"] else "NOT SHOWN that the model looks at its images"
    return (
        f"{opening}: {result['accuracy']['after']['value']:.1f} % of {result['num_questions']} questions about "
        f"{result['num_images']} unseen images are right, {' and '.join(differences)} "
        f"(95 % intervals, resampled by image)."
    )


def accuracy_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Return the accuracy of every run and the difference to the trained model."""
    rows = []
    for name, title in RUNS.items():
        if name in result["accuracy"]:
            accuracy, difference = result["accuracy"][name], result["difference"].get(name)
            distance = f"{difference['value']:+.1f} {_interval(difference)}" if difference else "-"
            cells = [title, accuracy["num_items"], f"{accuracy['value']:.1f}", _interval(accuracy), distance]
            rows.append([str(cell) for cell in cells])
    return rows


def type_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Return the percentage of correct answers by question type and run; `-` for a type without questions."""
    names = [name for name in RUNS if name in result["accuracy"]]
    return [
        [kind, *(f"{shares[name]:.0f}" if name in shares else "-" for name in names)]
        for kind, shares in sorted(result["by_type"].items())
    ]


def summary_text(result: Mapping[str, Any]) -> str:
    """Return the accuracies as text for the terminal."""
    lines = [verdict_text(result), ""]
    for name, title in RUNS.items():
        if name in result["accuracy"]:
            accuracy = result["accuracy"][name]
            few = accuracy["num_items"] < result["num_questions"]
            asked = f"  ({accuracy['num_items']} questions)" if few else ""
            lines.append(f"  {title:<50}{accuracy['value']:6.1f} %  {_interval(accuracy)}{asked}")
    return "\n".join(lines)


def _interval(estimate: Mapping[str, Any]) -> str:
    return f"[{estimate['low']:.1f}, {estimate['high']:.1f}]" if estimate["low"] is not None else "[-]"
