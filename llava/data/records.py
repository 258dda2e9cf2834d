"""Load samples from JSON arrays and JSON lines, plain or gzipped, in the LLaVA-Med layouts.

    file --read_text--> text --rows_of--> (row number, JSON value) --> Sample with its origin (file and row)

One decoded row is held at a time: a file of half a million rows needs memory for its text and samples, not for the
decoded JSON of all rows.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TextIO

from llava.data.quarantine import BadRow, Quarantine
from llava.errors import DataError
from llava.imaging.decode import resolve_image_path
from llava.samples import CONVERSATION_KEYS, Origin, Sample, from_row, num_lost_turns
from llava.utils.jsonl import JSON_ERRORS, READ_ERRORS, open_decompressed, read_text
from llava.utils.lookup import lookup

logger = logging.getLogger(__name__)

_SPACE = " \t\r\n"


def load_samples(
    path: str | Path,
    *,
    image_folder: str | Path | None = None,
    skip_bad: bool = False,
    quarantine: Quarantine | None = None,
    loader: str = "default",
) -> list[Sample]:
    """Return the samples of a data file, in file order.

    Example::

        samples = load_samples("train.json", image_folder="images")

    Args:
        path: path of the data file.
        image_folder: if given, every image that a row names must exist in it (images are not opened).
        skip_bad: skip bad rows with one warning instead of raising.
        quarantine: list that skipped rows are added to.
        loader: layout of the rows, a name in `LOADERS`.

    Raises:
        DataError: the file cannot be read; or a row cannot be used and `skip_bad` is off (the message names file, row
            and id).
        ConfigError: unknown loader.
    """
    read = lookup(LOADERS, loader, "loader")
    samples: list[Sample] = []
    bad: list[BadRow] = []
    num_lost = 0
    for row, value in rows_of(path):
        try:
            sample, lost = _sample(read, value, Origin(str(path), row))
            if image_folder is not None:
                _check_files(sample, image_folder)
        except DataError as error:
            found = BadRow(str(path), row, _id_of(value), str(error))
            if not skip_bad:
                raise DataError(str(found)) from error
            bad.append(found)
        else:
            samples.append(sample)
            num_lost += lost
    if quarantine is not None and skip_bad:
        quarantine.add(bad)
    _log_left_out(path, bad, len(samples), num_lost)
    if not samples:
        raise DataError(f"{path}: no row can be used" + (f"; the first: {bad[0]}" if bad else "; the file is empty"))
    return samples


def _log_left_out(path: str | Path, bad: Sequence[BadRow], num_samples: int, num_lost: int) -> None:
    if bad:
        logger.warning("%s: skipped %d of %d rows; the first: %s", path, len(bad), len(bad) + num_samples, bad[0])
    if num_lost:
        logger.warning("%s: %d rows began with an answer, which was dropped", path, num_lost)


def rows_of(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yield `(row, value)` of a JSON array or JSON lines; the value of a broken line is a `DataError`.

    Rows count from 0; empty lines are not rows.

    Raises:
        DataError: the file cannot be read, or an array is broken (the rows after the error cannot be separated).
    """
    text = read_text(path)
    start = _skip_space(text, 0)
    return _array_rows(text, start, path) if text[start : start + 1] == "[" else _line_rows(text)


def _array_rows(text: str, start: int, path: str | Path) -> Iterator[tuple[int, Any]]:
    decode = json.JSONDecoder().raw_decode
    place, row = _skip_space(text, start + 1), 0
    while text[place : place + 1] != "]":
        try:
            value, place = decode(text, place)
        except JSON_ERRORS as error:
            raise DataError(f"{path}, row {row}: not JSON: {error}") from error
        yield row, value
        row += 1
        place = _skip_space(text, place)
        if text[place : place + 1] == ",":
            place = _skip_space(text, place + 1)
        elif text[place : place + 1] != "]":
            raise DataError(f"{path}, row {row}: expected ',' or ']' after the previous row; is the file truncated?")


def _line_rows(text: str) -> Iterator[tuple[int, Any]]:
    row = start = 0
    while start < len(text):
        stop = text.find("\n", start)
        stop = len(text) if stop < 0 else stop
        line, start = text[start:stop].strip(), stop + 1
        if not line:
            continue
        try:
            yield row, json.loads(line)
        except JSON_ERRORS as error:
            yield row, DataError(f"not JSON: {error}; {EXPECTED}")
        row += 1


def _skip_space(text: str, place: int) -> int:
    while place < len(text) and text[place] in _SPACE:
        place += 1
    return place


def _sample(
    read: Callable[[dict[str, Any], str], tuple[Sample, int]], value: Any, origin: Origin
) -> tuple[Sample, int]:
    if isinstance(value, DataError):
        raise value
    if not isinstance(value, dict):
        raise DataError(f"a row must be a JSON object, got {type(value).__name__}")
    sample, lost = read(value, str(origin.row))
    return replace(sample, origin=origin), lost


def read_default(row: dict[str, Any], default_id: str) -> tuple[Sample, int]:
    """Return the sample of a row of the LLaVA-Med family, and the number of turns that were dropped.

    A row holds either conversations (alignment, instruction tuning, VQA) or a question of the chat evaluation
    (`question_id`, `text`), which becomes one open question. A row without an id gets `default_id`.

    Raises:
        DataError: a field is missing or cannot be used.
    """
    if any(key in row for key in CONVERSATION_KEYS):
        sample = from_row(row, default_id=default_id)
        return sample, num_lost_turns(row, sample)
    if "text" in row:
        identity = row.get("id", row.get("question_id", default_id))
        question = [{"from": "human", "value": row["text"]}]
        return from_row({**row, "id": identity, "conversations": question}), 0
    raise DataError(
        f"the row has no conversation: expected field 'conversations' (or 'text' in a question file), "
        f"got {', '.join(map(repr, row)) or 'no fields'}"
    )


