"""Files of a run of reinforcement learning, read without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava.errors import DataError
from llava.utils.json_rows import iter_rows

ROLLOUTS_FILE = "rollouts.jsonl"


def read_rollouts(folder: Path) -> list[dict[str, Any]]:
    """Return the episodes of a run; an incomplete last line, which a killed run left, is dropped.

    Raises:
        DataError: the folder has no `rollouts.jsonl`, or another line of it is broken.
    """
    path = folder / ROLLOUTS_FILE
    rows = list(iter_rows(path, lines=True))
    broken = [number for number, row in rows if not isinstance(row, dict)]
    if broken and broken != [rows[-1][0]]:
        raise DataError(f"{path}, row {broken[0]}: expected an object; the file was changed")
    return [row for _, row in rows if isinstance(row, dict)]
