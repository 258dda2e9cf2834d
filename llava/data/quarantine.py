"""Rows that cannot be used: an error by default, or skipped, counted and listed in a file.

    load_samples --Quarantine--> check_trainable --Quarantine--> training
    stream --rows left out of each step--> GrowingQuarantine

The file has one JSON object a line: `file`, `row` (counted from 0), `id`, `reason`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from llava.samples import Sample, name_of
from llava.utils.jsonl import append, drop_torn_line, read_records, write_records

NUM_SHOWN = 5
"""Bad rows that an error message spells out."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """One row that cannot be used; `row` counts from 0, -1 where the sample came from no file."""

    file: str
    row: int
    id: str
    reason: str

    def __str__(self) -> str:
        place = f"{self.file}, row {self.row}, " if self.row >= 0 else ""
        return f"{place}id {self.id!r}: {self.reason}"


class Quarantine:
    """The list of skipped rows, kept in memory and written as a whole, so that a second run does not double it.

    Args:
        path: file to write, or None to count only.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.rows: list[BadRow] = []

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, rows: Sequence[BadRow]) -> None:
        """Add rows and rewrite the file; a file is written (empty) even when there are none."""
        self.rows += rows
        if self.path is not None:
            write_records(self.path, (asdict(row) for row in self.rows))


class GrowingQuarantine:
    """The list of rows that a stream leaves out while training goes on: each once, however often it comes again.

    Args:
        path: file to write.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._known: set[tuple[str, int]] = set()

    def begin(self) -> None:
        """Start an empty list; that of an earlier run is gone."""
        self._known.clear()
        write_records(self.path, ())

    def go_on(self) -> None:
        """Go on with the list of a run that is resumed; it may know rows that the run meets again.

        Raises:
            DataError: the file is no such list.
        """
        drop_torn_line(self.path)
        if self.path.exists():
            self._known = {(row.get("file", ""), row.get("row", -1)) for row in read_records(self.path)}

    def add(self, rows: Iterable[BadRow]) -> None:
        """Write the rows that are new."""
        for row in rows:
            if (row.file, row.row) not in self._known:
                self._known.add((row.file, row.row))
                append(self.path, asdict(row))


def report(bad: Sequence[BadRow], num_rows: int) -> str:
    """Return the message that names the first bad rows and says how to go on without them."""
    lines = [f"{len(bad)} of {num_rows} rows cannot be used; correct them, or leave them out with --skip_bad True:"]
    lines += [f"  {row}" for row in bad[:NUM_SHOWN]]
    if len(bad) > NUM_SHOWN:
        lines.append(f"  ... and {len(bad) - NUM_SHOWN} more")
    return "\n".join(lines)


def bad_row(sample: Sample, reason: str) -> BadRow:
    """Return the quarantine line of a sample."""
    file, row = ("", -1) if sample.origin is None else sample.origin
    # The line has its own fields for the place; a reason that begins with it again is hard to read.
    return BadRow(file, row, sample.id, reason.removeprefix(f"{name_of(sample)}: "))
