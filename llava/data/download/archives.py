"""Streaming reader of listed files in an untrusted .tar.gz; it writes no file and follows no link.

    stream --gunzip, bounded--> 512-byte blocks --headers--> members --listed ones--> their bytes

Names in an archive are only compared, never used as paths, and every stated length is checked against a limit before
data is read. The standard library parses the header blocks; the loop over headers is our own, because the library's
stream reader allocates as much memory as a header requests.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple, Protocol

from llava.errors import ArchiveError

GZIP = b"\x1f\x8b"
BLOCK = 512
PIECE = 1 << 16
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".gif")
"""Extensions that may replace each other, best first: packages contain .gif thumbnails beside .jpg figures."""

WITHOUT_DATA = frozenset(
    {tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE}
)
PLAIN = frozenset({tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE})
LOCAL_PAX, GLOBAL_PAX = frozenset({tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE}), frozenset({tarfile.XGLTYPE})


class ArchiveSource(Protocol):
    """Source of an archive's bytes."""

    def read(self) -> bytes:
        """Return the next bytes; empty at the end."""


@dataclass(frozen=True, slots=True)
class ArchiveLimits:
    """Limits of an archive.

    Attributes:
        max_members: number of files, folders and links.
        max_figure: size of one figure in bytes.
        max_held: bytes of substitutes (other extensions) kept in memory until the end of the archive.
        max_unpacked: size of the unpacked archive in bytes.
        max_ratio: ratio of unpacked to packed bytes, checked after `ratio_from` unpacked bytes.
        ratio_from: unpacked bytes before the ratio is checked.
        max_header: size of a long name or of extended attributes in bytes.
    """

    max_members: int = 50_000
    max_figure: int = 128 << 20
    max_held: int = 128 << 20
    max_unpacked: int = 64 << 30
    max_ratio: float = 200.0
    ratio_from: int = 64 << 20
    max_header: int = 1 << 20


class Unpacked:
    """Unzipped bytes of a source, read in pieces of bounded size.

    The methods raise `ArchiveError` for data that is not gzipped, damaged, truncated or beyond the limits.
    """

    def __init__(self, source: ArchiveSource, limits: ArchiveLimits) -> None:
        self._source = source
        self._limits = limits
        self._zip = zlib.decompressobj(wbits=31)
        self._input = self._first = b""
        self._ready = bytearray()
        self._num_in = self._num_out = 0

    def read(self, size: int) -> bytes:
        """Return `size` bytes, fewer only at the end."""
        while len(self._ready) < size and self._more():
            pass
        data = bytes(self._ready[:size])
        del self._ready[:size]
        return data

    def skip(self, size: int) -> int:
        """Skip `size` bytes and return the number of skipped bytes, smaller only at the end."""
        left = size
        while left:
            piece = len(self.read(min(left, PIECE)))
            if piece == 0:
                break
            left -= piece
        return size - left

    def _more(self) -> bool:
        """Unzip another piece; False at the end."""
        if not self._input:
            self._input = self._source.read()
            self._num_in += len(self._input)
            self._first = (self._first + self._input)[: len(GZIP)]
        if not self._input and (self._zip.eof or not self._kept_back()):
            self._check_end()
            return False
        if not self._input:
            return True
        if self._zip.eof:  # a gzip file may have several members; zeros or other bytes after the last are ignored
            if not self._input.startswith(b"\x1f"):
                self._input = b""
                return True
            self._zip = zlib.decompressobj(wbits=31)
        try:
            piece = self._zip.decompress(self._input, PIECE)
        except zlib.error as error:
            if self._first != GZIP:
                raise ArchiveError(f"not a gzipped file ({error})", reason="not_an_archive") from error
            raise ArchiveError(f"damaged after byte {self._num_out} ({error})", reason="corrupted") from error
        self._input = self._zip.unused_data if self._zip.eof else self._zip.unconsumed_tail
        self._num_out += len(piece)
        self._check_limits()
        self._ready += piece
        return True

    def _kept_back(self) -> bool:
        """Read what the decompressor still buffers of earlier input; False if it buffers nothing."""
        piece = self._zip.decompress(b"", PIECE)
        self._num_out += len(piece)
        self._ready += piece
        return bool(piece)

    def _check_end(self) -> None:
        if self._num_in == 0:
            raise ArchiveError("empty file", reason="truncated")
        if not self._zip.eof:
            raise ArchiveError(f"incomplete, ends after {self._num_out} unpacked bytes", reason="truncated")

    def _check_limits(self) -> None:
        limits = self._limits
        ratio = self._num_out / max(1, self._num_in - len(self._input))
        if self._num_out > limits.max_unpacked or (self._num_out > limits.ratio_from and ratio > limits.max_ratio):
            raise ArchiveError(f"{self._num_out} bytes unpacked from {self._num_in}, beyond the limits", reason="bomb")


