"""The page of a quickstart: what was done, the numbers with their controls, three answers, curves, how to chat."""

from __future__ import annotations

import base64
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from llava.eval.intervals import Draws, Score
from llava.eval.medvqa.controls import commonest_answers
from llava.eval.medvqa.items import Item
from llava.eval.medvqa.page import case, choose_examples, is_right
from llava.imaging.decode import load as load_image
from llava.samples import Sample
from llava.utils.jsonl import write_atomic
from llava.utils.reporting import page, table

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


NUM_EXAMPLES = 3


def write_page(
    path: Path,
    *,
    result: Mapping[str, Any],
    items: Sequence[Item],
    blank: Sequence[Item],
    image_folder: Path,
    curves: Mapping[str, Path],
    facts: Mapping[str, Any],
    reason: str,
    times: Sequence[Sequence[str]],
    notice: str,
    chat: str,
) -> None:
    """Write the page.

    Args:
        path: the page.
        result: the result of `scoring.compare`.
        items: the answers after training.
        blank: the same on a grey image.
        image_folder: where image names lead.
        curves: loss curves (PNG) by title; one that is not there is left out.
        facts: what else to list (parts, data).
        reason: which size was used, and why.
        times: stage, forecast and measured seconds.
        notice: what the data are; shown under the heading and beside the examples.
        chat: the line that chats with the result.
    """
    parts = [f"<h1>Quickstart</h1><p><b>{escape(notice)}</b></p>", f"<p>{escape(verdict(result))}</p>"]
    parts += ["<h2>Accuracy on unseen pictures</h2>", accuracy_table(result)]
    if result["by_type"]:
        parts += ["<h2>By question type (% right)</h2>", by_type_table(result)]
    parts.append(f"<h2>Three answers</h2><p><b>{escape(notice)}</b></p>")
    for index in choose_examples(items, blank, NUM_EXAMPLES):
        parts.append(case(items[index], blank[index], lambda name: load_image(name, image_folder)))
    parts.append(f"<h2>Ask it yourself</h2><pre>{escape(chat)}</pre>")
    for title, file in curves.items():
        if file.is_file():
            data = base64.b64encode(file.read_bytes()).decode("ascii")
            image = f'<img alt="loss curve" style="max-width:100%" src="data:image/png;base64,{data}">'
            parts.append(f"<h2>{escape(title)}</h2>{image}")
    parts += ["<h2>Size and time</h2>", f"<p>{escape(reason)}</p>", table(["stage", "forecast", "measured"], times)]
    rows = [[name, str(value)] for name, value in facts.items()]
    parts += ["<h2>Where this comes from</h2>", table(["what", "value"], rows)]
    write_atomic(path, page("Quickstart", parts))


def verdict(result: Mapping[str, Any]) -> str:
    """Return the claim in one sentence, whichever way it went."""
    differences = [
        f"{result['difference'][name]['value']:+.1f} points {_interval(result['difference'][name])} over {RUNS[name]!r}"
        for name in CONTROLS
    ]
    opening = (
        "The model looks at its pictures" if result["passed"] else "NOT SHOWN that the model looks at its pictures"
    )
    return (
        f"{opening}: {result['accuracy']['after']['value']:.1f} % of {result['num_questions']} questions about "
        f"{result['num_images']} unseen pictures are right, {' and '.join(differences)} "
        f"(95 % intervals, resampled by picture)."
    )


def accuracy_table(result: Mapping[str, Any]) -> str:
    """Return the accuracy of every run and its distance from the trained model, as HTML."""
    rows = []
    for name, title in RUNS.items():
        if name in result["accuracy"]:
            accuracy, difference = result["accuracy"][name], result["difference"].get(name)
            distance = f"{difference['value']:+.1f} {_interval(difference)}" if difference else "-"
            cells = [title, accuracy["num_items"], f"{accuracy['value']:.1f}", _interval(accuracy), distance]
            rows.append([str(cell) for cell in cells])
    return table(["", "questions", "%", "95 % interval", "after training minus this, same questions"], rows)


def by_type_table(result: Mapping[str, Any]) -> str:
    """Return the share of right answers by question type and run, as HTML."""
    names = [name for name in RUNS if name in result["accuracy"]]
    rows = [[kind, *(f"{shares[name]:.0f}" for name in names)] for kind, shares in sorted(result["by_type"].items())]
    return table(["type", *(RUNS[name] for name in names)], rows)


def summary(result: Mapping[str, Any]) -> str:
    """Return the numbers as plain text for the terminal."""
    lines = [verdict(result), ""]
    for name, title in RUNS.items():
        if name in result["accuracy"]:
            accuracy = result["accuracy"][name]
            few = accuracy["num_items"] < result["num_questions"]
            asked = f"  ({accuracy['num_items']} questions)" if few else ""
            lines.append(f"  {title:<50}{accuracy['value']:6.1f} %  {_interval(accuracy)}{asked}")
    return "\n".join(lines)


def _interval(estimate: Mapping[str, Any]) -> str:
    return f"[{estimate['low']:.1f}, {estimate['high']:.1f}]" if estimate["low"] is not None else "[-]"
