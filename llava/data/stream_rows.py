"""Rows of files that do not fit in memory, one after the other: JSON lines, Parquet, WebDataset tar shards.

    shard --rows_in(shard, start)--> StreamRow (JSON object, its pictures' bytes), StreamRow, ...

What a shard is, is decided by its first bytes. Rows of one shard are numbered from 0, so that a reader can be told to
begin at any row: lines and tar members before it are passed over, not parsed.

- JSON lines, plain or gzipped: one object a line; pictures are files.
- Parquet: one row an object; a column of `{"bytes", "path"}` (an `Image` of the datasets library) is a picture.
- tar (WebDataset): members `KEY.json` (the row) and `KEY.jpg`, `KEY.0.png`, ... (its pictures, in that order).
"""

from __future__ import annotations

import glob
import gzip
import json
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from llava.errors import DataError
from llava.utils.lookup import require

PARQUET_MAGIC, GZIP_MAGIC = b"PAR1", b"\x1f\x8b"
BOM = b"\xef\xbb\xbf"
TAR_MAGIC, TAR_MAGIC_PLACE = b"ustar", 257
MAX_MEMBER_BYTES = 512 * 1024 * 1024
"""No picture file in a tar shard is larger."""

MAX_LINE_BYTES = 64 * 1024 * 1024
"""No row of text is longer; a file without line ends is no JSON lines."""

BROKEN = (OSError, EOFError, ValueError, tarfile.TarError, zlib.error, lzma.LZMAError)
"""What readers raise for files that are cut off or changed."""

PIECE = 1 << 16

Numbered = tuple[int, "StreamRow | DataError"]


@dataclass(frozen=True, slots=True)
class StreamRow:
    """One row.

    Attributes:
        value: the JSON object; `image` is left out where the shard holds the pictures itself.
        pictures: file bytes of the pictures in their order; empty where `value` names files.
    """

    value: Mapping[str, Any]
    pictures: tuple[bytes, ...] = field(default=(), repr=False)


def rows_in(shard: str | Path, start: int = 0) -> Iterator[Numbered]:
    """Yield `(number, row)` from row `start` of a shard on; a row that cannot be used yields a `DataError` as itself.

    Raises:
        DataError: the shard is missing, of another kind, or broken so that what follows cannot be told apart.
    """
    try:
        with open(shard, "rb") as stream:
            head = stream.read(512)
    except OSError as error:
        raise DataError(f"{shard} cannot be read: {error.strerror or error}") from error
    read = _kind(shard, head)
    try:
        yield from read(Path(shard), start)
    except DataError:
        raise
    except BROKEN as error:
        raise DataError(f"{shard} is broken or cut off ({type(error).__name__}: {error})") from error


def _kind(shard: str | Path, head: bytes) -> Callable[[Path, int], Iterator[Numbered]]:
    if head.startswith(GZIP_MAGIC):
        with gzip.open(shard) as stream:
            try:
                head = stream.read(512)
            except BROKEN as error:
                raise DataError(f"{shard} is broken or cut off ({error})") from error
    if head.startswith(PARQUET_MAGIC):
        return _parquet
    if head[TAR_MAGIC_PLACE:].startswith(TAR_MAGIC):
        return _tar
    text = head.removeprefix(BOM).strip()
    if text.startswith(b"{") or not text:
        return _lines
    raise DataError(
        f"{shard} is neither JSON lines, Parquet nor a tar shard; a JSON array cannot be streamed, "
        "write one object a line instead"
    )


@contextmanager
def _unzipped(shard: Path) -> Iterator[Any]:
    """Open a shard for reading, unzipped if it is gzipped."""
    with ExitStack() as stack:
        stream: Any = stack.enter_context(open(shard, "rb"))
        zipped = stream.read(2) == GZIP_MAGIC
        stream.seek(0)
        yield stack.enter_context(gzip.open(stream)) if zipped else stream


def _lines(shard: Path, start: int) -> Iterator[Numbered]:
    with _unzipped(shard) as stream:
        number = 0
        for line in _cut(stream, shard):
            if line.removeprefix(BOM).strip():
                if number >= start:
                    yield number, _object(line)
                number += 1


def _cut(stream: Any, shard: Path) -> Iterator[bytes]:
    while line := stream.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES:
            raise DataError(f"{shard}: a line of more than {MAX_LINE_BYTES} bytes; expected one JSON object a line")
        yield line


def _object(text: bytes, pictures: tuple[bytes, ...] = ()) -> StreamRow | DataError:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return DataError(f"not JSON: {error}; expected one JSON object")
    if not isinstance(value, dict):
        return DataError(f"a row must be a JSON object, got {type(value).__name__}")
    return StreamRow({name: part for name, part in value.items() if not (pictures and name == "image")}, pictures)


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


class _WholeHeaders(tarfile.TarInfo):
    """Headers of an archive that must be whole.

    The library takes a header that is cut off or damaged, behind the first one, for the end of the archive, and the
    rows behind it would silently be missing.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Read a header block; anything but a header or the mark of the end is an error."""
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if not buf.strip(b"\0") and len(buf) == tarfile.BLOCKSIZE:  # the mark of the end
                raise
            raise ValueError(f"in the place of a member or of the mark of the end: {error}") from error


def _tar(shard: Path, start: int) -> Iterator[Numbered]:
    with _unzipped(shard) as stream, tarfile.open(fileobj=stream, mode="r|", tarinfo=_WholeHeaders) as archive:
        for number, (key, members) in enumerate(_by_key(archive, start)):
            if number >= start:
                yield number, _tar_row(key, members)
        rest: Any = archive.fileobj
        while piece := rest.read(PIECE):  # to the end: a gzipped file's last bytes are its checksum
            if piece.strip(b"\0"):
                raise ValueError("something follows the mark of the end; are these several archives in a row?")


def _by_key(archive: tarfile.TarFile, start: int) -> Iterator[tuple[str, dict[str, bytes | None]]]:
    """Members in runs of equal keys; contents of rows before `start` are not read, those of too large ones neither."""
    members: dict[str, bytes | None] = {}
    key, number = "", -1
    for member in archive:
        if not member.isfile():
            continue
        folder, _, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        own = f"{folder}/{stem}" if folder else stem
        if own != key or number < 0:
            if number >= 0:
                yield key, members
            key, members, number = own, {}, number + 1
        content = None
        if number >= start and member.size <= MAX_MEMBER_BYTES:
            stream = archive.extractfile(member)
            content = stream.read() if stream is not None else None
        members[extension.lower()] = content
    if number >= 0:
        yield key, members


def _tar_row(key: str, members: dict[str, bytes | None]) -> StreamRow | DataError:
    if any(content is None for content in members.values()):
        return DataError(f"key {key!r}: a member is larger than {MAX_MEMBER_BYTES} bytes")
    text = members.pop("json", None)
    if text is None:
        return DataError(f"key {key!r}: no member {key}.json; found {', '.join(sorted(members)) or 'nothing'}")
    found = _object(text, tuple(_in_order(members)))
    if isinstance(found, DataError):
        return DataError(f"key {key!r}: {found}")
    return found if "id" in found.value else StreamRow({"id": key, **found.value}, found.pictures)


def _in_order(members: Mapping[str, bytes | None]) -> Iterable[bytes]:
    """Pictures by the number in their extension (`0.jpg`, `10.jpg`), else by name."""

    def place(extension: str) -> tuple[int, str]:
        first = extension.partition(".")[0]
        return (int(first) if first.isdecimal() else 0, extension)

    return [content for name in sorted(members, key=place) if (content := members[name]) is not None]
