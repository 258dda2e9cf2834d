"""A cleaned copy of a data file: rows that break a rule with `drops` are left out, the others are put in form.

    file --without dropped rows--> samples.from_row --> samples.to_row --> copy in the same form (array or lines)

The first of repeated rows stays. What a person must judge (look-alikes, text that looks like identifiers) stays too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava.data.check.findings import FILE
from llava.data.check.report import Report
from llava.data.check.row_index import view
from llava.data.check.rows import view_row
from llava.data.check.rules import RULES
from llava.data.check.stream import form_of, stream_rows
from llava.data.row_file import file_text
from llava.errors import DataError
from llava.samples import to_row
from llava.utils.jsonl import open_atomic


@dataclass(frozen=True, slots=True)
class Fixed:
    """What `write_fixed` did: rows written, rows left out, and how many of those broke each rule (or several)."""

    path: Path
    num_kept: int
    num_dropped: int
    by_rule: dict[str, int]


def write_fixed(report: Report, path: Path) -> Fixed:
    """Write the cleaned copy of the checked file.

    Raises:
        DataError: the file has not as many rows as it had when it was checked.
    """
    source, dropped, by_rule = report.scans[FILE].path, _dropped(report), {}
    for rule, file in report.findings.rules():
        if file == FILE and RULES[rule].drops:
            by_rule[rule] = report.num_rows_of(rule, FILE)
    with open_atomic(path) as stream:
        stream.writelines(file_text(_kept(source, dropped), lines=form_of(source) == "lines"))
    num_dropped = int(dropped.sum())
    return Fixed(path, len(dropped) - num_dropped, num_dropped, by_rule)


def _kept(source: Path, dropped: np.ndarray[Any, np.dtype[np.bool_]]) -> Iterator[Any]:
    """Yield the rows that stay, as they should be written."""
    row = -1
    for row, value in stream_rows(source):
        if row < len(dropped) and not dropped[row]:
            yield _cleaned(value, row)
    if row + 1 != len(dropped):
        raise DataError(f"{source} changed while it was checked; no copy was written, check it again")


def _dropped(report: Report) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Say for every row of the file whether the copy goes without it."""
    dropped = np.zeros(report.scans[FILE].ledger.num_rows, dtype=np.bool_)
    for rule, file in report.findings.rules():
        if file == FILE and RULES[rule].drops:
            dropped[view(report.findings.of(rule, FILE).rows)] = True
    return dropped


def _cleaned(value: Any, row: int) -> Any:
    """Return a row as it should be written; rows of question files have no such form and stay as they are."""
    seen = view_row(value, row)
    return value if seen.sample is None or seen.is_question else to_row(seen.sample)
