"""Rows of report files: JSON lines, a JSON array, CSV or Parquet, plain or gzipped, or standard input.

    FILE or `-` --read_table--> rows --> texts, or pairs of prediction and reference

Messages name file and row and never repeat the text of a report.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.data.converters.tables import Row, read_table
from llava.errors import DataError
from llava.samples import Origin
from llava.utils.jsonl import READ_ERRORS, open_decompressed

STDIN = "-"
"""Name that stands for standard input."""

PREDICTION_KEYS = ("prediction", "candidate")

TEXT_KEYS = ("text", "findings", "prediction")
"""Fields with the text of a report, in the order in which they are looked for."""


@dataclass(frozen=True, slots=True)
class ReportPair:
    """Predicted report with its reference.

    Attributes:
        index: row number from 0.
        prediction: predicted text, possibly empty.
        reference: reference text, possibly empty.
        id: identity of the report; empty if the row has none.
        image: name of the image; empty if the row has none.
        meta: other fields of the row.
    """

    index: int
    prediction: str
    reference: str
    id: str = ""
    image: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


@contextmanager
def input_file(path: str | Path) -> Iterator[Path]:
    """Yield the path of an input; standard input is copied to a temporary file.

    Raises:
        DataError: the input cannot be read; standard input is named `<stdin>`.
    """
    if str(path) != STDIN:
        yield Path(path)
        return
    with tempfile.NamedTemporaryFile(prefix="llava-stdin-") as copy:
        copy.write(sys.stdin.buffer.read())
        copy.flush()
        try:
            yield Path(copy.name)
        except DataError as error:
            raise DataError(str(error).replace(copy.name, "<stdin>")) from None


def read_rows(path: str | Path) -> Iterator[tuple[Origin, Row]]:
    """Yield the rows of a file with their origins.

    Raises:
        DataError: the file or a row cannot be read, or the file has no rows.
    """
    found = False
    for origin, row in () if _is_blank(path) else read_table(path, delimiter=_delimiter(path)):
        if isinstance(row, DataError):
            raise DataError(f"{origin}: {row}")
        found = True
        yield origin, row
    if not found:
        raise DataError(f"{path}: the file has no rows; expected one report per row")


def _is_blank(path: str | Path) -> bool:
    return _start(path) == b""


def _delimiter(path: str | Path) -> str | None:
    """Return the semicolon, which Excel writes in many locales, if a table uses it; None for other files."""
    header = (_start(path) or b"").partition(b"\n")[0]
    return ";" if b";" in header and not any(mark in header for mark in (b",", b"\t")) else None


def _start(path: str | Path) -> bytes | None:
    """Return the first bytes of a file without white space around them; None if it cannot be read."""
    try:
        with open_decompressed(path) as stream:
            return bytes(stream.read(4096).strip())
    except READ_ERRORS:
        return None  # the table reader reports the reason


def report_text(row: Row, keys: Sequence[str], origin: Origin) -> str:
    """Return the text of the first of several fields that a row has.

    Raises:
        DataError: the row has none of the fields, or its value is not text.
    """
    key = next((key for key in keys if key in row), None)
    expected = " or ".join(map(repr, keys))
    if key is None:
        raise DataError(f"{origin}: no field {expected}; it has {_names(row)}. Every row needs one, possibly empty")
    value = row[key]
    if isinstance(value, str) and value.strip().lower() != "nan":
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        kind = "null" if value is None else "NaN"
    elif isinstance(value, str):
        kind = "the text 'nan', which tables have for a missing value"
    else:
        kind = type(value).__name__
    raise DataError(f"{origin}: field {key!r} is {kind}; expected text (an empty report is an empty text)")


def _names(row: Row) -> str:
    return ", ".join(repr(str(name)[:40]) for name in row) or "no fields"


def read_pairs(path: str | Path) -> list[ReportPair]:
    """Return the pairs of prediction and reference of a file, in order.

    Raises:
        DataError: the file cannot be read, has no rows, or a row lacks a text; names file and row.
    """
    pairs: list[ReportPair] = []
    with input_file(path) as file:
        for origin, row in read_rows(file):
            prediction = report_text(row, PREDICTION_KEYS, origin)
            reference = report_text(row, ("reference",), origin)
            meta = {key: value for key, value in row.items() if key not in {*PREDICTION_KEYS, "reference", "id"}}
            image = row.get("image")
            pairs.append(
                ReportPair(
                    len(pairs),
                    prediction,
                    reference,
                    identity(row.get("id")),
                    image if isinstance(image, str) else "",
                    meta,
                )
            )
    return pairs


def identity(value: Any) -> str:
    """Return an id as text; empty for a missing one."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value)
