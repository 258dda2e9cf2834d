"""HTML page of an evaluation: figures, a plot by question type, and answers with their images.

The page makes no requests. It contains questions, answers and images of the data, so the rules of the data apply to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from llava.eval.intervals import figure, interval
from llava.eval.medvqa.items import Item
from llava.eval.medvqa.metrics import closed_hit
from llava.utils.jsonl import write_atomic
from llava.utils.reporting import OpenImage, page, table, thumbnail


def write_page(
    path: str | Path,
    *,
    title: str,
    report: Mapping[str, Any],
    items: Sequence[Item],
    blank: Sequence[Item] | None = None,
    open_image: OpenImage | None = None,
    num_examples: int = 12,
    note: str = "",
) -> None:
    """Write the page of one evaluation.

    Args:
        path: the page.
        title: its heading.
        report: the result of `medvqa.report.full_report`, with `provenance`.
        items: the answered questions.
        blank: the same questions on a gray image, in the same order.
        open_image: returns the image of a name; with None, the page shows no images.
        num_examples: number of answers to show.
        note: a sentence under the heading, such as a description of the data.
    """
    parts = [f"<h1>{escape(title)}</h1>"]
    if note:
        parts.append(f'<p class="note">{escape(note)}</p>')
    parts.append(_counts(report["counts"]))
    parts += [f"<p>{escape(sentence)}</p>" for sentence in report.get("verdicts", ())]
    for name, scores in report["scores"].items():
        parts += [f"<h2>{escape(name)}</h2>", score_table(scores)]
    if report["by_type"]:
        parts += ["<h2>By question type</h2>", type_plot(report["by_type"]), type_table(report["by_type"])]
    parts.append("<h2>Examples</h2>")
    for index in choose_examples(items, blank, num_examples):
        parts.append(case(items[index], None if blank is None else blank[index], open_image))
    parts += ["<h2>Provenance</h2>", _facts(report.get("provenance", {}))]
    write_atomic(path, page(title, parts))


def score_table(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the HTML table of one set of scores with control and majority."""
    return _compared([(name, row) for name, row in scores.items()], "score")


def type_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the HTML table of scores by question type, with their gain from the image."""
    return _compared([(f"{row['type']}, {row['score']}", row) for row in rows], "type, score")


def _compared(rows: Sequence[tuple[str, Mapping[str, Any]]], first: str) -> str:
    headers = [
        first,
        "n",
        "%",
        "95 % interval",
        "blank image",
        "from the image",
        "interval",
        "majority",
        "above majority",
    ]
    cells = []
    for name, row in rows:
        answered, gain, above = row["answered"], row.get("from_picture"), row.get("above_majority")
        cells.append(
            [
                name,
                str(answered["num_items"]),
                figure(answered["value"]),
                interval(answered),
                figure(row["blank"]["value"]) if "blank" in row else "not run",
                figure(gain["value"], signed=True) if gain else "-",
                interval(gain) if gain else "-",
                figure(row.get("majority")),
                f"{figure(above['value'], signed=True)} {interval(above)}" if above else "-",
            ]
        )
    return table(headers, cells)


def type_plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return bars by question type as SVG: the score, its interval, and the score on a gray image."""
    height, left, width = 30, 230, 560
    bars = []
    for place, row in enumerate(rows):
        top = place * height
        answered = row["answered"]
        name = escape(f"{row['type']}, {row['score']} (n={answered['num_items']})")
        bars.append(f'<text x="{left - 8}" y="{top + 18}" text-anchor="end">{name}</text>')
        bars.append(_bar(left, top + 4, width * _share(answered["value"]), 11, "#0969da"))
        low, high = (left + width * _share(answered[side]) for side in ("low", "high"))
        bars.append(f'<path d="M{low:.1f} {top + 9.5}H{high:.1f}" stroke="#1b1f24"/>')
        if "blank" in row:
            bars.append(_bar(left, top + 15, width * _share(row["blank"]["value"]), 9, "#8c959f"))
    legend = '<p class="note">Blue: with the image (line: 95 % interval). Gray: the same questions, gray image.</p>'
    size = f'width="{left + width + 20}" height="{len(rows) * height + 4}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size}>{"".join(bars)}</svg>{legend}'


def _bar(x: float, y: float, width: float, height: float, color: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width:.1f}" height="{height}" fill="{color}"/>'


def _share(percent: float | None) -> float:
    return 0.0 if percent is None else min(max(percent / 100.0, 0.0), 1.0)


def choose_examples(items: Sequence[Item], blank: Sequence[Item] | None, num_examples: int) -> list[int]:
    """Return indices of examples, in turn: failed, right only with the image, wrong, and right answers.

    Images repeat only when all images of a group have been shown.
    """
    groups: dict[str, list[int]] = {"failed": [], "helped": [], "wrong": [], "right": []}
    for index, item in enumerate(items):
        right = is_right(item)
        if item.failed:
            groups["failed"].append(index)
        elif right and blank is not None and not is_right(blank[index]):
            groups["helped"].append(index)
        else:
            groups["right" if right else "wrong"].append(index)
    queues = [group for group in groups.values() if group]
    chosen: list[int] = []
    while queues and len(chosen) < num_examples:
        group = queues.pop(0)
        shown = {items[index].image for index in chosen}
        unseen = [index for index in group if items[index].image not in shown]
        chosen.append((unseen or group)[0])
        group.remove(chosen[-1])
        if group:
            queues.append(group)
    return chosen


def is_right(item: Item) -> bool:
    """Return whether an answer is right by the strict rules (open answers by equality)."""
    return closed_hit(item) == 1.0


def case(item: Item, blank: Item | None, open_image: OpenImage | None) -> str:
    """Return the HTML of one answer with its image."""
    verdict = ("right", "right") if is_right(item) else ("wrong", "wrong")
    answer = "(failed)" if item.failed else item.prediction
    pairs = [
        ("question", escape(item.question)),
        ("reference", escape(item.reference)),
        ("answer", f'{escape(answer)} <b class="{verdict[0]}">{verdict[1]}</b>'),
    ]
    if blank is not None:
        pairs.append(("on a gray image", escape(blank.prediction)))
    pairs.append(
        ("id, type", escape(f"{item.question_id}, {'closed' if item.closed else 'open'} {' '.join(item.types)}"))
    )
    facts = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in pairs)
    return f'<div class="case">{thumbnail(item.image, open_image)}<dl>{facts}</dl></div>'


def _counts(counts: Mapping[str, int]) -> str:
    text = ", ".join(f"{name} {number}" for name, number in counts.items())
    return f"<p>{escape(text)}</p>"


def _facts(provenance: Mapping[str, Any]) -> str:
    return table(["name", "value"], [[name, str(value)] for name, value in provenance.items()])
