"""Reader of tables: CSV, TSV, JSON and JSON lines (plain or gzipped) and Parquet, detected by content.

    file --first bytes--> kind --> (file and row number, {column: value}), one row at a time

Rows are numbered from 0 after the header. A row that cannot be read is yielded as a `DataError` instead of its values,
so the caller can stop or skip it. A file that cannot be read any further raises.
"""

from __future__ import annotations

import csv
import datetime
import io
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava.data.shards import PARQUET_MAGIC, parquet_columns, parquet_rows
from llava.errors import DataError
from llava.samples import Origin
from llava.utils.file_kinds import expected_utf8, wide_encoding
from llava.utils.json_rows import read_rows
from llava.utils.jsonl import READ_ERRORS, open_decompressed

Row = dict[str, Any]

MISSING_WORDS = frozenset({"", "null", "none", "nan", "n/a", "na"})
"""Words that mark an empty cell, in lower case."""

OTHER_DELIMITERS = (";", "|")
"""Delimiters that need --delimiter; Excel writes the first one in many countries."""

COLUMN_NAME = re.compile(r"[A-Za-z_][A-Za-z_0-9-]{0,40}")
"""Column name that may appear in messages; any other could be a cell of a table without a header."""

SPREADSHEET = "in Excel, save the table as 'CSV UTF-8'"


def table_kind(path: str | Path) -> str:
    """Return the format of a file: csv, json (an array or lines) or parquet.

    Raises:
        DataError: the file cannot be opened or unzipped.
    """
    try:
        with open_decompressed(path) as stream:
            head = stream.read(4096)
    except READ_ERRORS as error:
        raise DataError(f"{path}: cannot be opened or unzipped ({error})") from error
    if head.startswith(PARQUET_MAGIC):
        return "parquet"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    return "json" if text[:1] in (b"[", b"{") else "csv"


def read_table(
    path: str | Path, *, columns: Sequence[str] = (), delimiter: str | None = None
) -> Iterator[tuple[Origin, Row | DataError]]:
    """Yield the rows of a table, each with its origin.

    Args:
        path: the file.
        columns: required columns.
        delimiter: cell delimiter of a text table; None means a tab if the header has one, else a comma.

    Raises:
        DataError: the file cannot be read or lacks a column; the message names the file and its columns.
    """
    kind = table_kind(path)
    rows: Iterator[tuple[int, Row | DataError]]
    if kind == "parquet":
        require_columns(columns, parquet_columns(path), path)
        rows = parquet_rows(path)
    else:
        rows = json_rows(path, columns) if kind == "json" else _text_rows(path, columns, delimiter)
    for number, row in rows:
        yield Origin(str(path), number), row


def column_names(path: str | Path, *, delimiter: str | None = None) -> list[str]:
    """Return the column names of a table; for a JSON file, the keys of its first row.

    Raises:
        DataError: the file cannot be read or is empty.
    """
    kind = table_kind(path)
    if kind == "parquet":
        return parquet_columns(path)
    if kind == "json":
        first = next((row for _, row in json_rows(path) if isinstance(row, dict)), None)
        if first is None:
            raise DataError(f"{path}: the file has no readable row")
        return list(first)
    with _text(path) as stream:
        return _header(stream, path, delimiter)[0]


def cell_text(row: Row, column: str | None) -> str:
    """Return a cell as stripped text; empty if it is missing, NaN, or a word for that (`NULL`)."""
    value = row.get(column) if column else None
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of integers with gaps has 40.0 for 40
    text = " ".join(str(item) for item in value) if isinstance(value, list | tuple) else str(value)
    text = text.strip()
    return "" if text.lower() in MISSING_WORDS else text


def answer_cell(row: Row, column: str) -> str:
    """Return an answer as text; empty only if missing or blank, as `None` and `NA` are valid answers."""
    value = row.get(column)
    if value is None or isinstance(value, bool) or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value).strip()


