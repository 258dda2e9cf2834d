"""Reading of rows from JSON arrays and JSON lines, plain or gzipped, detected by content.

    file --iter_rows--> (row, JSON value or DataError), one row in memory at a time

All rows of JSON files are read here. A row that cannot be used is a `DataError` in place of its value, so the caller
can stop, skip or count it; after a `BrokenFileError` no further row can be separated.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO, cast

from llava.errors import BrokenFileError, DataError, NotUnicodeError
from llava.utils.file_kinds import HEAD, expected_utf8, other_kind
from llava.utils.jsonl import READ_ERRORS, is_unicode, open_decompressed

Record = dict[str, Any]
JsonForm = Literal["array", "lines"]

PIECE = 1 << 20
"""Number of characters read at a time."""

MAX_ROW = 1 << 26
"""Largest number of characters of one row; a longer one is an error, such as a string without its closing quote."""

MAX_DEPTH = 100
"""Levels of nesting of one row; rows of data have about 5, and Python ends at about 1,000 levels."""

EDGE = 16
"""An error closer to the end of the text read so far may be a token that continues (`-Infinity`, `\\ud83d`)."""

EXPECTED = "expected a JSON array or one JSON object per line"
_TOO_DEEP = f"nested more than {MAX_DEPTH} levels deep"
_BLANKS = re.compile(r"[ \t\r\n]*")
_MARKS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)
_DECODE = json.JSONDecoder().raw_decode


def iter_rows(path: str | Path, *, start: int = 0, lines: bool = False) -> Iterator[tuple[int, Any]]:
    """Yield `(row, value)` of a JSON array or JSON lines; rows count from 0, and empty lines are not rows.

    A value that cannot be used is yielded as a `DataError`: a line that is not JSON, text that is not Unicode, deep
    nesting. Where an array is broken, text follows it, or a file is damaged, the last value is a `BrokenFileError`.

    Args:
        path: the file.
        start: first row to yield; earlier lines are not decoded.
        lines: read JSON lines, even if the first one is an array.

    Raises:
        DataError: the file does not exist or cannot be opened.
    """
    row = 0
    with _open(path) as stream:
        try:
            if kind := other_kind(path, _head(stream)):
                raise BrokenFileError(f"the file is {kind}; {EXPECTED}")
            text = _Text(stream)
            is_array = text.peek() == "[" and not lines
            values = _array_values(text) if is_array else _line_values(text, start)
            for value in values:
                if row >= start:
                    yield row, value
                row += 1
        except BrokenFileError as error:
            yield row, error
        except READ_ERRORS as error:
            yield row, BrokenFileError(f"the file cannot be read from about here on ({error})")


def read_rows(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a file as `iter_rows` does, but raise for a broken file.

    Raises:
        DataError: the file cannot be opened or is broken; names file and row.
    """
    for row, value in iter_rows(path):
        if isinstance(value, BrokenFileError):
            raise BrokenFileError(f"{path}, row {row}: {value}") from value
        yield row, value


def read_records(path: str | Path) -> Iterator[Record]:
    """Yield the records of a file, which must all be usable.

    Raises:
        DataError: the file cannot be read, or a row is no object that can be used; names file and row.
    """
    for row, value in iter_rows(path):
        if isinstance(value, DataError):
            raise DataError(f"{path}, row {row}: {value}") from value
        if not isinstance(value, dict):
            raise DataError(f"{path}, row {row}: expected an object, got {type(value).__name__}")
        yield value


def iter_lists(path: str | Path) -> Iterator[tuple[str, int, Any]]:
    """Yield `(name, index, value)` of the lists in an object `{name: [value, ...]}`; skip other fields.

    Raises:
        DataError: the file cannot be opened, or is broken.
    """
    with _open(path) as stream:
        text = _Text(stream)
        try:
            text.peek()
            for _ in _parts(text, "}"):
                name = text.value()
                if not isinstance(name, str) or text.peek() != ":":
                    raise BrokenFileError("not JSON: expected a name and ':' in an object")
                text.place += 1
                if text.peek() != "[":
                    text.value()
                    continue
                for index in _parts(text, "]"):
                    yield name, index, text.value()
        except BrokenFileError as error:
            raise BrokenFileError(f"{path}: {error}") from error
        except READ_ERRORS as error:
            raise BrokenFileError(f"{path}: the file cannot be read from about here on ({error})") from error


