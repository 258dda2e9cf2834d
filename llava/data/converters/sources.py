"""The folders and archives a user downloaded, as one place where a reader finds its files by name.

folders, archives --unpacked beside the output--> roots --> file("train.json"), image("xmlab1/source.jpg", "imgs")
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

from llava.data.download.archives import Archive, Limits, plain_name
from llava.errors import ArchiveError, ConfigError, DataError
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


DEPTH = 2
"""Folders below a given one that are searched for annotation files: archives wrap their content once or twice."""

MAX_FOLDERS = 2_000
"""Folders that are listed in that search; picture folders of large sets are not walked."""


class Sources:
    """What the user gave.

    Args:
        paths: folders, archives (.zip, .tar.gz) or single files.
        work: folder for what archives hold.

    Raises:
        ConfigError: a path does not exist.
        ArchiveError: an archive cannot be unpacked safely.
    """

    def __init__(self, paths: Sequence[str | Path], work: Path) -> None:
        self.files: list[Path] = []
        self.roots: list[Path] = []
        for number, path in enumerate(Path(path) for path in paths):
            if path.is_dir():
                self.roots.append(path)
            elif not path.is_file():
                raise ConfigError(f"{path}: no such file or folder; give what you downloaded")
            elif is_archive(path) and not _is_table(path):
                self.roots.append(unpack(path, work / f"{number}-{path.name}"))
            else:
                self.files.append(path)

    @cached_property
    def folders(self) -> list[Path]:
        """The given folders and those below them, nearest first; a bounded number."""
        found = list(self.roots)
        level = list(self.roots)
        for _ in range(DEPTH):
            below = (Path(entry) for folder in level for entry in _subfolders(folder))
            level = list(itertools.islice(below, MAX_FOLDERS - len(found)))
            found += level
        return found

    def file(self, *names: str) -> Path | None:
        """Return the first of these files that is there; a name may hold folders."""
        for name in names:
            for path in self.files:
                if path.name == Path(name).name:
                    return path
            for folder in self.folders:
                if (folder / name).is_file():
                    return folder / name
        return None

    def matching(self, pattern: str) -> list[Path]:
        """Return all files whose name matches, in order of name."""
        found = {path for path in self.files if fnmatch.fnmatch(path.name, pattern)}
        for folder in self.folders:
            found.update(folder / name for name in _files(folder) if fnmatch.fnmatch(name, pattern))
        return sorted(found)

    def folder(self, *names: str) -> Path | None:
        """Return the first of these folders that is there."""
        return next((folder / name for name in names for folder in self.folders if (folder / name).is_dir()), None)

    def image(self, name: str, *under: str) -> Path:
        """Return a picture's file.

        Args:
            name: as the annotation writes it, with `/` between folders.
            under: folders in which releases keep pictures.

        Raises:
            DataError: there is none, several files have that name, or the name leads out of its folder.
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
            raise DataError(f"image {plain} is there {len(found)} times, for one in {found[0].parent}")
        looked = ", ".join(str(folder) for folder in self._bases(under)) or "nothing"
        raise DataError(f"image {plain} is not in {looked}; give its folder or archive too")

    def _bases(self, under: tuple[str, ...]) -> list[Path]:
        """Return the folders of pictures, found once for each list of names."""
        if under not in self._known_bases:
            named = [folder / name for name in under for folder in self.folders if (folder / name).is_dir()]
            self._known_bases[under] = [*named, *self.roots]
        return self._known_bases[under]

    @cached_property
    def _known_bases(self) -> dict[tuple[str, ...], list[Path]]:
        return {}

    @cached_property
    def _by_name(self) -> dict[str, list[Path]]:
        """Every file below the given folders by its last name; read only when a picture is not where it should be."""
        found: dict[str, list[Path]] = {}
        for root in self.roots:
            for folder, _, names in os.walk(root):
                for name in names:
                    found.setdefault(name, []).append(Path(folder) / name)
        return found


def is_file(path: Path) -> bool:
    """Say whether a file is there; a name that no file can have (too long, for one) is not."""
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
    """Say whether a gzipped file is one table and no archive: a tar archive says so in its 258th byte and on."""
    try:
        with gzip.open(path) as stream:
            return b"ustar" not in stream.read(512)[257:263]
    except (OSError, EOFError, zlib.error):
        return False
