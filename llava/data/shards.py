"""Rows of files that do not fit in memory, one after the other: JSON lines, Parquet, WebDataset tar shards.

    shard --rows_in(shard, start)--> StreamRow (JSON object, its images' bytes), StreamRow, ...

What a shard is, is decided by its first bytes. Rows of one shard are numbered from 0, so that a reader can be told to
begin at any row: lines and tar members before it are passed over, not parsed.

- JSON lines, plain or gzipped: one object a line; images are files.
- Parquet: one row an object; a column of `{"bytes", "path"}` (an `Image` of the datasets library) is an image.
- tar (WebDataset): see `tar_rows`.
"""

from __future__ import annotations

import glob
import json
import lzma
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast

from llava.errors import DataError
from llava.imaging.decode import stored_as
from llava.utils.jsonl import NOT_JSON, UNREADABLE, open_unzipped
from llava.utils.lookup import require

MAX_ROW_BYTES = 512 * 1024 * 1024
"""The members of one row are not larger together."""

PICTURE_ENDINGS = frozenset({"jpg", "jpeg", "png", "tif", "tiff", "bmp", "gif", "webp", "jp2", "dcm", "pgm", "ppm"})

PIECE = 1 << 16

Members = dict[str, bytes]
"""Contents by extension, in lower case."""


def tar_rows(shard: Path, start: int) -> Iterator[Numbered]:
    """Yield the numbered rows of a tar shard, plain or gzipped, from row `start` on.

    Raises:
        ValueError, OSError, tarfile.TarError: it is cut off or damaged.
    """
    with open_unzipped(shard) as stream, tarfile.open(fileobj=stream, mode="r|", tarinfo=_WholeHeaders) as archive:
        for number, (key, members) in enumerate(_by_key(archive, start)):
            if number >= start:
                yield number, members if isinstance(members, DataError) else _row(key, members)
        rest: Any = archive.fileobj
        while piece := rest.read(PIECE):  # to the end: a gzipped file's last bytes are its checksum
            if piece.strip(b"\0"):
                raise ValueError("something follows the mark of the end; are these several archives in a row?")


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


def _files(archive: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yield key, extension and header of every member that may belong to a row."""
    while (member := archive.next()) is not None:
        cast(Any, archive).members.clear()  # the library remembers every header, and shards may have millions
        folder, _, name = member.name.rpartition("/")
        if member.isfile() and not name.startswith("."):
            stem, _, extension = name.partition(".")
            yield (f"{folder}/{stem}" if folder else stem), extension.lower(), member


def _by_key(archive: tarfile.TarFile, start: int) -> Iterator[tuple[str, Members | DataError]]:
    """Members in runs of equal keys, or what is wrong with a run; contents of rows before `start` are not read."""
    members: Members = {}
    problem: DataError | None = None
    key, number, num_bytes = "", -1, 0
    for own, extension, member in _files(archive):
        if own != key or number < 0:
            if number >= 0:
                yield key, problem or members
            key, number, num_bytes, members, problem = own, number + 1, 0, {}, None
        if number < start or problem is not None:
            continue
        num_bytes += member.size
        if extension in members:
            problem = DataError(f"key {key!r}: two members are called {key}.{extension}; leave one out of the shard")
        elif num_bytes > MAX_ROW_BYTES:
            problem = DataError(f"key {key!r}: its members are larger than {MAX_ROW_BYTES} bytes")
        else:
            stream = archive.extractfile(member)
            members[extension] = b"" if stream is None else stream.read()
        if problem is not None:
            members = {}
    if number >= 0:
        yield key, problem or members


def _row(key: str, members: Members) -> StreamRow | DataError:
    text = members.pop("json", None)
    if text is None:
        return DataError(f"key {key!r}: no member {key}.json; found {', '.join(sorted(members)) or 'nothing'}")
    pictures = [name for name in sorted(members, key=_place) if _is_picture(name, members[name])]
    found = row_of(text, tuple(members[name] for name in pictures))
    if isinstance(found, DataError):
        return DataError(f"key {key!r}: {found}")
    return found if "id" in found.value else StreamRow({"id": key, **found.value}, found.pictures)


def _is_picture(extension: str, content: bytes) -> bool:
    return extension.rpartition(".")[2] in PICTURE_ENDINGS or stored_as(content) != "unknown"


def _place(extension: str) -> tuple[int, str]:
    """The order of images: by the number in their extension (`0.jpg`, `10.jpg`), else by name."""
    first = extension.partition(".")[0]
    return (int(first) if first.isdecimal() else 0, extension)


Numbered = tuple[int, "StreamRow | DataError"]
"""The number of a row in its shard, and the row, or why it cannot be used."""


@dataclass(frozen=True, slots=True)
class StreamRow:
    """One row.

    Attributes:
        value: the JSON object; `image` is left out where the shard holds the images itself.
        images: file bytes of the images in their order; empty where `value` names files.
    """

    value: Mapping[str, Any]
    pictures: tuple[bytes, ...] = field(default=(), repr=False)


def row_of(text: bytes, pictures: tuple[bytes, ...] = ()) -> StreamRow | DataError:
    """Return the row of a JSON text, or what is wrong with the text."""
    try:
        value = json.loads(text)
    except NOT_JSON as error:
        return DataError(f"not JSON: {error}; expected one JSON object")
    if not isinstance(value, dict):
        return DataError(f"a row must be a JSON object, got {type(value).__name__}")
    return StreamRow({name: part for name, part in value.items() if not (pictures and name == "image")}, pictures)


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
    for number, row in enumerate(table.decode(False).skip(start), start=start):  # images stay bytes
        yield number, _parquet_row(row)


def _parquet_row(row: dict[str, Any]) -> StreamRow | DataError:
    pictures: list[bytes] = []
    value: dict[str, Any] = {}
    for name, cell in row.items():
        cells = cell if isinstance(cell, list) else [cell]
        if cells and all(isinstance(part, dict) and part.keys() == {"bytes", "path"} for part in cells):
            if any(not part["bytes"] for part in cells):
                return DataError(f"column {name!r} holds no bytes of an image")
            pictures += [part["bytes"] for part in cells]
        elif cell is not None:
            value[name] = cell
    return StreamRow(value, tuple(pictures))
