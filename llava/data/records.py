"""Data files to samples: JSON arrays and JSON lines, plain or gzipped, in the layouts of the LLaVA-Med family.

    file --read_text--> text --rows_of--> (row number, JSON value) --Sample, with file and row remembered

One decoded row is held at a time, so a file of half a million rows costs its text and its samples, not its tree.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TextIO

from llava.data.quarantine import BadRow, Quarantine
from llava.errors import DataError
from llava.imaging.decode import resolve
from llava.samples import CONVERSATION_KEYS, Origin, Sample, from_row, num_lost_turns
from llava.utils.jsonl import NOT_JSON, UNREADABLE, open_unzipped, read_text
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

    Args:
        path: the file.
        image_folder: when given, every image a row names must be a file in it (it is not opened).
        skip_bad: leave bad rows out, with one message, instead of raising.
        quarantine: where rows that were left out are listed.
        loader: name in `LOADERS` of the layout.

    Raises:
        DataError: the file cannot be read; or a row cannot be used and `skip_bad` is off: names file, row and id.
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
    if bad:
        logger.warning("%s: skipped %d of %d rows; the first: %s", path, len(bad), len(bad) + len(samples), bad[0])
    if num_lost:
        logger.warning("%s: %d rows began with an answer, which was left out", path, num_lost)
    if not samples:
        raise DataError(f"{path}: no row can be used" + (f"; the first: {bad[0]}" if bad else ", the file is empty"))
    return samples


def rows_of(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yield `(row, value)` of a JSON array or of JSON lines; a line that is not JSON yields a `DataError` as its value.

    Rows count from 0; empty lines are not rows.

    Raises:
        DataError: the file cannot be read, or an array is broken (what follows cannot be told apart any more).
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
        except NOT_JSON as error:
            raise DataError(f"{path}, row {row}: not JSON: {error}") from error
        yield row, value
        row += 1
        place = _skip_space(text, place)
        if text[place : place + 1] == ",":
            place = _skip_space(text, place + 1)
        elif text[place : place + 1] != "]":
            raise DataError(f"{path}, row {row}: expected ',' or ']' after the row before; is the file cut off?")


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
        except NOT_JSON as error:
            yield row, DataError(f"not JSON: {error}; expected a JSON array or one JSON object a line")
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
    """Return a sample and how many turns it lost, from any row of the family:

    conversations (alignment, instruction tuning, VQA: one question a row) or a question file of the chat evaluation
    (`question_id`, `text`), whose row becomes one open question. A row without an id is called by its number.

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
        path = resolve(ref, image_folder)
        if not path.is_file():
            raise DataError(f"image {path} does not exist")


def _id_of(value: Any) -> str:
    """The id of a row that may be anything, for messages."""
    if not isinstance(value, dict):
        return ""
    return str(value.get("id", value.get("question_id", "")))


Loader = Callable[[dict[str, Any], str], tuple[Sample, int]]
"""Row and the id it has if it names none, to its sample and the number of turns that were left out."""

LOADERS: dict[str, Loader] = {"default": read_default}


Form = Literal["array", "lines"]

PIECE = 1 << 20
"""Characters read at a time."""

MAX_ROW = 1 << 26
"""Characters of one row; more is taken for a text without its closing quote."""

EDGE = 16
"""A mistake that lies nearer to the end of what was read may be a word that goes on (`-Infinity`, `\\ud83d`)."""


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


def file_text(rows: Iterable[Any], *, lines: bool = False) -> Iterator[bytes]:
    """Yield a data file piece by piece, as its rows come, in UTF-8.

    Raises:
        DataError: a text holds half of a surrogate pair, which JSON can write and no file hold; says which row.
    """
    number = -1
    for number, row in enumerate(rows):
        text = json.dumps(row, ensure_ascii=False)
        before, after = ("", "\n") if lines else (",\n" if number else "[\n", "")
        try:
            yield f"{before}{text}{after}".encode()
        except UnicodeEncodeError as error:
            raise DataError(f"row {number} holds half of a surrogate pair, which no file can hold; mend it") from error
    if not lines:
        yield b"\n]\n" if number >= 0 else b"[]\n"
