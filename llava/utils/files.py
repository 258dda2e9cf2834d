"""Checks of output paths, and file locks."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from llava.errors import ConfigError
from llava.utils.cli import flag

logger = logging.getLogger(__name__)


def refuse_overwriting(read: Iterable[str | Path | None], written: Mapping[str, str | Path | None]) -> None:
    """Check that no output file overwrites an input file or another output file.

    Args:
        read: input files; None is ignored.
        written: output files by the name of their flag.

    Raises:
        ConfigError: a file would be overwritten.
    """
    taken = {Path(path).resolve() for path in read if path is not None}
    for name, path in written.items():
        if path is None:
            continue
        if Path(path).resolve() in taken:
            raise ConfigError(f"{flag(name)} {path} would overwrite an input or another output; choose another file")
        taken.add(Path(path).resolve())


@contextmanager
def hold_lock(path: str | Path, *, purpose: str) -> Iterator[None]:
    """Hold an exclusive lock on the file `path` inside the block; the lock ends with the process.

    Args:
        path: lock file; it is created empty and not removed.
        purpose: what the holder of the lock does, for the log message of waiting processes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process: %s (%s)", purpose, path)
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
