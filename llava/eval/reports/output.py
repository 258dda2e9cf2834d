"""Tables on the console, and the files of a scored report file.

main.csv          rows median, ci_l, ci_h; a column per figure (without intervals: a row per figure)
breakdown_p.csv   precision, recall, f1-score, support of each finding, uncertain as positive
breakdown_n.csv   the same, uncertain as negative
per_sample.jsonl  a value of each scorer for each report
metrics.json      everything, in full precision, with provenance
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.eval.reports.score import ReportScores, finite
from llava.utils.jsonl import write_atomic, write_json, write_records
from llava.utils.reporting import text_table

COLUMNS = ("precision", "recall", "f1-score", "support")

MODES = {"p": "uncertain as positive", "n": "uncertain as negative"}


def write_results(folder: str | Path, scores: ReportScores, provenance: Mapping[str, Any]) -> None:
    """Write the result files of a scored file into a folder, which is created."""
    folder = Path(folder)
    write_atomic(folder / "main.csv", main_csv(scores))
    for mode in MODES:
        write_atomic(folder / f"breakdown_{mode}.csv", breakdown_csv(scores, mode))
    write_records(folder / "per_sample.jsonl", finite(scores.per_report))
    write_json(folder / "metrics.json", metrics_json(scores, provenance))


def metrics_json(scores: ReportScores, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return all results as JSON values; figures that do not exist are null."""
    content: dict[str, Any] = finite(
        {"num_reports": scores.num_reports, "metrics": scores.metrics, "scorers": scores.scorers, **scores.extras}
    )
    return {**content, "provenance": dict(provenance)}


def main_csv(scores: ReportScores) -> str:
    """Return the main table as CSV in full precision."""
    if not scores.has_intervals:
        return _csv(["", "value"], [[name, facts["value"]] for name, facts in scores.metrics.items()])
    rows = [[key, *(facts[key] for facts in scores.metrics.values())] for key in ("median", "ci_l", "ci_h")]
    return _csv(["", *scores.metrics], rows)


def breakdown_csv(scores: ReportScores, mode: str) -> str:
    """Return precision, recall, F1 and support of each finding as CSV; only the header without labels."""
    table = scores.extras.get("breakdown", {}).get(mode, {})
    return _csv(["", *COLUMNS], [[name, *(row[column] for column in COLUMNS)] for name, row in table.items()])


def _csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return stream.getvalue()


def console_text(scores: ReportScores) -> str:
    """Return the tables that are printed."""
    parts = [f"Total reports: {scores.num_reports}", "", _main_table(scores)]
    if skipped := {name: facts["reason"] for name, facts in scores.scorers.items() if facts["status"] == "skipped"}:
        parts += ["", *(f"skipped {name}: {reason}" for name, reason in skipped.items())]
    if "breakdown" in scores.extras:
        tables = scores.extras["breakdown"]
        for mode, words in MODES.items():
            parts += ["", f"Findings, {words} ({tables['source']})", _breakdown_table(tables[mode])]
    if "four_way" in scores.extras:
        four_way = scores.extras["four_way"]
        shown = ["Four-way F1: no labels"] if four_way is None else [f"Four-way F1 ({four_way['source']})"]
        parts += ["", *shown, *([] if four_way is None else [_four_way(four_way["table"])])]
    parts += ["", _strata_table(scores), "", facts_text(scores.extras["texts"])]
    return "\n".join(parts) + "\n"


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"


def _main_table(scores: ReportScores) -> str:
    baseline = scores.extras["baseline"]["metrics"]
    headers = ["metric", "value", "95 % interval", "clustered", "commonest sentence", "source"]
    rows = []
    for name, facts in scores.metrics.items():
        clustered = facts["clustered"]
        interval = f"{_number(facts['ci_l'])} to {_number(facts['ci_h'])}" if scores.has_intervals else "-"
        grouped = f"{_number(clustered['ci_l'])} to {_number(clustered['ci_h'])}" if clustered else "-"
        rows.append([name, _number(facts["value"]), interval, grouped, _number(baseline.get(name)), facts["source"]])
    return text_table(headers, rows)


def _breakdown_table(table: Mapping[str, Mapping[str, float]]) -> str:
    rows = [
        [name, *(_number(row[key]) for key in COLUMNS[:-1]), f"{row['support']:.0f}"] for name, row in table.items()
    ]
    return text_table(["finding", *COLUMNS], rows)


def _four_way(table: Mapping[str, Mapping[str, float | None]]) -> str:
    columns = list(next(iter(table.values())))
    return text_table(
        ["finding", *columns], [[name, *(_number(row[c]) for c in columns)] for name, row in table.items()]
    )


def _strata_table(scores: ReportScores) -> str:
    strata = scores.extras["strata"]
    if not strata:
        return "normal and abnormal reports: no labels"
    counts = [f"{name} ({facts['num_reports']})" for name, facts in strata.items()]
    names = list(scores.metrics)
    rows = [[name, *(_number(facts["metrics"][name]) for facts in strata.values())] for name in names]
    return text_table(["metric by reference", *counts], rows)


def facts_text(facts: Mapping[str, Any]) -> str:
    """Return the facts about the texts in two lines."""
    ratio = "-" if facts["length_ratio"] is None else f"{facts['length_ratio']:.2f}"
    prior = facts["prior_words"]
    return (
        f"distinct predictions {facts['distinct_predictions']:.1%}, commonest prediction "
        f"{facts['commonest_prediction']:.1%}, empty {facts['empty_predictions']}; length ratio {ratio}\n"
        f"comparisons with a prior: {prior['prediction']:.1%} of predictions, {prior['reference']:.1%} of references; "
        f"swapped sides in {facts['swapped_sides']} reports"
    )
