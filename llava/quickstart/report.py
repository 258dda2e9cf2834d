"""The page of a quickstart: what was done, the numbers with their controls, three answers, curves, how to chat."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from llava.eval.medvqa.items import Item
from llava.eval.medvqa.page import case, choose_examples
from llava.imaging.decode import load as load_image
from llava.quickstart.scoring import CONTROLS, RUNS
from llava.utils.jsonl import write_atomic
from llava.utils.reporting import page, table

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
