"""F1 of the 14 findings from predicted and reference labels: figures, breakdown and four-way table.

Labels are integers [n, 14] in the order of `FINDINGS`: 1, 0, -1 (uncertain), and `BLANK` for not mentioned. Names with
`+` count uncertain as positive, names without as negative.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llava.eval.reports.figures import Array, ReportFigure, f1_of_counts
from llava.report_labels.findings import FINDINGS, FIVE_FINDINGS, NO_FINDING, Label

BLANK = -9

LabelArray = NDArray[np.int8]

RULE_TAG = "[rule]"

FIVE = [FINDINGS.index(name) for name in FIVE_FINDINGS]
FOURTEEN = list(range(len(FINDINGS)))

KINDS = {"positive": 1, "negation": 0, "uncertain": -1, "blank": BLANK}
"""Values of the four classes of the four-way table."""


@dataclass(frozen=True)
class LabelPair:
    """Labels of predictions and references, [n, 14] each, and where they came from."""

    predictions: LabelArray
    references: LabelArray
    source: str


def label_array(rows: Iterable[Mapping[str, Label]]) -> LabelArray:
    """Return labels of reports as an array, [n, 14]; findings that a row lacks are not mentioned."""
    values = [[BLANK if row.get(name) is None else int(row[name] or 0) for name in FINDINGS] for row in rows]
    return np.array(values, dtype=np.int8).reshape(len(values), len(FINDINGS))


def is_positive(labels: LabelArray, *, with_uncertain: bool) -> NDArray[np.bool_]:
    """Return which labels count as positive."""
    return np.asarray((labels == 1) | (labels == -1) if with_uncertain else labels == 1)


def count_stats(pair: LabelPair, *, with_uncertain: bool) -> Array:
    """Return true positives, false positives and false negatives of each report and finding, [n, 42]."""
    found = is_positive(pair.predictions, with_uncertain=with_uncertain)
    asked = is_positive(pair.references, with_uncertain=with_uncertain)
    return np.concatenate([found & asked, found & ~asked, ~found & asked], axis=1).astype(np.float64)


def label_figures(pair: LabelPair, *, tag: str = "") -> list[ReportFigure]:
    """Return the eight F1 figures in the published order; `tag` is appended to the names."""
    figures = []
    for mark in ("", "+"):
        stats = count_stats(pair, with_uncertain=mark == "+")
        for average, combine in (("Micro", _micro), ("Macro", _macro)):
            for columns in (FOURTEEN, FIVE):
                name = f"{average}-F1-{len(columns)}{mark}{tag}"
                figures.append(ReportFigure(name, stats, partial(combine, columns=columns), source=pair.source))
    return figures


def _counts(sums: Array, columns: Sequence[int]) -> tuple[Array, Array, Array]:
    num = len(FINDINGS)
    true, false, missed = (sums[..., [part * num + column for column in columns]] for part in range(3))
    return true, false, missed


def _micro(sums: Array, *, columns: Sequence[int]) -> Array:
    return f1_of_counts(*(part.sum(axis=-1) for part in _counts(sums, columns)))


def _macro(sums: Array, *, columns: Sequence[int]) -> Array:
    result: Array = f1_of_counts(*_counts(sums, columns)).mean(axis=-1)
    return result


def breakdown(pair: LabelPair, *, with_uncertain: bool) -> dict[str, dict[str, float]]:
    """Return precision, recall, F1 and support by finding (sorted), then the micro and macro averages."""
    sums = count_stats(pair, with_uncertain=with_uncertain).sum(axis=0)
    true, false, missed = _counts(sums, FOURTEEN)
    rows = {name: _scores(true[i], false[i], missed[i]) for i, name in enumerate(FINDINGS)}
    table = {name: rows[name] for name in sorted(rows)}
    table["micro avg"] = _scores(true.sum(), false.sum(), missed.sum())
    keys = ("precision", "recall", "f1-score")
    macro = {key: float(np.mean([row[key] for row in rows.values()])) for key in keys}
    table["macro avg"] = {**macro, "support": table["micro avg"]["support"]}
    return table


def _scores(true: float, false: float, missed: float) -> dict[str, float]:
    found, asked = true + false, true + missed
    return {
        "precision": float(true / found) if found else 0.0,
        "recall": float(true / asked) if asked else 0.0,
        "f1-score": float(f1_of_counts(np.array(true), np.array(false), np.array(missed))),
        "support": float(asked),
    }


def report_f1(pair: LabelPair) -> list[float]:
    """Return the F1 of positive labels of each report; 1 where neither side has a positive label."""
    sums = count_stats(pair, with_uncertain=False)
    true, false, missed = (sums[:, part * 14 : (part + 1) * 14].sum(axis=1) for part in range(3))
    values = f1_of_counts(true, false, missed)
    values[true + false + missed == 0] = 1.0
    return [float(value) for value in values]


def four_way_table(pair: LabelPair) -> dict[str, dict[str, float | None]]:
    """Return the paper's F1 of four-way labels by finding, and their averages.

    Columns are the F1 of positive, negation, uncertain, blank and mention, the mean of the first three weighted by the
    shares of these classes among the reference labels, and Cohen's kappa of the four classes. `No Finding` has neither
    negation nor uncertain labels; averages skip it there, and that of uncertain labels also skips `Support Devices`.
    """
    table: dict[str, dict[str, float | None]] = {}
    for index, name in enumerate(FINDINGS):
        found, asked = pair.predictions[:, index], pair.references[:, index]
        row: dict[str, float | None] = {kind: _f1(found == value, asked == value) for kind, value in KINDS.items()}
        row["mention"] = _f1(found != BLANK, asked != BLANK)
        if name == NO_FINDING:
            row["negation"] = row["uncertain"] = None
        shares = {kind: float((asked == KINDS[kind]).sum()) for kind in ("positive", "negation", "uncertain")}
        total = sum(shares.values())
        weighted = sum(share * (row[kind] or 0.0) for kind, share in shares.items())
        row["weighted"] = weighted / total if total else None
        row["kappa"] = _kappa(found, asked)
        table[name] = row
    columns = list(next(iter(table.values())))
    rows = list(table.values())
    # As published, the average of uncertain labels skips the last two findings.
    chosen = {column: rows[:-2] if column == "uncertain" else rows for column in columns}
    table["average"] = {column: _mean([row[column] for row in part]) for column, part in chosen.items()}
    return table


def _f1(found: NDArray[np.bool_], asked: NDArray[np.bool_]) -> float:
    true = np.array(float((found & asked).sum()))
    return float(f1_of_counts(true, np.array(float((found & ~asked).sum())), np.array(float((~found & asked).sum()))))


def _kappa(found: LabelArray, asked: LabelArray) -> float | None:
    """Return Cohen's kappa; None where both sides have one class only."""
    chance = sum(float((found == value).mean() * (asked == value).mean()) for value in KINDS.values())
    return None if chance >= 1.0 else float(((found == asked).mean() - chance) / (1.0 - chance))


def _mean(values: Sequence[float | None]) -> float | None:
    given = [value for value in values if value is not None]
    return float(np.mean(given)) if given else None


def label_json(labels: LabelArray) -> list[dict[str, Any]]:
    """Return labels as JSON objects by finding."""
    return [
        {name: None if value == BLANK else int(value) for name, value in zip(FINDINGS, row, strict=True)}
        for row in labels
    ]
