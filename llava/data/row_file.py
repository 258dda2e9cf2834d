"""The text of data files: an array with one row a line, or JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from llava.errors import DataError


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
