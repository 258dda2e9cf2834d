"""Unusable rows: an error by default, or skipped, counted and listed in a quarantine file.

    load_samples --Quarantine--> check_trainable --Quarantine--> training
    stream --rows left out of each step--> GrowingQuarantine

The file has one JSON object per line: `file`, `row` (counted from 0), `id`, `reason`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from llava.errors import DataError
from llava.samples import Origin, Preference, Sample, sample_label
from llava.utils.json_rows import read_records, read_rows
from llava.utils.jsonl import append_record, drop_incomplete_line, records_text, write_atomic, write_records

logger = logging.getLogger(__name__)

T = TypeVar("T")

NUM_SHOWN = 5
"""Number of bad rows that an error message lists."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """Row that cannot be used; `row` counts from 0 and is -1 for a sample that was not read from a file."""

    file: str
    row: int
    id: str
    reason: str

    def __str__(self) -> str:
        place = f"{self.file}, row {self.row}, " if self.row >= 0 else ""
        return f"{place}id {self.id!r}: {self.reason}"


class Quarantine:
    """List of skipped rows, rewritten as a whole so that a second run does not duplicate entries.

    Args:
        path: file to write; None only counts.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.rows: list[BadRow] = []

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, rows: Sequence[BadRow]) -> None:
        """Add rows and rewrite the file, unless it lists them already; without rows an empty file is written."""
        self.rows += rows
        if self.path is None:
            return
        text = records_text(asdict(row) for row in self.rows)
        if not self.path.is_file() or self.path.read_bytes() != text.encode():
            write_atomic(self.path, text)


class GrowingQuarantine:
    """List of rows that a stream skips during training, each listed once.

    Args:
        path: file to write.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._known: set[tuple[str, int]] = set()

    def begin(self) -> None:
        """Start an empty list; a list of an earlier run is overwritten."""
        self._known.clear()
        write_records(self.path, ())

    def resume(self) -> None:
        """Continue the list of a resumed run, which may already contain rows that the run reads again.

        Raises:
            DataError: the file is not a quarantine list.
        """
        drop_incomplete_line(self.path)
        if self.path.exists():
            self._known = {(row.get("file", ""), row.get("row", -1)) for row in read_records(self.path)}

    def add(self, rows: Iterable[BadRow]) -> None:
        """Append the rows that are not listed yet."""
        for row in rows:
            if (row.file, row.row) not in self._known:
                self._known.add((row.file, row.row))
                append_record(self.path, asdict(row))


def read_usable(
    path: str | Path,
    read: Callable[[Any, Origin], T],
    *,
    skip_bad: bool = False,
    quarantine: Quarantine | None = None,
) -> list[T]:
    """Return the results of `read` for the rows of a file, in file order.

    Args:
        path: JSON array or JSON lines, plain or gzipped.
        read: function of a row's value and origin; raises `DataError` for a row that cannot be used.
        skip_bad: skip bad rows with one warning instead of raising.
        quarantine: list that skipped rows are added to.

    Raises:
        DataError: the file cannot be read, holds no usable row, or has a bad row and `skip_bad` is off; the message
            names file and row.
    """
    found: list[T] = []
    bad: list[BadRow] = []
    for row, value in read_rows(path):
        origin = Origin(str(path), row)
        try:
            if isinstance(value, DataError):
                raise value
            found.append(read(value, origin))
        except DataError as error:
            if not skip_bad:
                raise DataError(f"{origin}: {error}") from error
            bad.append(BadRow(str(path), row, "", str(error)))
    if bad:
        logger.warning("%s: skipped %d of %d rows; the first: %s", path, len(bad), len(bad) + len(found), bad[0])
    if quarantine is not None and skip_bad:
        quarantine.add(bad)
    if not found:
        raise DataError(f"{path}: no row can be used" + (f"; the first: {bad[0]}" if bad else "; the file is empty"))
    return found


def bad_rows_message(bad: Sequence[BadRow], num_rows: int) -> str:
    """Return the message that lists the first bad rows and names the flag that skips them."""
    lines = [f"{len(bad)} of {num_rows} rows cannot be used; fix them, or skip them with --skip-bad True:"]
    lines += [f"  {row}" for row in bad[:NUM_SHOWN]]
    if len(bad) > NUM_SHOWN:
        lines.append(f"  ... and {len(bad) - NUM_SHOWN} more")
    return "\n".join(lines)


def bad_row(sample: Sample | Preference, reason: str) -> BadRow:
    """Return the quarantine line of a sample."""
    file, row = ("", -1) if sample.origin is None else sample.origin
    # The entry has separate fields for file and row, so the reason does not repeat them.
    return BadRow(file, row, sample.id, reason.removeprefix(f"{sample_label(sample)}: "))
