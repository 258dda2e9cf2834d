"""Text files, plain or gzipped, and the writing of JSON; `llava.utils.json_rows` reads rows."""

from __future__ import annotations

import errno
import fcntl
import gzip
import json
import os
import stat
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from llava.errors import DataError
from llava.utils.file_kinds import utf8_text

GZIP_MAGIC = b"\x1f\x8b"

READ_ERRORS = (OSError, EOFError, zlib.error)
"""Exceptions of reading a missing, truncated or damaged file."""


@contextmanager
def open_decompressed(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a regular file for reading, decompressed if it is gzipped.

    Raises:
        OSError: the file cannot be opened, or is a pipe or a device; `READ_ERRORS` lists the exceptions of reading.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # opening a named pipe would wait for a writer forever
        raise OSError(errno.EINVAL, "it is a pipe or a device, expected a regular file", str(path))
    with open(path, "rb") as raw:
        if raw.peek(2).startswith(GZIP_MAGIC):
            with gzip.GzipFile(fileobj=raw) as stream:
                yield cast(IO[bytes], stream)
        else:
            yield raw


JSON_ERRORS = (ValueError, RecursionError)
"""Exceptions of decoding JSON; deep nesting raises RecursionError, and long integers raise ValueError."""


MAX_TEXT_BYTES = 1 << 30
"""Largest size of a text that is read as a whole; a small gzip file may expand to any size."""


def read_text(path: str | Path, *, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Return the text of a file, decompressed if it is gzipped.

    Raises:
        DataError: the file does not exist, has more than `max_bytes` bytes, or is not UTF-8 text.
    """
    try:
        with open_decompressed(path) as stream:
            content = stream.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise DataError(f"{path}: the text has more than {max_bytes:,} bytes, expected at most that many")
        return utf8_text(content)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except READ_ERRORS as error:
        raise DataError(f"{path}: cannot be read as text or gzipped text ({error})") from error
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error


def read_object(path: str | Path) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Raises:
        DataError: the file cannot be read, or holds something else.
    """
    text = read_text(path)
    try:
        value = json.loads(text)
    except JSON_ERRORS as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise DataError(f"{path}: not JSON ({reason}); expected one object") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def is_unicode(text: str) -> bool:
    """Return whether a text can be encoded as UTF-8; lone surrogates, which JSON permits, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def file_text(rows: Iterable[Any], *, lines: bool = False) -> Iterator[bytes]:
    """Yield the bytes of a data file (UTF-8), row by row.

    Raises:
        DataError: a text holds half of a surrogate pair, which UTF-8 cannot encode; the message names the row.
    """
    number = -1
    for number, row in enumerate(rows):
        text = json.dumps(row, ensure_ascii=False)
        before, after = ("", "\n") if lines else (",\n" if number else "[\n", "")
        if not is_unicode(text):
            raise DataError(f"row {number} holds half of a surrogate pair, which UTF-8 cannot encode; fix the text")
        yield f"{before}{text}{after}".encode()
    if not lines:
        yield b"\n]\n" if number >= 0 else b"[]\n"


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


def write_atomic(path: str | Path, content: str | bytes, *, private: bool = False) -> None:
    """Write a file under a temporary name and rename it, so that readers never see a partial file.

    With `private` only the user can read it.
    """
    with open_atomic(path, private=private) as stream:
        stream.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def open_atomic(path: str | Path, *, private: bool = False) -> Iterator[IO[bytes]]:
    """Open a file for writing under a temporary name; rename it at the end, or remove it after an error.

    Raises:
        OSError: it cannot be written, for example on a full disk; the error names `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle, temporary = _open_temporary(path)
    except OSError as error:
        error.filename = str(path)  # instead of the temporary name
        raise
    lock = os.dup(handle)  # the lock lasts until the file has its name
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
        os.fchmod(lock, 0o600 if private else 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        os.close(lock)


def _open_temporary(path: Path) -> tuple[int, str]:
    """Open the temporary file of `path`; return its descriptor and its path.

    Its name is fixed, so that what a killed process left is used again, and a lock tells it from that of a process at
    work, beside which a random name is used.
    """
    place = path.with_name(f".{path.name}.tmp")
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        handle = os.open(place, flags, 0o600)
    except OSError:
        return tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        opened = os.fstat(handle)
        if os.path.samestat(opened, os.lstat(place)) and opened.st_nlink == 1 and opened.st_uid == os.geteuid():
            os.ftruncate(handle, 0)
            return handle, str(place)
    except OSError:  # locked, renamed by its owner meanwhile, or a file system without locks
        pass
    os.close(handle)
    return tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")


def _umask() -> int:
    """Return the file mode mask of the process, which `mkstemp` does not apply."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def follow_umask(folder: str | Path) -> None:
    """Give the files in a folder the mode that the umask asks for."""
    # safetensors writes files that only their owner can read.
    mode = 0o666 & ~_umask()
    for file in Path(folder).rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)


def records_text(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as text, one JSON object per line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_records(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, atomically."""
    write_atomic(path, records_text(rows))


def write_json(path: str | Path, value: Any) -> None:
    """Write one indented JSON value, atomically."""
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")
