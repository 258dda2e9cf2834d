"""Rows of files that do not fit in memory, one after the other: JSON lines, Parquet, WebDataset tar shards.

    shard --rows_in(shard, start)--> StreamRow (JSON object, its pictures' bytes), StreamRow, ...

What a shard is, is decided by its first bytes. Rows of one shard are numbered from 0, so that a reader can be told to
begin at any row: lines and tar members before it are passed over, not parsed.

- JSON lines, plain or gzipped: one object a line; pictures are files.
- Parquet: one row an object; a column of `{"bytes", "path"}` (an `Image` of the datasets library) is a picture.
- tar (WebDataset): see `tar_rows`.
"""

from __future__ import annotations

import glob
import lzma
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llava.data.stream_row import Numbered, StreamRow, row_of
from llava.data.tar_rows import tar_rows
from llava.errors import DataError
from llava.utils.lookup import require
from llava.utils.unzipped import UNREADABLE, open_unzipped

PARQUET_MAGIC = b"PAR1"
BOM = b"\xef\xbb\xbf"
TAR_MAGIC, TAR_MAGIC_PLACE = b"ustar", 257

MAX_LINE_BYTES = 64 * 1024 * 1024
"""No row of text is longer; a file without line ends is no JSON lines."""

BROKEN = (*UNREADABLE, ValueError, tarfile.TarError, lzma.LZMAError)
"""What readers raise for files that are cut off or changed."""


def rows_in(shard: str | Path, start: int = 0) -> Iterator[Numbered]:
    """Yield `(number, row)` from row `start` of a shard on; a row that cannot be used yields a `DataError` as itself.

    Raises:
        DataError: the shard is missing, of another kind, or broken so that what follows cannot be told apart.
    """
    try:
        with open_unzipped(shard) as stream:
            head = stream.read(512)
        read = _kind(shard, head)
        yield from read(Path(shard), start)
    except DataError:
        raise
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise DataError(f"{shard} cannot be read: {error.strerror or error}") from error
    except BROKEN as error:
        raise DataError(f"{shard} is broken or cut off ({type(error).__name__}: {error})") from error


def _kind(shard: str | Path, head: bytes) -> Callable[[Path, int], Iterator[Numbered]]:
    if head.startswith(PARQUET_MAGIC):
        return _parquet
    if head[TAR_MAGIC_PLACE:].startswith(TAR_MAGIC):
        return tar_rows
    text = head.removeprefix(BOM).strip()
    if text.startswith(b"{") or not text:
        return _lines
    raise DataError(
        f"{shard} is neither JSON lines, Parquet nor a tar shard; a JSON array cannot be streamed, "
        "write one object a line instead"
    )


def _lines(shard: Path, start: int) -> Iterator[Numbered]:
    with open_unzipped(shard) as stream:
        number = 0
        for line in _cut(stream, shard):
            if line.removeprefix(BOM).strip():
                if number >= start:
                    yield number, row_of(line)
                number += 1


def _cut(stream: Any, shard: Path) -> Iterator[bytes]:
    while line := stream.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES:
            raise DataError(f"{shard}: a line of more than {MAX_LINE_BYTES} bytes; expected one JSON object a line")
        yield line


def _parquet(shard: Path, start: int) -> Iterator[Numbered]:
    datasets = require("datasets", "data")
    name = glob.escape(str(shard))  # the library takes it for a pattern
    table = datasets.load_dataset("parquet", data_files=name, split="train", streaming=True)
    for number, row in enumerate(table.decode(False).skip(start), start=start):  # pictures stay bytes
        yield number, _parquet_row(row)


def _parquet_row(row: dict[str, Any]) -> StreamRow | DataError:
    pictures: list[bytes] = []
    value: dict[str, Any] = {}
    for name, cell in row.items():
        cells = cell if isinstance(cell, list) else [cell]
        if cells and all(isinstance(part, dict) and part.keys() == {"bytes", "path"} for part in cells):
            if any(not part["bytes"] for part in cells):
                return DataError(f"column {name!r} holds no bytes of a picture")
            pictures += [part["bytes"] for part in cells]
        elif cell is not None:
            value[name] = cell
    return StreamRow(value, tuple(pictures))