def to_json_value(value: Any) -> Any:
    """Return a value as JSON data: NaN and infinities become None, dates and times ISO text.

    Raises:
        DataError: the type has no JSON form, for example bytes.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, list | tuple):
        return [to_json_value(item) for item in value]
    if isinstance(value, dict):
        return {str(name): to_json_value(item) for name, item in value.items()}
    raise DataError(f"a value of type {type(value).__name__} cannot be written as JSON")


def require_columns(columns: Iterable[str], found: Iterable[str], path: str | Path) -> None:
    """Check that a table has the required columns.

    Raises:
        DataError: a column is missing.
    """
    present = list(found)
    missing = [column for column in columns if column not in present]
    if not missing:
        return
    # Without a header line the first row is taken for one, and its cells may be text about a patient.
    shown = [repr(name) for name in present if COLUMN_NAME.fullmatch(name)]
    if len(shown) < len(present):
        shown.append(f"{len(present) - len(shown)} that do not look like column names (is the header line missing?)")
    raise DataError(f"{path}: no column {', '.join(map(repr, missing))}; it has {', '.join(shown)}")


@contextmanager
def _text(path: str | Path) -> Iterator[io.TextIOWrapper]:
    """Open a text table.

    Raises:
        DataError: the encoding is not UTF-8; the message says how to convert it.
    """
    with open_decompressed(path) as stream:
        head = stream.read(256)
        stream.seek(0)
        if name := wide_encoding(head):
            raise DataError(f"{path}: the file is {name}; {expected_utf8(name)}; {SPREADSHEET}")
        if b"\0" in head:
            raise DataError(f"{path}: the file is not text; expected a table. {SPREADSHEET.capitalize()}")
        yield io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")


def _header(stream: io.TextIOWrapper, path: str | Path, delimiter: str | None) -> tuple[list[str], str]:
    """Return the column names and the delimiter, and leave the stream after the header."""
    try:
        first = stream.readline()
        separator = delimiter or ("\t" if "\t" in first else ",")
        names = next(csv.reader([first], delimiter=separator, strict=True), [])
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: the header cannot be read ({error}); {expected_utf8()}; {SPREADSHEET}") from error
    except (csv.Error, *READ_ERRORS) as error:
        raise DataError(f"{path}: the header cannot be read ({error})") from error
    names = [name.strip() for name in names]
    repeated = sorted({name for name in names if names.count(name) > 1 and name})
    if not any(names) or repeated:
        what = f"repeats columns: {', '.join(repeated)}" if repeated else "is empty"
        raise DataError(f"{path}: the header {what}; expected one line of distinct column names")
    other = next((other for other in OTHER_DELIMITERS if other in names[0]), None)
    if delimiter is None and len(names) == 1 and other is not None:
        raise DataError(
            f"{path}: the header is one column, {names[0]!r}. If the delimiter is {other!r}, pass "
            f"--delimiter '{other}', or save the table with commas"
        )
    return names, separator


def _text_rows(
    path: str | Path, columns: Sequence[str], delimiter: str | None
) -> Iterator[tuple[int, Row | DataError]]:
    with _text(path) as stream:
        names, separator = _header(stream, path, delimiter)
        require_columns(columns, names, path)
        reader = csv.reader(stream, delimiter=separator, strict=True)
        row = 0
        while True:
            before = reader.line_num
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                where = f"lines {before + 2} to {reader.line_num + 1}"
                if "unexpected end" in str(error):  # all rows after the open quote are in one cell
                    raise DataError(f"{path}, row {row}, {where}: a quote is opened and not closed") from error
                yield row, DataError(f"not a valid row of a text table ({error}; {where})")
                row += 1
                continue
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, row {row}: the rest cannot be read ({error}); {expected_utf8()}; {SPREADSHEET}"
                ) from error
            except READ_ERRORS as error:
                raise DataError(f"{path}, row {row}: the rest cannot be read ({error})") from error
            if not cells:
                continue
            if len(cells) == len(names):
                yield row, dict(zip(names, cells, strict=True))
            else:
                yield (
                    row,
                    DataError(f"{len(cells)} cells, but the header has {len(names)}; check quotes and delimiters"),
                )
            row += 1


def json_rows(path: str | Path, columns: Sequence[str] = ()) -> Iterator[tuple[int, Row | DataError]]:
    """Yield the numbers and rows of a JSON array or of JSON lines, plain or gzipped.

    Raises:
        DataError: the file cannot be read, or is a broken array.
    """
    for row, value in read_rows(path):
        if isinstance(value, DataError):
            yield row, value
        elif not isinstance(value, dict):
            yield row, DataError(f"expected an object with fields, got {type(value).__name__}")
        elif missing := [column for column in columns if column not in value]:
            yield row, DataError(f"no field {', '.join(map(repr, missing))}; it has {', '.join(map(repr, value))}")
        else:
            yield row, value