class Member(NamedTuple):
    """Archive member: its name, whether it is a plain file, and its size in bytes."""

    name: str
    plain: bool
    size: int


class Archive:
    """Members of a .tar.gz in order.

    Args:
        source: its bytes.
        limits: limits of the archive.
    """

    def __init__(self, source: ArchiveSource, limits: ArchiveLimits | None = None) -> None:
        self.limits = limits or ArchiveLimits()
        self._bytes = Unpacked(source, self.limits)
        self._left = 0
        self._padding = 0

    def __iter__(self) -> Iterator[Member]:
        """Yield the members; `data` returns the bytes of the last one.

        Raises:
            ArchiveError: the archive is damaged, truncated or beyond the limits.
        """
        num_members = 0
        long_name: str | None = None
        pax: dict[str, str] = {}
        while (header := self._header()) is not None:
            num_members += 1
            if num_members > self.limits.max_members:
                raise ArchiveError(f"more than {self.limits.max_members} members (--max-members)", reason="bomb")
            if header.type in LOCAL_PAX | GLOBAL_PAX:
                records = pax_records(self._attributes(header.size))
                pax = {**pax, **records} if header.type in LOCAL_PAX else pax
            elif header.type == tarfile.GNUTYPE_LONGNAME:
                long_name = self._attributes(header.size).split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
            elif header.type == tarfile.GNUTYPE_LONGLINK:
                self._attributes(header.size)
            else:
                yield self._member(header, long_name, pax)
                self._finish()
                long_name, pax = None, {}

    def data(self) -> bytes:
        """Return the bytes of the current member.

        Raises:
            ArchiveError: the member is truncated, or larger than the limit.
        """
        if self._left > self.limits.max_figure:
            limit = self.limits.max_figure
            raise ArchiveError(f"a file has {self._left} bytes, the limit is {limit}", reason="too_large")
        size, self._left = self._left, 0
        return self._exactly(size)

    def _header(self) -> tarfile.TarInfo | None:
        """Return the next header, or None at the end of the archive."""
        block = self._bytes.read(BLOCK)
        if not block or not block.strip(b"\0"):
            while self._bytes.read(PIECE):  # the checksum is at the end of the gzip file
                pass
            return None
        if len(block) < BLOCK:
            raise ArchiveError("ends inside a header", reason="truncated")
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.TarError, ValueError, OverflowError) as error:
            raise ArchiveError(f"a header cannot be read ({error})", reason="corrupted") from error
        if header.size < 0:
            raise ArchiveError("a header states a negative size", reason="corrupted")
        if header.type == tarfile.GNUTYPE_SPARSE:
            self._skip_sparse_map(block)
        return header

    def _skip_sparse_map(self, block: bytes) -> None:
        more = block[482]
        for _ in range(self.limits.max_header // BLOCK):
            if not more:
                return
            more = self._exactly(BLOCK)[504]
        raise ArchiveError("the map of a sparse file is larger than the limit", reason="bomb")

    def _member(self, header: tarfile.TarInfo, long_name: str | None, pax: dict[str, str]) -> Member:
        name = pax.get("path", header.name if long_name is None else long_name)
        size = header.size
        if "size" in pax:
            if not pax["size"].isdecimal() or len(pax["size"]) > 18:
                raise ArchiveError("the size in extended attributes is not a number", reason="corrupted")
            size = int(pax["size"])
        sparse = header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in pax)
        self._left = 0 if header.type in WITHOUT_DATA else size
        self._padding = -self._left % BLOCK
        return Member(name, header.type in PLAIN and not sparse, self._left)

    def _attributes(self, size: int) -> bytes:
        """Return the content of a header that describes the next member."""
        if size > self.limits.max_header:
            limit = self.limits.max_header
            raise ArchiveError(f"a name or attributes have {size} bytes, the limit is {limit}", reason="bomb")
        data = self._exactly(size)
        self._exactly(-size % BLOCK)
        return data

    def _finish(self) -> None:
        """Skip to the next header."""
        size = self._left + self._padding
        self._left = self._padding = 0
        if self._bytes.skip(size) < size:
            raise ArchiveError("ends inside a file", reason="truncated")

    def _exactly(self, size: int) -> bytes:
        data = self._bytes.read(size)
        if len(data) < size:
            raise ArchiveError("ends inside a file", reason="truncated")
        return data


