"""Files that a command writes, held against those that it reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
