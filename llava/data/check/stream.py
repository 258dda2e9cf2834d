"""Rows of a data file of any size, one at a time: JSON arrays and JSON lines, plain or gzipped, told by their content.

    file --pieces of 1 MiB--> text that is not read yet --one value at a time--> (row number, value or what is wrong)

It agrees with `data.records.rows_of`, which training reads with, on every row of a whole file: the same decoder, so
also numbers that other JSON readers refuse. That one holds the file's text; this one holds a row and a piece. Where
that one refuses a file for one byte that is no UTF-8, this one goes on, and the byte becomes a lone surrogate in the
text of its row, which `rows` then reports.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO

from llava.errors import DataError
from llava.utils.jsonl import NOT_JSON
from llava.utils.unzipped import UNREADABLE, open_unzipped

Form = Literal["array", "lines"]

PIECE = 1 << 20
"""Characters read at a time."""

MAX_ROW = 1 << 26
"""Characters of one row; more is taken for a text without its closing quote."""

EDGE = 16
"""A mistake that lies nearer to the end of what was read may be a word that goes on (`-Infinity`, `\\ud83d`)."""

_SPACE = " \t\r\n"

EXPECTED = "expected a JSON array or one JSON object a line"


def stream_rows(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yield `(row, value)` of a data file; rows count from 0, and empty lines are no rows.

    What cannot be read is the `DataError` in the place of its value. An array, or a damaged gzip file, ends there: what
    follows cannot be told apart any more; after a broken line the next one is read.

    Raises:
        DataError: there is no such file, or it may not be read.
    """
    row = 0
    with _open(path) as stream:
        try:
            lead, form = _begin(stream)
            rows = _array(lead, stream) if form == "array" else _lines(lead, stream)
            for value in rows:
                yield row, value
                row += 1
        except UNREADABLE as error:
            yield row, DataError(f"the file cannot be read from about here on ({error})")


def form_of(path: str | Path) -> Form:
    """Say whether a file is a JSON array or JSON lines (also when it is neither).

    Raises:
        DataError: there is no such file, or it may not be read.
    """
    with _open(path) as stream:
        try:
            return _begin(stream)[1]
        except UNREADABLE:
            return "lines"


@contextmanager
def _open(path: str | Path) -> Iterator[TextIO]:
    try:
        with open_unzipped(path) as stream:
            yield io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="\n")
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error.strerror or error}") from None


def _begin(stream: TextIO) -> tuple[str, Form]:
    """Return the first text that is not blank, and what kind of file it begins."""
    while piece := stream.read(PIECE):
        lead = piece.lstrip(_SPACE)
        if lead:
            return lead, "array" if lead[0] == "[" else "lines"
    return "", "lines"


def _array(lead: str, stream: TextIO) -> Iterator[Any]:
    """Yield the values of an array; the last one is a `DataError` where it is broken."""
    text, place, passed, first = lead, 1, 0, True
    while True:
        text, place, passed = _to_word(text, place, passed, stream)
        if text[place : place + 1] == "]":
            rest, at, _ = _to_word(text, place + 1, passed, stream)
            if rest[at:]:
                yield DataError("something follows the ']' that ends the array; is the file two files in one?")
            return
        if not first:
            if text[place : place + 1] != ",":
                yield DataError("expected ',' or ']' after the row before; is the file cut off?")
                return
            text, place, passed = _to_word(text, place + 1, passed, stream)
            if text[place : place + 1] == "]":  # training reads over a comma too many; so does this
                continue
        found = _value(text, place, passed, stream)
        if isinstance(found, DataError):
            yield found
            return
        value, text, place, passed = found
        first = False
        yield value


def _to_word(text: str, place: int, passed: int, stream: TextIO) -> tuple[str, int, int]:
    """Return text, place and number of characters passed, so that the place holds no blank unless the file ends."""
    while True:
        while place < len(text) and text[place] in _SPACE:
            place += 1
        if place < len(text):
            return text, place, passed
        passed += len(text)
        text, place = stream.read(PIECE), 0
        if not text:
            return "", 0, passed


def _value(text: str, place: int, passed: int, stream: TextIO) -> tuple[Any, str, int, int] | DataError:
    """Return the value that begins at `place`, and text, place and characters passed after it."""
    decode = json.JSONDecoder().raw_decode
    ended = False
    while True:
        try:
            value, end = decode(text, place)
            if ended or end + 2 < len(text) or not isinstance(value, int | float):  # a number may go on: 0, 0.5, 0e+1
                return value, text, end, passed
        except json.JSONDecodeError as error:
            definite = error.pos + EDGE < len(text) and not error.msg.startswith("Unterminated string")
            if definite or ended or len(text) - place > MAX_ROW:
                return DataError(f"not JSON: {error.msg} (character {passed + error.pos} of the file)")
        except NOT_JSON as error:
            return DataError(f"not JSON that can be read: {type(error).__name__}")
        more = stream.read(max(PIECE, len(text) - place))  # doubled, so that a long row is not tried too often
        ended = not more
        passed += place
        text, place = text[place:] + more, 0


def _lines(lead: str, stream: TextIO) -> Iterator[Any]:
    """Yield the value of every line that is not empty, or what is wrong with it."""
    while lead:
        lines = lead.split("\n")
        lead = lines.pop()
        for line in filter(str.strip, lines):
            yield _line(line.strip())
        more = stream.read(max(PIECE, len(lead)))
        if not more:
            break
        lead += more
    if lead.strip():
        yield _line(lead.strip())


def _line(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return DataError(f"not JSON: {error.msg} (character {error.pos} of the line); {EXPECTED}")
    except NOT_JSON as error:
        return DataError(f"not JSON that can be read: {type(error).__name__}")
