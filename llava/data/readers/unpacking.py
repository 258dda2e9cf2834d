"""A downloaded .zip or .tar.gz into a folder of its own, safely: no path leaves it, no link is made, no bomb fits.

    archive --members--> plain relative name? size within the limits? --> file under a temporary name --> folder

A second call with the same archive finds the folder finished and unpacks nothing.
"""

from __future__ import annotations

import os
import shutil
import stat
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

from llava.data.download.archives import Archive, Limits, plain_name
from llava.errors import ArchiveError, DataError
from llava.utils.jsonl import write_atomic
from llava.utils.log import progress

LIMITS = Limits(max_members=2_000_000, max_figure=1 << 30, max_unpacked=2 << 40)
"""What a whole data set may cost: the largest of those read here has 377,110 pictures."""

FINISHED = ".unpacked"
"""Marker inside a folder that was unpacked to its end; it holds size and time of the archive."""

PIECE = 1 << 20


def is_archive(path: str | Path) -> bool:
    """Say whether a file is a zip or gzipped archive, by its first bytes."""
    try:
        with open(path, "rb") as stream:
            head = stream.read(4)
    except OSError:
        return False
    return head.startswith((b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b"))


def unpack(archive: Path, folder: Path, limits: Limits = LIMITS) -> Path:
    """Unpack an archive into `folder` unless that was done before, and return `folder`.

    Raises:
        ArchiveError: it is damaged, encrypted, beyond the limits, or a member would leave the folder.
    """
    found = archive.stat()
    state = f"{found.st_size} {found.st_mtime_ns}\n"
    marker = folder / FINISHED
    if marker.is_file() and marker.read_text(encoding="utf-8") == state:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        if zipfile.is_zipfile(archive):
            _unzip(archive, folder, limits)
        else:
            _untar(archive, folder, limits)
    except ArchiveError as error:
        raise ArchiveError(f"{archive}: {error}", reason=error.reason) from error
    write_atomic(marker, state)
    return folder


def _target(name: str, folder: Path) -> Path:
    """Return where a member goes.

    Raises:
        ArchiveError: its name is absolute, leads upwards or is no name.
    """
    plain = plain_name(name)
    if plain is None or plain == FINISHED:
        raise ArchiveError(f"member {name[:200]!r} would be written outside the folder", reason="unsafe_member")
    return folder / plain


def _unzip(archive: Path, folder: Path, limits: Limits) -> None:
    try:
        with zipfile.ZipFile(archive) as file:
            members = [member for member in file.infolist() if not member.is_dir()]
            _check_sizes(members, archive.stat().st_size, limits)
            for member in progress(members, title=f"unpacking {archive.name}", unit="file"):
                target = _target(member.filename, folder)
                mode = member.external_attr >> 16
                if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                    raise ArchiveError(f"member {member.filename[:200]!r} is a link or device", reason="unsafe_member")
                with file.open(member) as stream:
                    _write(_pieces(stream, member.file_size), target)
    except DataError:
        raise
    except Exception as error:  # the library raises whatever its parsing runs into: BadZipFile, struct.error, ...
        raise ArchiveError(f"cannot be unpacked ({type(error).__name__}: {error})", reason="corrupted") from error


def _check_sizes(members: list[zipfile.ZipInfo], packed: int, limits: Limits) -> None:
    total = sum(member.file_size for member in members)
    largest = max((member.file_size for member in members), default=0)
    bomb = total > limits.max_unpacked or (total > limits.ratio_from and total > limits.max_ratio * packed)
    if bomb or len(members) > limits.max_members or largest > limits.max_figure:
        raise ArchiveError(
            f"{len(members)} files, {total} bytes unpacked from {packed}, the largest {largest}: more than the limits "
            "allow; unpack it yourself if you trust it, and give the folder",
            reason="bomb",
        )


def _pieces(stream: IO[bytes], size: int) -> Iterator[bytes]:
    """Yield the bytes of a member; more than its announced size cannot come."""
    left = size
    while left and (piece := stream.read(min(PIECE, left))):
        left -= len(piece)
        yield piece
    if left or stream.read(1):
        raise ArchiveError("a member is not of the size it states", reason="corrupted")


class _File:
    """An open file as the source that `Archive` reads."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def read(self) -> bytes:
        return self._stream.read(PIECE)


def _untar(archive: Path, folder: Path, limits: Limits) -> None:
    with open(archive, "rb") as stream:
        members = Archive(_File(stream), limits)
        for member in progress(members, title=f"unpacking {archive.name}", unit="file"):
            if member.plain:
                _write(iter([members.data()]), _target(member.name, folder))


def _write(pieces: Iterator[bytes], target: Path) -> None:
    """Write a member under a temporary name and move it into place.

    Raises:
        DataError: the place is taken by a folder, or a folder's by a file.
    """
    temporary = target.with_name(f".{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as stream:
            stream.writelines(pieces)
        os.replace(temporary, target)
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise ArchiveError(f"two members want the place {target.name!r}", reason="unsafe_member") from error
    except OSError as error:
        raise DataError(f"{target} cannot be written ({error.strerror or error})") from error
    finally:
        with suppress(OSError):  # the folder may be a file, then there is nothing to remove
            temporary.unlink(missing_ok=True)