def _check_files(sample: Sample, image_folder: str | Path) -> None:
    for ref in sample.images:
        path = resolve_image_path(ref, image_folder)
        if not path.is_file():
            raise DataError(f"image {path} does not exist")


def _id_of(value: Any) -> str:
    """Return the id of a JSON value for messages; empty if it is not an object with an id."""
    if not isinstance(value, dict):
        return ""
    return str(value.get("id", value.get("question_id", "")))


RowReader = Callable[[dict[str, Any], str], tuple[Sample, int]]
"""From a row and its default id to its sample and the number of dropped turns."""

LOADERS: dict[str, RowReader] = {"default": read_default}


JsonForm = Literal["array", "lines"]

PIECE = 1 << 20
"""Number of characters read at a time."""

MAX_ROW = 1 << 26
"""Largest number of characters of one row; a longer one is treated as a string without its closing quote."""

EDGE = 16
"""An error closer to the end of the text read so far may be a token that continues (`-Infinity`, `\\ud83d`)."""


EXPECTED = "expected a JSON array or one JSON object per line"


def stream_rows(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yield `(row, value)` of a data file; rows count from 0, and empty lines are not rows.

    A value that cannot be read is yielded as a `DataError`. An array, or a damaged gzip file, ends there, because the
    rows after the error cannot be separated; after a broken line the next one is read.

    Raises:
        DataError: the file does not exist or cannot be opened.
    """
    row = 0
    with _open(path) as stream:
        try:
            lead, form = _begin(stream)
            rows = _array(lead, stream) if form == "array" else _lines(lead, stream)
            for value in rows:
                yield row, value
                row += 1
        except READ_ERRORS as error:
            yield row, DataError(f"the file cannot be read from about here on ({error})")


def form_of(path: str | Path) -> JsonForm:
    """Return whether a file is a JSON array or JSON lines; `lines` if it is neither.

    Raises:
        DataError: the file does not exist or cannot be opened.
    """
    with _open(path) as stream:
        try:
            return _begin(stream)[1]
        except READ_ERRORS:
            return "lines"


@contextmanager
def _open(path: str | Path) -> Iterator[TextIO]:
    try:
        with open_decompressed(path) as stream:
            yield io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="\n")
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error.strerror or error}") from None


def _begin(stream: TextIO) -> tuple[str, JsonForm]:
    """Return the first text that is not blank, and the form of the file."""
    while chunk := stream.read(PIECE):
        lead = chunk.lstrip(_SPACE)
        if lead:
            return lead, "array" if lead[0] == "[" else "lines"
    return "", "lines"


def _array(lead: str, stream: TextIO) -> Iterator[Any]:
    """Yield the values of an array; the last one is a `DataError` where it is broken."""
    text, place, passed, first = lead, 1, 0, True
    while True:
        text, place, passed = _skip_blanks(text, place, passed, stream)
        if text[place : place + 1] == "]":
            rest, at, _ = _skip_blanks(text, place + 1, passed, stream)
            if rest[at:]:
                yield DataError("text follows the ']' that ends the array; were two files concatenated?")
            return
        if not first:
            if text[place : place + 1] != ",":
                yield DataError("expected ',' or ']' after the previous row; is the file truncated?")
                return
            text, place, passed = _skip_blanks(text, place + 1, passed, stream)
            if text[place : place + 1] == "]":  # a trailing comma is accepted, as `rows_of` does for training
                continue
        found = _value(text, place, passed, stream)
        if isinstance(found, DataError):
            yield found
            return
        value, text, place, passed = found
        first = False
        yield value


def _skip_blanks(text: str, place: int, passed: int, stream: TextIO) -> tuple[str, int, int]:
    """Return text, place of the next non-blank character (or the end), and characters passed."""
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
            # A number at the end of the text may continue: 0, 0.5, 0e+1.
            if ended or end + 2 < len(text) or not isinstance(value, int | float):
                return value, text, end, passed
        except json.JSONDecodeError as error:
            definite = error.pos + EDGE < len(text) and not error.msg.startswith("Unterminated string")
            if definite or ended or len(text) - place > MAX_ROW:
                return DataError(f"not JSON: {error.msg} (character {passed + error.pos} of the file)")
        except JSON_ERRORS as error:
            return DataError(f"not JSON that can be decoded: {type(error).__name__}")
        more = stream.read(max(PIECE, len(text) - place))  # doubled, which bounds the number of attempts at a long row
        ended = not more
        passed += place
        text, place = text[place:] + more, 0


def _lines(lead: str, stream: TextIO) -> Iterator[Any]:
    """Yield the value of every line that is not empty, or a `DataError` for a line that cannot be read."""
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
    except JSON_ERRORS as error:
        return DataError(f"not JSON that can be decoded: {type(error).__name__}")


def file_text(rows: Iterable[Any], *, lines: bool = False) -> Iterator[bytes]:
    """Yield the bytes of a data file (UTF-8), row by row.

    Raises:
        DataError: a text holds half of a surrogate pair, which JSON can express but UTF-8 cannot; the message names the
            row.
    """
    number = -1
    for number, row in enumerate(rows):
        text = json.dumps(row, ensure_ascii=False)
        before, after = ("", "\n") if lines else (",\n" if number else "[\n", "")
        try:
            yield f"{before}{text}{after}".encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"row {number} holds half of a surrogate pair, which UTF-8 cannot encode; fix the text"
            ) from error
    if not lines:
        yield b"\n]\n" if number >= 0 else b"[]\n"
