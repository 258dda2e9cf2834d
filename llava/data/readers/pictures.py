"""Pictures into the `images/` folder of an output: linked, copied, or written from bytes; never half of one.

A link here is a second name of the same file (a hard link): symbolic links that lead out of an image folder are refused
when rows are read. Where the file system cannot link, pictures are copied.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from llava.data.download.archives import plain_name
from llava.errors import DataError
from llava.imaging.decode import content_digest
from llava.utils.log import warn_once

logger = logging.getLogger(__name__)

WAYS = ("link", "copy")
ENDINGS = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"GI": ".gif", b"II": ".tif", b"MM": ".tif", b"BM": ".bmp"}
"""First two bytes of picture files."""


def name_of_bytes(data: bytes) -> str:
    """Return a name for a picture that has none: a part of its digest, so equal pictures are one file."""
    return f"{content_digest(data)[:20]}{ENDINGS.get(data[:2], '.img')}"


class Pictures:
    """The folder `images/` of one output.

    Args:
        folder: where pictures go.
        way: one of `WAYS`.
    """

    def __init__(self, folder: Path, way: str) -> None:
        self.folder = folder
        self.way = way
        self._placed: dict[str, Path | int] = {}

    def place(self, name: str, image: Path | bytes) -> None:
        """Put a picture there, unless it is there from an earlier run.

        Raises:
            DataError: it cannot be read or written, the name leads out of the folder, or another picture has it.
        """
        if plain_name(name) != name:
            raise DataError(f"image name {name[:200]!r} is no plain relative name")
        identity = image if isinstance(image, Path) else hash(image)
        if (known := self._placed.get(name)) is not None:
            if known != identity:
                raise DataError(f"two different pictures are called {name}")
            return
        target = self.folder / name
        try:
            if not _is_there(target, image):
                target.parent.mkdir(parents=True, exist_ok=True)
                self._write(target, image)
        except OSError as error:
            raise DataError(f"image {name} cannot be placed in {self.folder} ({error.strerror or error})") from error
        self._placed[name] = identity

    def _write(self, target: Path, image: Path | bytes) -> None:
        temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            if isinstance(image, bytes):
                temporary.write_bytes(image)
            elif self.way == "link":
                self._link(image, temporary)
            else:
                shutil.copy2(image, temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def _link(self, image: Path, temporary: Path) -> None:
        try:
            os.link(os.path.realpath(image), temporary)
        except FileNotFoundError:
            raise
        except OSError as error:
            warn_once(logger, f"pictures cannot be linked to {self.folder} ({error.strerror}); they are copied")
            shutil.copy2(image, temporary)


def _is_there(target: Path, image: Path | bytes) -> bool:
    """Say whether a picture was placed before: the same file, or one of the same size and time."""
    if not target.is_file():
        return False
    found = target.stat()
    if isinstance(image, bytes):
        return found.st_size == len(image) and target.read_bytes() == image
    wanted = image.stat()
    same_times = (found.st_size, found.st_mtime_ns) == (wanted.st_size, wanted.st_mtime_ns)
    return os.path.samestat(found, wanted) or same_times