def form_of(path: str | Path) -> JsonForm:
    """Return whether a file is a JSON array or JSON lines; `lines` if it is neither.

    Raises:
        DataError: the file does not exist or cannot be opened.
    """
    with _open(path) as stream:
        try:
            return "array" if _Text(stream).peek() == "[" else "lines"
        except READ_ERRORS:
            return "lines"


@contextmanager
def _open(path: str | Path) -> Iterator[TextIO]:
    """Open a file as text.

    Bytes that are not UTF-8 become lone surrogates, which spoil their row only.
    """
    try:
        with open_decompressed(path) as stream:
            yield io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="\n")
    except FileNotFoundError:
        raise DataError(f"{path} cannot be opened: no such file") from None
    except IsADirectoryError:
        expected = f"expected a file of rows, such as {Path(path) / 'train.json'}"
        raise DataError(f"{path} cannot be opened: it is a folder; {expected}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error.strerror or error}") from None


def _head(stream: TextIO) -> bytes:
    """Return the first bytes below a text stream that was not read yet."""
    return cast(io.BufferedReader, cast(io.TextIOWrapper, stream).buffer).peek(HEAD)[:HEAD]


class _Text:
    """Text of a stream: the chunk in memory, the position in it, and the number of earlier characters."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.piece = ""
        self.place = self.passed = 0
        self.ended = False

    def more(self) -> bool:
        """Drop the text before the place and read more; return whether there was any."""
        self.passed += self.place
        self.piece = self.piece[self.place :]
        self.place = 0
        # Doubling the piece bounds the number of attempts at a long row.
        added = "" if self.ended else self.stream.read(max(PIECE, len(self.piece)))
        self.piece += added
        self.ended = not added
        return not self.ended

    def peek(self) -> str:
        """Skip blanks and return the next character; empty at the end."""
        while True:
            self.place = cast(re.Match[str], _BLANKS.match(self.piece, self.place)).end()
            if self.place < len(self.piece):
                return self.piece[self.place]
            if not self.more():
                return ""

    def line(self) -> str:
        """Return the text up to the end of the line.

        Raises:
            BrokenFileError: it is too long.
        """
        while (stop := self.piece.find("\n", self.place)) < 0:
            if len(self.piece) - self.place > MAX_ROW:
                raise BrokenFileError(f"a line has more than {MAX_ROW} characters; {EXPECTED}")
            if not self.more():
                stop = len(self.piece)
                break
        found, self.place = self.piece[self.place : stop], stop
        return found

    def value(self) -> Any:
        """Return the JSON value that begins here, or the `DataError` of a value that cannot be used.

        Raises:
            BrokenFileError: its end cannot be found.
        """
        while True:
            piece, place = self.piece, self.place
            try:
                value, end = _DECODE(piece, place)
                # A number at the end of the piece may continue: 0, 0.5, 0e+1.
                if self.ended or end + 2 < len(piece) or not isinstance(value, int | float):
                    self.place = end
                    return _checked(value, piece[place:end])
            except json.JSONDecodeError as error:
                definite = error.pos + EDGE < len(piece) and not error.msg.startswith("Unterminated string")
                if definite or self.ended:
                    where = f"character {self.passed + error.pos} of the file"
                    raise BrokenFileError(f"not JSON: {error.msg} ({where})") from error
            except RecursionError as error:
                if end := _end_of_nested(piece, place):
                    self.place = end
                    return DataError(_TOO_DEEP)
                if self.ended:
                    raise BrokenFileError(f"not JSON that can be decoded: {_TOO_DEEP}") from error
            except ValueError as error:
                raise BrokenFileError("not JSON that can be decoded: a number has too many digits") from error
            if len(self.piece) - place > MAX_ROW:
                raise BrokenFileError(f"not JSON: a row has more than {MAX_ROW} characters; is a quote not closed?")
            self.more()


def _end_of_nested(text: str, place: int) -> int:
    """Return the end of the array or object that begins at a place; 0 if the text ends before it."""
    depth = 0
    for mark in _MARKS.finditer(text, place):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(mark[0], 0)
        if depth == 0:
            return mark.end()
    return 0


def _parts(text: _Text, end: str) -> Iterator[int]:
    """Yield the number of each part of an array or object, whose text the caller passes, up to its end.

    Raises:
        BrokenFileError: neither a comma nor the end mark follows a part.
    """
    text.place += 1
    number = 0
    while text.peek() != end:
        yield number
        number += 1
        mark = text.peek()
        if mark == ",":  # also before the end: a trailing comma is accepted
            text.place += 1
        elif mark != end:
            raise BrokenFileError(f"expected ',' or '{end}' after the previous row; is the file truncated?")
    text.place += 1


def _array_values(text: _Text) -> Iterator[Any]:
    """Yield the values of an array.

    Raises:
        BrokenFileError: the array is broken, or text follows it.
    """
    after = "without rows"
    for row in _parts(text, "]"):
        yield text.value()
        after = f"after row {row}"
    if text.peek():
        raise BrokenFileError(f"text follows the ']' that ends the array ({after}); were two files concatenated?")


def _line_values(text: _Text, start: int) -> Iterator[Any]:
    """Yield the value of every line that is not empty; None for lines before `start`.

    Raises:
        BrokenFileError: a line is too long.
    """
    row = 0
    while text.peek():
        if line := text.line().strip().removeprefix("\ufeff"):  # files with a byte order mark may be concatenated
            yield decode_row(line) if row >= start else None
            row += 1


def decode_row(text: str) -> Any:
    """Return the value of one JSON text, or the `DataError` of a text that cannot be used."""
    try:
        return _checked(json.loads(text), text)
    except json.JSONDecodeError as error:
        return DataError(f"not JSON: {error.msg} (character {error.pos} of the line); {EXPECTED}")
    except RecursionError:
        return DataError(_TOO_DEEP)
    except ValueError:
        return DataError("not JSON that can be decoded: a number has too many digits")


def _checked(value: Any, text: str) -> Any:
    """Return the decoded value of a text, or the `DataError` of a value that cannot be used."""
    # Few texts can hold halves of surrogate pairs or deep nesting; only those are searched.
    is_suspect = "\\ud" in text or "\\uD" in text or text.count("[") + text.count("{") > MAX_DEPTH
    return (value_problem(value) if is_suspect or not is_unicode(text) else None) or value


def value_problem(value: Any) -> DataError | None:
    """Return the error of a value with text that is not Unicode, or with deep nesting; None without one."""
    parts: list[tuple[Any, str, int]] = [(value, "", 0)]
    while parts:
        part, where, depth = parts.pop()
        if isinstance(part, str) and not is_unicode(part):
            return _not_unicode(f"field {where}" if where else "the text")
        if depth >= MAX_DEPTH and isinstance(part, list | dict):
            return DataError(_TOO_DEEP)
        if isinstance(part, list):
            parts += [(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(part)][::-1]
        elif isinstance(part, dict):
            if not all(map(is_unicode, part)):
                return _not_unicode(f"a name in field {where}" if where else "the name of a field")
            parts += [(item, f"{where}.{name}" if where else name, depth + 1) for name, item in part.items()][::-1]
    return None


def _not_unicode(what: str) -> NotUnicodeError:
    return NotUnicodeError(
        f"{what} is not Unicode text: it holds half of a surrogate pair (as where an emoji was cut) or bytes that are "
        f"not UTF-8; {expected_utf8()}"
    )
