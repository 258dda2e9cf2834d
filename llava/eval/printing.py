"""Terminal output of `llava eval`: tables of a report, and the paired difference to another run."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from llava.eval.medvqa.items import ScoredItem, join_answers
from llava.eval.medvqa.report import report_table, type_table
from llava.eval.medvqa.tables import tables_text
from llava.samples import Sample
from llava.utils.json_rows import read_records
from llava.utils.terminal import write_out

ANSWERS = "answers.jsonl"
"""Name of the answer file in the folder of a run."""


def read_items(samples: Sequence[Sample], answers: Path) -> list[ScoredItem]:
    """Return the scored items of an answer file."""
    return join_answers(samples, read_records(answers), source=str(answers))


def print_report(report: Mapping[str, Any], *, out: TextIO | None = None) -> None:
    """Print every table of a report."""
    out = out or sys.stdout
    count, baseline = report["counts"], report["majority"]
    write_out(
        f"\n{count['questions']} questions on {count['images']} images "
        f"({count['open']} open, {count['closed']} closed); "
        f"{count['unparsable']} yes/no answers without a decision, {count['failed']} failed\n"
        f"majority of the {baseline['source']}: closed {baseline['closed']!r}, open {baseline['open']!r}\n",
        out,
    )
    wanted = report["metrics"]
    for name, scores in report["scores"].items():
        shown = {title: row for title, row in scores.items() if not wanted or name != "strict" or title in wanted}
        write_out(f"\n{name}\n{report_table(shown)}\n", out)
    for sentence in report["verdicts"]:
        write_out(f"\n{sentence}", out)
    write_out("\n", out)
    if report["by_type"]:
        write_out(f"\nby question type (strict)\n{type_table(report['by_type'])}\n", out)
    write_out(tables_text(report), out)


def print_comparison(comparison: Mapping[str, Any], *, out: TextIO | None = None) -> None:
    """Print the paired differences to another run on the same questions."""
    out = out or sys.stdout
    write_out(f"\nthis run minus {comparison['name']} (same questions, paired)\n", out)
    for name, row in comparison["scores"].items():
        found = row["difference"]
        write_out(f"  {name:<34}{found['value']:+8.2f}  [{found['low']:+.2f}, {found['high']:+.2f}]\n", out)
