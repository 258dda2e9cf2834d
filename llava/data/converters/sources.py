"""Lookup of files by name in downloaded folders and archives.

folders, archives --unpacked into the output folder--> roots --> file("train.json"), image("xmlab1/source.jpg", "imgs")
"""

from __future__ import annotations

import fnmatch
import gzip
import itertools
import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import IO

from llava.data.download.archives import Archive, ArchiveLimits, plain_name
from llava.errors import ArchiveError, ConfigError, DataError
from llava.utils.jsonl import write_atomic
from llava.utils.log import with_progress

LIMITS = ArchiveLimits(max_members=2_000_000, max_figure=1 << 30, max_unpacked=2 << 40)
"""Limits for an archive of a whole dataset; the largest supported dataset has 377,110 images."""

FINISHED = ".unpacked"
"""Marker file in a completely unpacked folder; it holds size and time of the archive."""

PIECE = 1 << 20
"""Bytes per read."""


def is_archive(path: str | Path) -> bool:
    """Return whether the first bytes of a file are those of a zip or gzip file."""
    try:
        with open(path, "rb") as stream:
            head = stream.read(4)
    except OSError:
        return False
    return head.startswith((b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b"))


def unpack_archive(archive: Path, folder: Path, limits: ArchiveLimits = LIMITS) -> Path:
    """Unpack an archive into `folder`, unless an earlier run did so, and return `folder`.

    Raises:
        ArchiveError: the archive is damaged, encrypted or beyond the limits, or a member would leave the folder.
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
    """Return the path of a member.

    Raises:
        ArchiveError: the name of the member is absolute, leads out of the folder or is invalid.
    """
    plain = plain_name(name)
    if plain is None or plain == FINISHED:
        raise ArchiveError(f"member {name[:200]!r} would be written outside the folder", reason="unsafe_member")
    return folder / plain


def _unzip(archive: Path, folder: Path, limits: ArchiveLimits) -> None:
    try:
        with zipfile.ZipFile(archive) as file:
            members = [member for member in file.infolist() if not member.is_dir()]
            _check_sizes(members, archive.stat().st_size, limits)
            for member in with_progress(members, title=f"unpacking {archive.name}", unit="file"):
                target = _target(member.filename, folder)
                mode = member.external_attr >> 16
                if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                    raise ArchiveError(f"member {member.filename[:200]!r} is a link or device", reason="unsafe_member")
                with file.open(member) as stream:
                    _write(_pieces(stream, member.file_size), target)
    except DataError:
        raise
    except Exception as error:  # zipfile raises errors of many types: BadZipFile, struct.error, ...
        raise ArchiveError(f"cannot be unpacked ({type(error).__name__}: {error})", reason="corrupted") from error


def _check_sizes(members: list[zipfile.ZipInfo], packed: int, limits: ArchiveLimits) -> None:
    total = sum(member.file_size for member in members)
    largest = max((member.file_size for member in members), default=0)
    bomb = total > limits.max_unpacked or (total > limits.ratio_from and total > limits.max_ratio * packed)
    if bomb or len(members) > limits.max_members or largest > limits.max_figure:
        raise ArchiveError(
            f"{len(members)} files, {total} bytes unpacked from {packed}, the largest {largest}: beyond the limits. If "
            "you trust the archive, unpack it yourself and pass the folder",
            reason="bomb",
        )


def _pieces(stream: IO[bytes], size: int) -> Iterator[bytes]:
    """Yield the bytes of a member.

    Raises:
        ArchiveError: the member is not of the size that the archive states.
    """
    left = size
    while left and (piece := stream.read(min(PIECE, left))):
        left -= len(piece)
        yield piece
    if left or stream.read(1):
        raise ArchiveError("a member does not have the size that the archive states", reason="corrupted")


class _File:
    """Adapter from an open file to the reader interface of `Archive`."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def read(self) -> bytes:
        return self._stream.read(PIECE)


def _untar(archive: Path, folder: Path, limits: ArchiveLimits) -> None:
    with open(archive, "rb") as stream:
        members = Archive(_File(stream), limits)
        for member in with_progress(members, title=f"unpacking {archive.name}", unit="file"):
            if member.plain:
                _write(iter([members.data()]), _target(member.name, folder))


def _write(pieces: Iterator[bytes], target: Path) -> None:
    """Write a member under a temporary name and move it into place.

    Raises:
        ArchiveError: another member or a folder has the path of the member, or a file that of its folder.
        DataError: the file cannot be written.
    """
    if os.path.lexists(target):
        raise ArchiveError(f"two members have the path {target.name!r}", reason="unsafe_member")
    temporary = target.with_name(f".{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as stream:
            stream.writelines(pieces)
        os.replace(temporary, target)
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise ArchiveError(f"two members have the path {target.name!r}", reason="unsafe_member") from error
    except OSError as error:
        raise DataError(f"{target} cannot be written ({error.strerror or error})") from error
    finally:
        with suppress(OSError):  # the parent may be a file, and then no temporary file exists
            temporary.unlink(missing_ok=True)


DEPTH = 2
"""Levels of subfolders searched for annotation files; archives often wrap their content once or twice."""

MAX_FOLDERS = 2_000
"""Maximum number of folders in that search, so that image folders of large datasets are not listed."""


class Sources:
    """Input folders, archives and files of a converter.

    Args:
        paths: folders, archives (.zip, .tar.gz) or single files.
        work: folder for the content of archives.

    Raises:
        ConfigError: a path does not exist.
        ArchiveError: an archive cannot be unpacked safely.

    Attributes:
        files: the single files.
        roots: the folders and the unpacked archives.
    """

    def __init__(self, paths: Sequence[str | Path], work: Path) -> None:
        self.files: list[Path] = []
        self.roots: list[Path] = []
        for number, path in enumerate(Path(path) for path in paths):
            if path.is_dir():
                self.roots.append(path)
            elif not path.is_file():
                raise ConfigError(f"{path}: no such file or folder; pass the downloaded files")
            elif is_archive(path) and not _is_table(path):
                self.roots.append(unpack_archive(path, work / f"{number}-{path.name}"))
            else:
                self.files.append(path)

    @cached_property
    def folders(self) -> list[Path]:
        """Roots and their subfolders, nearest first, limited by `DEPTH` and `MAX_FOLDERS`."""
        found = list(self.roots)
        level = list(self.roots)
        for _ in range(DEPTH):
            below = (Path(entry) for folder in level for entry in _subfolders(folder))
            level = list(itertools.islice(below, MAX_FOLDERS - len(found)))
            found += level
        return found

    def file(self, *names: str) -> Path | None:
        """Return the first of these files that exists; a name may contain folders."""
        for name in names:
            for path in self.files:
                if path.name == Path(name).name:
                    return path
            for folder in self.folders:
                if (folder / name).is_file():
                    return folder / name
        return None

    def matching(self, pattern: str) -> list[Path]:
        """Return all files whose name matches the pattern, sorted."""
        found = {path for path in self.files if fnmatch.fnmatch(path.name, pattern)}
        for folder in self.folders:
            found.update(folder / name for name in _files(folder) if fnmatch.fnmatch(name, pattern))
        return sorted(found)

    def folder(self, *names: str) -> Path | None:
        """Return the first of these folders that exists."""
        return next((folder / name for name in names for folder in self.folders if (folder / name).is_dir()), None)

    def image(self, name: str, *under: str) -> Path:
        """Return the path of an image.

        Args:
            name: name in the annotation, with `/` between folders.
            under: image folders of the releases.

        Raises:
            DataError: no file or several files have that name, or the name leads out of its folder.
        """
        plain = plain_name(name)
        if plain is None:
            raise DataError(f"image name {name[:200]!r} leads out of its folder")
        for folder in self._bases(under):
            if is_file(folder / plain):
                return folder / plain
        found = self._by_name.get(plain, []) if "/" not in plain else []
        if len(found) == 1:
            return found[0]
        if found:
            raise DataError(f"image {plain} exists {len(found)} times, for example in {found[0].parent}")
        looked = ", ".join(str(folder) for folder in self._bases(under)) or "nothing"
        raise DataError(f"image {plain} is not in {looked}; pass its folder or archive as well")

    def _bases(self, under: tuple[str, ...]) -> list[Path]:
        """Return the image folders, cached by the list of names."""
        if under not in self._known_bases:
            named = [folder / name for name in under for folder in self.folders if (folder / name).is_dir()]
            self._known_bases[under] = [*named, *self.roots]
        return self._known_bases[under]

    @cached_property
    def _known_bases(self) -> dict[tuple[str, ...], list[Path]]:
        return {}

    @cached_property
    def _by_name(self) -> dict[str, list[Path]]:
        """All files below the roots by file name; built only if an image is not in its folder."""
        found: dict[str, list[Path]] = {}
        for root in self.roots:
            for folder, _, names in os.walk(root):
                for name in names:
                    found.setdefault(name, []).append(Path(folder) / name)
        return found


def is_file(path: Path) -> bool:
    """Return whether a file exists; False for an invalid name, for example a too long one."""
    try:
        return path.is_file()
    except OSError:
        return False


def _subfolders(folder: Path) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            yield from sorted(entry.path for entry in entries if entry.is_dir())
    except OSError:
        return


def _files(folder: Path) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            yield from (entry.name for entry in entries if entry.is_file())
    except OSError:
        return


def _is_table(path: Path) -> bool:
    """Return whether a gzip file is a table, not a tar archive."""
    try:
        with gzip.open(path) as stream:
            return b"ustar" not in stream.read(512)[257:263]  # the magic bytes of a tar header
    except (OSError, EOFError, zlib.error):
        return False
