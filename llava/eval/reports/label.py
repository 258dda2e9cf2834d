"""`llava reports label`: write the rule labels of a file of reports.

FILE --rows--> text --label_report--> {"id", "labels", "evidence"}, one line per report; with --csv also a table
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llava.eval.reports.rows import TEXT_KEYS, identity, input_file, read_rows, report_text
from llava.report_labels.findings import FINDINGS, ReportLabels
from llava.report_labels.labeler import label_report
from llava.utils.cli import Parser
from llava.utils.files import refuse_overwriting
from llava.utils.jsonl import write_atomic, write_records

ReportId = str | int


def label_rows(path: str | Path, *, text_key: str | None = None) -> Iterable[tuple[ReportId, ReportLabels]]:
    """Yield id and labels of each report of a file; a report without id has its row number as id.

    Args:
        path: the file, or `-`.
        text_key: field with the text; None takes the first of `TEXT_KEYS` that a row has.

    Raises:
        DataError: the file cannot be read or a row has no text.
    """
    keys = TEXT_KEYS if text_key is None else (text_key,)
    with input_file(path) as file:
        for origin, row in read_rows(file):
            yield _report_id(row.get("id"), origin.row), label_report(report_text(row, keys, origin))


def _report_id(given: Any, row: int) -> ReportId:
    """Return the given id of a row, so that results can be joined with it; without one, its number."""
    if isinstance(given, int) and not isinstance(given, bool):
        return given
    return identity(given) or row


def labels_csv(rows: Iterable[tuple[ReportId, ReportLabels]]) -> str:
    """Return a table with a column per finding in the convention of CheXpert: 1.0, 0.0, -1.0 or empty."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["id", *FINDINGS])
    for name, found in rows:
        values = (found.labels[finding] for finding in FINDINGS)
        writer.writerow([name, *("" if value is None else f"{value:.1f}" for value in values)])
    return stream.getvalue()


def main(argv: Sequence[str] | None = None) -> None:
    """Run `llava reports label`."""
    parser = Parser(
        prog="llava reports label",
        description="Label chest X-ray reports with 14 findings by rules (rule labels; not CheXbert).",
    )
    parser.add_argument("file", metavar="FILE", help="reports: JSON lines, JSON array, CSV or Parquet; - for stdin")
    parser.add_argument("--out", required=True, type=Path, help="JSON lines with labels and evidence, one per report")
    parser.add_argument("--text-key", help=f"field with the text; default: the first of {', '.join(TEXT_KEYS)}")
    parser.add_switch("--csv", help="also write the labels as a table, beside --out with the suffix .csv")
    args = parser.parse_args(argv)
    table = args.out.with_suffix(".csv") if args.csv else None
    refuse_overwriting([args.file], {"out": args.out, "csv": table})
    rows = list(label_rows(args.file, text_key=args.text_key))
    write_records(args.out, (_json_row(name, found) for name, found in rows))
    if table is not None:
        write_atomic(table, labels_csv(rows))
    counts = ", ".join(f"{name} {number}" for name, number in _num_positive(rows))
    sys.stdout.write(f"Total reports: {len(rows)}\npositive rule labels: {counts or 'none'}\n")


def _json_row(name: ReportId, found: ReportLabels) -> dict[str, Any]:
    return {"id": name, **found.to_json()}


def _num_positive(rows: Sequence[tuple[ReportId, ReportLabels]]) -> list[tuple[str, int]]:
    counts = [(finding, sum(found.labels[finding] == 1 for _, found in rows)) for finding in FINDINGS]
    return [(finding, number) for finding, number in counts if number]
