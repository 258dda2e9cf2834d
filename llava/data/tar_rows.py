"""Rows of WebDataset tar shards: members with one key, one behind the other, are a row.

    000001.json 000001.jpg | 000002.json 000002.0.png 000002.1.png | ...
         the row, its picture       the row, its pictures in that order

- A member is a picture if its first bytes say so, or if its name ends as a picture's (then it has to be one). Others
  (`.txt`, `.cls`, `.npy`, ...) are left alone: the row is what its `.json` says.
- Names that begin with a dot are no members of a row: macOS writes `._000001.jpg` beside each file, for example.
- Two members of one name in a row are an error: which of them is meant cannot be told.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self, cast

from llava.data.stream_row import Numbered, StreamRow, row_of
from llava.errors import DataError
from llava.imaging.decode import stored_as
from llava.utils.unzipped import open_unzipped

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
    """The order of pictures: by the number in their extension (`0.jpg`, `10.jpg`), else by name."""
    first = extension.partition(".")[0]
    return (int(first) if first.isdecimal() else 0, extension)
