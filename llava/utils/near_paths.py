"""Hints for paths that do not exist: a similar name in the same folder."""

from __future__ import annotations

from pathlib import Path

from llava.utils.cli import near_options

MAX_NAMES = 1000
"""Names of a folder that are compared."""


def near_path(path: str | Path) -> str:
    """Return the hint for a path that does not exist: its parent, or a similar name in it; or nothing."""
    parent = Path(path).parent
    if not parent.is_dir():
        return f" ({parent} does not exist either)"
    try:
        names = sorted(item.name for item in parent.iterdir())[:MAX_NAMES]
    except OSError:
        return ""
    return near_options([Path(path).name], names)
