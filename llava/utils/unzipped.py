"""Files that may be gzipped, told by their first bytes: never by their name."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

GZIP_MAGIC = b"\x1f\x8b"

UNREADABLE = (OSError, EOFError, zlib.error)
"""What reading raises where a file is missing, cut off or damaged."""


@contextmanager
def open_unzipped(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, unzipped if it is gzipped.

    Raises:
        OSError: it cannot be opened; what reading may raise is in `UNREADABLE`.
    """
    with open(path, "rb") as raw:
        if raw.peek(2).startswith(GZIP_MAGIC):
            with gzip.GzipFile(fileobj=raw) as stream:
                yield cast(IO[bytes], stream)
        else:
            yield raw
