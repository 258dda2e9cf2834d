"""Files that a command writes, held against those that it reads."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from llava.errors import ConfigError


def refuse_overwriting(read: Iterable[str | Path | None], written: Mapping[str, str | Path | None]) -> None:
    """Make sure that no file is written over one that is read, or over another that is written.

    Args:
        read: files that are read; None are none.
        written: files that are written, by the flag that names them.

    Raises:
        ConfigError: one would be: data, or replies that were paid for, would be lost.
    """
    taken = {Path(path).resolve() for path in read if path is not None}
    for flag, path in written.items():
        if path is None:
            continue
        if Path(path).resolve() in taken:
            raise ConfigError(f"--{flag} {path} would overwrite what is read or written besides; name another file")
        taken.add(Path(path).resolve())


logger = logging.getLogger(__name__)


@contextmanager
def hold(path: str | Path, *, purpose: str) -> Iterator[None]:
    """Hold the lock file `path` inside the block; it ends with the process, however that ends.

    Args:
        path: an empty file that is made for the purpose and left behind.
        purpose: what the other process is doing, for the message of the one that waits.
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
