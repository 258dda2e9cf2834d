"""Data files to samples: JSON arrays and JSON lines, plain or gzipped, in the layouts of the LLaVA-Med family.

    file --read_text--> text --rows_of--> (row number, JSON value) --Sample, with file and row remembered

One decoded row is held at a time, so a file of half a million rows costs its text and its samples, not its tree.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava.data.quarantine import BadRow, Quarantine
from llava.errors import DataError
from llava.imaging.decode import resolve
from llava.samples import CONVERSATION_KEYS, Origin, Sample, from_row, num_lost_turns
from llava.utils.jsonl import NOT_JSON, read_text
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
