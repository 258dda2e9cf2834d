"""One process at a time: so that ranks that start together compute what they share once."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
