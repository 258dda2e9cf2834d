"""The folders and archives a user downloaded, as one place where a reader finds its files by name.

folders, archives --unpacked beside the output--> roots --> file("train.json"), image("xmlab1/source.jpg", "imgs")
"""

from __future__ import annotations

import fnmatch
import gzip
import itertools
import os
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from llava.data.download.archives import plain_name
from llava.data.readers.unpacking import is_archive, unpack
from llava.errors import ConfigError, DataError

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
