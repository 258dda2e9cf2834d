"""Stream rows from shards that do not fit in memory: JSON lines, Parquet and WebDataset tar files.

    shard --rows_in(shard, start)--> StreamRow (JSON object, bytes of its images), StreamRow, ...

The first bytes of a shard decide its format. Rows of a shard are numbered from 0, and reading can start at any row:
earlier lines and tar members are skipped without parsing.

- JSON lines, plain or gzipped: one object per line; images are files.
- Parquet: one object per row; a column of `{"bytes", "path"}` (an `Image` of the datasets library) is an image.
- tar (WebDataset): see `tar_rows`.
"""

from __future__ import annotations

import lzma
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast

from llava.errors import BrokenFileError, DataError
from llava.imaging.decode import stored_format
from llava.samples import IMAGE_KEYS
from llava.utils.json_rows import decode_row, iter_rows
from llava.utils.jsonl import READ_ERRORS, open_decompressed
from llava.utils.lookup import require

MAX_ROW_BYTES = 512 * 1024 * 1024
"""Largest total size of the members of one row."""

MAX_HEADER_BYTES = 1 << 20
"""Largest size of a long name or of extended attributes."""

MAX_MEMBER_BYTES = 1 << 32
"""Largest size of any member, also of one that belongs to no row."""

DESCRIBING = frozenset(
    {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE}
)
"""Types of headers that describe the next member."""

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "tif", "tiff", "bmp", "gif", "webp", "jp2", "dcm", "pgm", "ppm"})

CHUNK = 1 << 16

Members = dict[str, bytes]
"""Contents by extension, in lower case."""


def tar_rows(shard: Path, start: int) -> Iterator[NumberedRow]:
    """Yield the numbered rows of a tar shard, plain or gzipped, from row `start` on.

    Raises:
        ValueError, OSError, tarfile.TarError: the shard is truncated or damaged.
    """
    with open_decompressed(shard) as stream, tarfile.open(fileobj=stream, mode="r|", tarinfo=_WholeHeaders) as archive:
        for number, (key, members) in enumerate(_members_by_key(archive, start)):
            if number >= start:
                yield number, members if isinstance(members, DataError) else _tar_row(key, members)
        rest: Any = archive.fileobj
        while chunk := rest.read(CHUNK):  # read to the end, where a gzipped file has its checksum
            if chunk.strip(b"\0"):
                raise ValueError("unexpected data after the end marker; were several archives concatenated?")


class _WholeHeaders(tarfile.TarInfo):
    """Archive headers that must be complete.

    The library treats a truncated or damaged header after the first one as the end of the archive, so the rows after
    it would silently be missing.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Read a header block; anything but a header of bounded size or the end marker is an error."""
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if not buf.strip(b"\0") and len(buf) == tarfile.BLOCKSIZE:  # the end marker
                raise
            raise ValueError(f"expected a member or the end marker: {error}") from error
        # The library reads a name or attributes at once; a small gzip file may expand to any size.
        # It also reads on after the end of the file, for as many bytes as a header states.
        most = MAX_HEADER_BYTES if header.type in DESCRIBING else MAX_MEMBER_BYTES
        if not 0 <= header.size <= most:
            raise ValueError(f"a header states {header.size} bytes; expected 0 to {most}")
        return header