def pax_records(content: bytes) -> dict[str, str]:
    """Return the attributes `path`, `size` and those of sparse files from `LENGTH KEY=VALUE\\n` records.

    Raises:
        ArchiveError: a stated length is wrong.
    """
    records: dict[str, str] = {}
    place = 0
    while place < len(content) and content[place] != 0:
        digits, space, _ = content[place : place + 20].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        record = content[place : place + length]
        key, equals, value = record[len(digits) + 1 :].partition(b"=")
        if length <= len(digits) + 2 or len(record) < length or not equals or not value.endswith(b"\n"):
            raise ArchiveError("extended attributes cannot be read", reason="corrupted")
        name = key.decode("utf-8", "replace")
        if name in ("path", "size") or name.startswith("GNU.sparse"):
            records[name] = value[:-1].decode("utf-8", "surrogateescape")
        place += length
    return records


def plain_name(name: str) -> str | None:
    """Return a relative name in its shortest form; None if it is absolute, empty or unsafe (`..`)."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or any(sign in name for sign in "\0\\"):
        return None
    return "/".join(parts)


class Taken(NamedTuple):
    """Listed figure: its bytes, or the `reason` (a key of `REASONS`) why it cannot be used."""

    name: str
    data: bytes = b""
    reason: str = ""


def image_stem(name: str) -> str:
    """Return a name without its image extension, if it has one."""
    base, dot, ending = name.rpartition(".")
    return base if dot and f".{ending.lower()}" in IMAGE_ENDINGS else name


def iter_members(source: ArchiveSource, names: Collection[str], limits: ArchiveLimits | None = None) -> Iterator[Taken]:
    """Yield the listed files of an archive in order of the archive; reading stops after the last one.

    A name matches the member of that name or, at the end of the archive, the best one that differs only in the image
    extension. A name that belongs to a link or a device is yielded with a reason.

    Args:
        source: the archive's bytes.
        names: names of the members, as returned by `plain_name`.
        limits: limits of the archive.

    Raises:
        ArchiveError: the archive is damaged, truncated or beyond the limits; files yielded before are complete.
    """
    archive = Archive(source, limits)
    wanted = set(names)
    held: dict[str, tuple[int, bytes]] = {}
    by_stem: dict[str, list[str]] = {}
    for name in names:
        by_stem.setdefault(image_stem(name), []).append(name)
    for member in archive:
        name = plain_name(member.name) or ""
        if name in wanted:
            wanted.remove(name)
            yield _taken(archive, member, name)
            if not wanted:
                return
        elif member.plain and any(other in wanted for other in by_stem.get(image_stem(name), ())):
            _hold(archive, member, name, held)
    for name in sorted(wanted):
        if image_stem(name) in held:
            yield Taken(name, held[image_stem(name)][1])


def _taken(archive: Archive, member: Member, name: str) -> Taken:
    if not member.plain:
        return Taken(name, reason="unsafe_member")
    if member.size > archive.limits.max_figure:
        return Taken(name, reason="too_large")
    return Taken(name, archive.data())


def _hold(archive: Archive, member: Member, name: str, held: dict[str, tuple[int, bytes]]) -> None:
    """Keep a substitute in memory if it is better than the one known and within the limits."""
    ending = name[len(image_stem(name)) :].lower()
    rank = IMAGE_ENDINGS.index(ending) if ending in IMAGE_ENDINGS else len(IMAGE_ENDINGS)
    known = held.get(image_stem(name))
    used = sum(len(data) for _, data in held.values())
    room = min(archive.limits.max_held - used, archive.limits.max_figure)
    if (known is None or rank < known[0]) and member.size <= room:
        held[image_stem(name)] = (rank, archive.data())
