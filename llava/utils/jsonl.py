"""Reading and writing of JSON arrays and JSON lines, plain or gzipped, detected by content."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from llava.errors import DataError

GZIP_MAGIC = b"\x1f\x8b"

READ_ERRORS = (OSError, EOFError, zlib.error)
"""Exceptions of reading a missing, truncated or damaged file."""


@contextmanager
def open_decompressed(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, decompressed if it is gzipped.

    Raises:
        OSError: the file cannot be opened; `UNREADABLE` lists the exceptions of reading.
    """
    with open(path, "rb") as raw:
        if raw.peek(2).startswith(GZIP_MAGIC):
            with gzip.GzipFile(fileobj=raw) as stream:
                yield cast(IO[bytes], stream)
        else:
            yield raw


Record = dict[str, Any]

JSON_ERRORS = (ValueError, RecursionError)
"""Exceptions of decoding JSON; deep nesting raises RecursionError, and long integers raise ValueError."""


def read_text(path: str | Path) -> str:
    """Return the text of a file, decompressed if it is gzipped.

    Raises:
        DataError: the file does not exist, or is not UTF-8 text.
    """
    try:
        with open_decompressed(path) as stream:
            return stream.read().decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (*READ_ERRORS, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text or gzipped text ({error})") from error


def read_records(path: str | Path) -> Iterator[Record]:
    """Yield the records of a JSON array or of a file with one JSON object per line.

    Raises:
        DataError: the file cannot be read, is not JSON, or a record is not an object; names file and row or line.
    """
    text = read_text(path)
    if text.lstrip()[:1] == "[":
        yield from _array(text, path)
    else:
        yield from _lines(text, path)


def _array(text: str, path: str | Path) -> Iterator[Record]:
    try:
        rows = json.loads(text)
    except JSON_ERRORS as error:
        raise DataError(f"{path}: not a JSON array: {error}") from error
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {index}: expected an object, got {type(row).__name__}")
        yield row


def _lines(text: str, path: str | Path) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except JSON_ERRORS as error:
            raise DataError(
                f"{path}, line {number}: not JSON ({error}); expected a JSON array or one JSON object per line"
            ) from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected an object, got {type(row).__name__}")
        yield row


def append_record(path: str | Path, row: Mapping[str, Any]) -> None:
    """Append one row as one line to a file, after ending an incomplete last line."""
    line = json.dumps(row, ensure_ascii=False) + "\n"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as stream:
        if stream.tell() > 0:
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                line = "\n" + line
        stream.write(line.encode("utf-8"))


def drop_incomplete_line(path: str | Path) -> bool:
    """Remove an incomplete last line, left by a killed process; return whether there was one.

    Other files than JSON lines, given by mistake, are not changed.
    """
    path = Path(path)
    if not path.exists():
        return False
    content = path.read_bytes()
    head, newline, tail = content.rpartition(b"\n")
    if not tail.strip() or not _begins_with_object(head or tail, whole=bool(head)):
        return False
    try:
        json.loads(tail)
    except ValueError:
        write_atomic(path, head + newline)
        return True
    return False


def _begins_with_object(content: bytes, *, whole: bool) -> bool:
    """Return whether the first line is a JSON object or, if not `whole`, may be the prefix of one."""
    first = content.lstrip().partition(b"\n")[0]
    if not whole or not first.startswith(b"{"):
        return first.startswith(b"{")
    try:
        json.loads(first)
    except JSON_ERRORS:
        return False
    return True


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a file under a temporary name and rename it, so that readers never see a partial file."""
    with open_atomic(path) as stream:
        stream.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def open_atomic(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a file for writing under a temporary name; rename it at the end, or remove it after an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    """Return the file mode mask of the process, which `mkstemp` does not apply."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_records(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, atomically."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_json(path: str | Path, value: Any) -> None:
    """Write one indented JSON value, atomically."""
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")