def _files(archive: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yield key, extension and header of every member that may belong to a row."""
    while (member := archive.next()) is not None:
        cast(Any, archive).members.clear()  # the library keeps every header, and shards may have millions
        if not 0 <= member.size <= MAX_MEMBER_BYTES:  # attributes may state another size than the header
            raise ValueError(f"a member states {member.size} bytes; expected 0 to {MAX_MEMBER_BYTES}")
        folder, _, name = member.name.rpartition("/")
        if member.isfile() and not name.startswith("."):
            stem, _, extension = name.partition(".")
            yield (f"{folder}/{stem}" if folder else stem), extension.lower(), member


def _members_by_key(archive: tarfile.TarFile, start: int) -> Iterator[tuple[str, Members | DataError]]:
    """Yield the members of each key, or the error of the key; rows before `start` are not read."""
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
            problem = DataError(f"key {key!r}: duplicate member {key}.{extension}; remove one from the shard")
        elif num_bytes > MAX_ROW_BYTES:
            problem = DataError(f"key {key!r}: its members have more than {MAX_ROW_BYTES} bytes together")
        else:
            stream = archive.extractfile(member)
            members[extension] = b"" if stream is None else stream.read()
        if problem is not None:
            members = {}
    if number >= 0:
        yield key, problem or members


def _tar_row(key: str, members: Members) -> StreamRow | DataError:
    text = members.pop("json", None)
    if text is None:
        return DataError(f"key {key!r}: member {key}.json is missing; found {', '.join(sorted(members)) or 'nothing'}")
    images = [name for name in sorted(members, key=_image_order) if _is_image(name, members[name])]
    found = row_of(text, tuple(members[name] for name in images))
    if isinstance(found, DataError):
        return DataError(f"key {key!r}: {found}")
    return found if "id" in found.value else StreamRow({"id": key, **found.value}, found.images)


def _is_image(extension: str, content: bytes) -> bool:
    return extension.rpartition(".")[2] in IMAGE_EXTENSIONS or stored_format(content) != "unknown"


def _image_order(extension: str) -> tuple[int, str]:
    """Return the sort key of images: the number in their extension (`0.jpg`, `10.jpg`), then the name."""
    first = extension.partition(".")[0]
    return (int(first) if first.isdecimal() else 0, extension)


NumberedRow = tuple[int, "StreamRow | DataError"]
"""Number of a row in its shard, and the row or the reason why it cannot be used."""


@dataclass(frozen=True, slots=True)
class StreamRow:
    """Row of a shard.

    Attributes:
        value: JSON object; without `image` where the shard holds the images itself.
        images: file bytes of the images in order; empty where `value` names files.
    """

    value: Mapping[str, Any]
    images: tuple[bytes, ...] = field(default=(), repr=False)


def row_of(text: bytes, images: tuple[bytes, ...] = ()) -> StreamRow | DataError:
    """Return the row of a JSON text, or the error of the text."""
    return _row(decode_row(text.decode("utf-8-sig", "surrogateescape")), images)


def _row(value: Any, images: tuple[bytes, ...] = ()) -> StreamRow | DataError:
    if isinstance(value, DataError):
        return value
    if not isinstance(value, dict):
        return DataError(f"a row must be a JSON object, got {type(value).__name__}")
    return _without_names(value, images)


def _without_names(value: Mapping[str, Any], images: tuple[bytes, ...]) -> StreamRow:
    """Return a row, without image names if the shard holds the images themselves."""
    return StreamRow({name: part for name, part in value.items() if not (images and name in IMAGE_KEYS)}, images)


PARQUET_MAGIC = b"PAR1"

BATCH_ROWS = 64
"""Rows per batch; each may contain an image."""

PARQUET_ERRORS = (OSError, ValueError, NotImplementedError)
"""Exceptions of pyarrow, whose own ones are also built-in ones."""

BOM = b"\xef\xbb\xbf"
TAR_MAGIC, TAR_MAGIC_OFFSET = b"ustar", 257

SHARD_READ_ERRORS = (*READ_ERRORS, ValueError, tarfile.TarError, lzma.LZMAError)
"""Errors that readers raise for truncated or damaged files."""


def rows_in(shard: str | Path, start: int = 0) -> Iterator[NumberedRow]:
    """Yield `(number, row)` of a shard from row `start` on; an unusable row is a `DataError`.

    Raises:
        DataError: the shard is missing, of another format, or damaged so that further rows cannot be separated.
    """
    try:
        with open_decompressed(shard) as stream:
            head = stream.read(512)
        read = _reader_of(shard, head)
        yield from read(Path(shard), start)
    except DataError:
        raise
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise DataError(f"{shard} cannot be read: {error.strerror or error}") from error
    except SHARD_READ_ERRORS as error:
        raise DataError(f"{shard} is damaged or truncated ({type(error).__name__}: {error})") from error


def _reader_of(shard: str | Path, head: bytes) -> Callable[[Path, int], Iterator[NumberedRow]]:
    if head.startswith(PARQUET_MAGIC):
        return _parquet
    if head[TAR_MAGIC_OFFSET:].startswith(TAR_MAGIC):
        return tar_rows
    text = head.removeprefix(BOM).strip()
    if text.startswith(b"{") or not text:
        return _lines
    raise DataError(
        f"{shard} is neither JSON lines, Parquet nor a tar shard; a JSON array cannot be streamed, "
        "write one object per line instead"
    )


def _lines(shard: Path, start: int) -> Iterator[NumberedRow]:
    for number, value in iter_rows(shard, start=start, lines=True):
        if isinstance(value, BrokenFileError):
            raise DataError(f"{shard} is damaged or truncated (row {number}: {value})") from value
        yield number, _row(value)


def open_parquet(path: str | Path) -> Any:
    """Return an open `pyarrow.parquet.ParquetFile`.

    Raises:
        DataError: the file cannot be read.
        MissingDependency: pyarrow is not installed.
    """
    module = require("pyarrow.parquet", "data")
    try:
        return module.ParquetFile(path)
    except PARQUET_ERRORS as error:
        raise DataError(f"{path}: not a readable Parquet file; it is damaged or truncated ({error})") from error


def parquet_columns(path: str | Path) -> list[str]:
    """Return the column names of a file; errors are those of `open_parquet`."""
    with open_parquet(path) as file:
        return list(file.schema_arrow.names)


def parquet_rows(path: str | Path, *, start: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number and cells by column of every row from `start`; earlier row groups are skipped.

    Raises:
        DataError: the file is damaged; names file and row.
        MissingDependency: pyarrow is not installed.
    """
    with open_parquet(path) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        first = row = 0
        while first < len(sizes) and row + sizes[first] <= start:
            row += sizes[first]
            first += 1
        try:
            for batch in file.iter_batches(BATCH_ROWS, row_groups=range(first, len(sizes))):
                for cells in batch.to_pylist():
                    if row >= start:
                        yield row, cells
                    row += 1
        except PARQUET_ERRORS as error:
            raise DataError(f"{path}, row {row}: the rest cannot be read ({error})") from error


def _parquet(shard: Path, start: int) -> Iterator[NumberedRow]:
    for number, row in parquet_rows(shard, start=start):
        yield number, _parquet_row(row)


def _parquet_row(row: dict[str, Any]) -> StreamRow | DataError:
    images: list[bytes] = []
    value: dict[str, Any] = {}
    for name, cell in row.items():
        cells = cell if isinstance(cell, list) else [cell]
        if cells and all(isinstance(part, dict) and part.keys() == {"bytes", "path"} for part in cells):
            if any(not part["bytes"] for part in cells):
                return DataError(f"column {name!r} has no image bytes; images must be embedded in the shard")
            images += [part["bytes"] for part in cells]
        elif cell is not None:
            value[name] = cell
    return _without_names(value, tuple(images))
