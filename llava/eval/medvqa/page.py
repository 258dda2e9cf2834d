"""HTML page of an evaluation: figures, a plot by question type, and answers with their images.

The page makes no requests. It contains questions, answers and images of the data, so the rules of the data apply to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

from llava.eval.intervals import interval_text, percent_text
from llava.eval.medvqa import tables
from llava.eval.medvqa.items import ScoredItem
from llava.scoring.metrics import closed_hit
from llava.scoring.strict import strict_form
from llava.utils.jsonl import write_atomic
from llava.utils.reporting import OpenImage, fact_lines, html_thumbnail, render_page

LEGACY = "legacy"
"""Begin of the names of the published sets of scores."""

RIGHT, WRONG, CHANGED = "right", "wrong", "changed by the gray image"
NUM_FILTERS = 14
"""Number of filters that the stylesheet has rules for."""

COLUMNS = ("n", "%", "95 % interval", "blank image", "from the image", "interval", "majority", "above majority")
NOT_RUN = "not run"

TERMS = (
    ("n", "number of questions that the score applies to"),
    ("95 % interval", "resampled by image: questions about one image are drawn together"),
    ("blank image", "the same score when every image is replaced by a gray square"),
    ("from the image", "score minus that on the gray image, on the same questions; near 0: the image is not used"),
    ("majority", "the score of always giving the most frequent answer"),
    ("above majority", "score minus that of the most frequent answer, with its interval"),
    ("minus control, difference", "on the same questions, which are resampled together"),
    ("right, wrong", "by the strict rules; an open answer is right if it equals the reference"),
    ("changed by the gray image", "the answer on the gray image has other words"),
)
"""Legend of the page."""


def write_page(
    path: str | Path,
    *,
    title: str,
    report: Mapping[str, Any],
    items: Sequence[ScoredItem],
    blank: Sequence[ScoredItem] | None = None,
    open_image: OpenImage | None = None,
    num_examples: int = 500,
    note: str = "",
    other: tuple[str, Sequence[ScoredItem]] | None = None,
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
        other: name and answers of another run on the same questions, shown beside these.
    """
    counts = ", ".join(f"{name} {number}" for name, number in report["counts"].items())
    shown = choose_examples(items, blank, num_examples)
    kinds = _kinds([items[index] for index in shown], blank is not None)
    cases = [
        case_html(
            items[index],
            None if blank is None else blank[index],
            open_image,
            kinds,
            None if other is None else (other[0], other[1][index]),
        )
        for index in shown
    ]
    sets = [(name, score_table(scores.items())) for name, scores in report["scores"].items()]
    by = report.get("by")
    text = render_page(
        "evaluation.html",
        title=title,
        note=note,
        counts=counts,
        has_control=blank is not None,
        verdicts=report.get("verdicts", ()),
        scores=[one for one in sets if not one[0].startswith(LEGACY)],
        legacy=[one for one in sets if one[0].startswith(LEGACY)],
        terms=TERMS,
        controls=[(name, tables.control_rows(table)) for name, table in report.get("controls", {}).items()],
        comparison=_comparison(report.get("comparison")),
        by={"field": by["field"], "rows": tables.field_rows(by["rows"])} if by else None,
        types=score_table((_type_name(row), row) for row in report["by_type"]),
        bars=[bar(row) for row in report["by_type"]],
        parts=_filters(kinds, cases),
        cases=cases,
        num_left=len(items) - len(cases),
        provenance=fact_lines(report.get("provenance", {})),
    )
    write_atomic(path, text)


def score_table(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, list[Any]]:
    """Return the columns of named scores and their cells, without uninformative columns."""
    cells = score_rows(rows)
    used = [name for place, name in enumerate(COLUMNS, 1) if any(row[place] not in ("-", NOT_RUN) for row in cells)]
    kept = [True, *(name in used for name in COLUMNS)]
    return {"columns": used, "cells": [list(compress(row, kept)) for row in cells]}


def score_rows(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> list[list[str]]:
    """Return the cells of named scores: the score, the control, the gain from the image, the majority."""
    cells = []
    for name, row in rows:
        answered, gain, above = row["answered"], row.get("from_picture"), row.get("above_majority")
        cells.append(
            [
                name,
                str(answered["num_items"]),
                percent_text(answered["value"]),
                interval_text(answered),
                percent_text(row["blank"]["value"]) if "blank" in row else NOT_RUN,
                percent_text(gain["value"], signed=True) if gain else "-",
                interval_text(gain) if gain else "-",
                percent_text(row.get("majority")),
                f"{percent_text(above['value'], signed=True)} {interval_text(above)}" if above else "-",
            ]
        )
    return cells


def _comparison(comparison: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the other run's name and the rows of both: n, this run, the other one, the paired difference."""
    if comparison is None:
        return None
    return {"name": comparison["name"], "rows": tables.control_rows(comparison["scores"])}


def bar(row: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the bar of one question type: name, score, interval and score on a gray image, in percent."""
    answered = row["answered"]
    return {
        "name": f"{_type_name(row)} (n={answered['num_items']})",
        **{side: _percent(answered[side]) for side in ("value", "low", "high")},
        "blank": _percent(row["blank"]["value"]) if "blank" in row else None,
    }


def _type_name(row: Mapping[str, Any]) -> str:
    return f"{row['type']}, {row['score']}"


def _percent(value: float | None) -> str:
    return f"{min(max(value or 0.0, 0.0), 100.0):.1f}"


def choose_examples(items: Sequence[ScoredItem], blank: Sequence[ScoredItem] | None, num_examples: int) -> list[int]:
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


def is_right(item: ScoredItem) -> bool:
    """Return whether an answer is right by the strict rules (open answers by equality)."""
    return closed_hit(item) == 1.0


def _filters(kinds: Sequence[str], cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return id, name and number of answers of each filter."""
    return [
        {"id": f"f{number}", "name": name, "count": sum(f"f{number}" in one["classes"].split() for one in cases)}
        for number, name in enumerate(kinds)
    ]


def _kinds(items: Sequence[ScoredItem], has_blank: bool) -> list[str]:
    """Return the names of the filters, for each of which the stylesheet has a rule."""
    types = Counter(name for item in items for name in item.types)
    first = [RIGHT, WRONG, *([CHANGED] if has_blank else [])]
    return [*first, *(name for name, _ in types.most_common(NUM_FILTERS - len(first)))]


def case_html(
    item: ScoredItem,
    blank: ScoredItem | None,
    open_image: OpenImage | None,
    kinds: Sequence[str] = (),
    other: tuple[str, ScoredItem] | None = None,
) -> dict[str, Any]:
    """Return an answer with its image for the template macro `answer`; `kinds` are the page's filters."""
    own = {RIGHT if is_right(item) else WRONG, *item.types}
    if blank is not None and strict_form(blank.prediction) != strict_form(item.prediction):
        own.add(CHANGED)
    theirs = None if other is None else {"name": other[0], "answer": _shown(other[1]), "right": is_right(other[1])}
    return {
        "classes": " ".join(f"f{number}" for number, name in enumerate(kinds) if name in own),
        "other": theirs,
        "image": html_thumbnail(item.image, open_image),
        "question": item.question,
        "reference": item.reference,
        "answer": _shown(item),
        "right": is_right(item),
        "blank": None if blank is None else blank.prediction,
        "label": f"{item.question_id}, {'closed' if item.closed else 'open'} {' '.join(item.types)}",
    }


def _shown(item: ScoredItem) -> str:
    return "(failed)" if item.failed else item.prediction
