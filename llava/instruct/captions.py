"""Files of figure captions, in the order in which they are worked on: one row of each domain in turn.

    {"chest_xray": [a, b], "mri": [c]}  -->  a, c, b

A JSON array or JSON lines of caption rows keep their order.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from llava.errors import DataError
from llava.instruct.prompts import context_text
from llava.utils.jsonl import read_records, read_text

logger = logging.getLogger(__name__)

Row = dict[str, Any]


def read_captions(path: str | Path, *, max_size: int | None = None, skip_bad: bool = False) -> list[Row]:
    """Return the caption rows of a file, each `pair_id` once.

    Args:
        path: the file, told apart by its content.
        max_size: the first so many.
        skip_bad: leave rows out that cannot be used, with one message, instead of raising.

    Raises:
        DataError: the file cannot be read, or a row cannot be used; names file, domain and row.
    """
    rows: dict[str, Row] = {}
    num_bad = num_repeated = 0
    for where, row in _placed_rows(path):
        if max_size is not None and len(rows) >= max_size:
            break
        try:
            identity = _check(row)
        except DataError as error:
            if not skip_bad:
                raise DataError(f"{path}, {where}: {error}; --skip-bad leaves such rows out") from None
            num_bad += 1
            continue
        num_repeated += identity in rows
        rows.setdefault(identity, row)
    if num_bad or num_repeated:
        logger.warning("%s: left out %d rows that cannot be used and %d repeated ones", path, num_bad, num_repeated)
    if not rows:
        raise DataError(f"{path}: no caption row can be used")
    return list(rows.values())


def _check(row: Any) -> str:
    """Return the row's id; raise what is wrong with it."""
    if not isinstance(row, Mapping):
        raise DataError(f"a row must be a JSON object, got {type(row).__name__}")
    identity = row.get("pair_id")
    if not isinstance(identity, str) or not identity:
        raise DataError("field 'pair_id' must be a text that is not empty")
    context_text(row, use_inline_mentions=True)
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        raise DataError("the row holds half a surrogate pair, or is nested too deeply, and cannot be written") from None
    return identity


def _placed_rows(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Yield every row with its place in words."""
    text = read_text(path)
    domains = _domains(text, path)
    if domains is None:
        for index, record in enumerate(read_records(path)):
            yield f"row {index}", record
        return
    del text
    columns = [[(f"{domain!r}, row {index}", row) for index, row in enumerate(rows)] for domain, rows in domains]
    yield from (cell for line in zip_longest(*columns) for cell in line if cell is not None)


def _domains(text: str, path: str | Path) -> Iterable[tuple[str, list[Any]]] | None:
    """Return the lists of a JSON object of lists; None when the text is something else."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None  # one object a line; the reader of lines says what is wrong with it otherwise
    if "pair_id" in value:
        return None
    wrong = [name for name, rows in value.items() if not isinstance(rows, list)]
    if wrong:
        raise DataError(f"{path}: expected an object of lists, one for each domain; {wrong[0]!r} is not a list")
    return list(value.items())
