"""The two files of a generation run: answers, and rows that failed.

    append_answer / append_failure (in order of arrival)   ...   settle: both files in the order of the captions

A line is written as soon as its answer is there, so a killed run loses what was under way and nothing else. In the end
the files are put into the order of the captions, so that a run in one go and a resumed one leave the same files.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from llava.errors import DataError
from llava.openai_failures import ApiFailure
from llava.utils.jsonl import append, drop_torn_line, write_atomic

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Line:
    """Where one row lies in its file, and what is counted of it."""

    start: int
    length: int
    num_prompt: int
    num_answer: int
    reason: str


class Results:
    """The files `NAME.jsonl` and `NAME.failed.jsonl`, and what is in them.

    Args:
        path: the file of answers.

    Raises:
        DataError: a line of either file is not a row of it; names file and line.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        stem = self.path.name.removesuffix(".jsonl")
        self.failed_path = self.path.with_name(f"{stem}.failed.jsonl")
        self.answered = {key: line for key, line in _lines(self.path).items() if not line.reason}
        self.failed = {key: line for key, line in _lines(self.failed_path).items() if key not in self.answered}

    def repair(self) -> None:
        """Remove last lines that a killed process left half written, before more are appended."""
        for file in (self.path, self.failed_path):
            drop_torn_line(file)

    def append_answer(self, row: Row, answer: str, *, model: str, tokens: tuple[int, int]) -> None:
        """Write one answered row: the caption row, `result`, and who wrote it for how many tokens."""
        note = {"model": model, "prompt_tokens": tokens[0], "answer_tokens": tokens[1]}
        append(self.path, {**row, "result": answer, "generation": note})

    def append_failure(self, row: Row, failure: ApiFailure) -> None:
        """Write one row that failed: the caption row and `failure`."""
        note = {
            "reason": failure.reason,
            "detail": failure.detail,
            "attempts": failure.num_attempts,
            "prompt_tokens": failure.num_prompt_tokens,
            "answer_tokens": failure.num_answer_tokens,
        }
        append(self.failed_path, {**row, "failure": note})

    def spent(self) -> tuple[int, int]:
        """Return the tokens of prompts and answers that both files account for."""
        lines = [*self.answered.values(), *self.failed.values()]
        return sum(line.num_prompt for line in lines), sum(line.num_answer for line in lines)

    def settle(self, order: Mapping[str, int]) -> None:
        """Put both files into an order, each row once; a row that was answered in the end is no failure any more.

        Args:
            order: place of each id; others come after, as they lie.
        """
        answered = {key: line for key, line in _lines(self.path).items() if not line.reason}
        failed = {key: line for key, line in _lines(self.failed_path).items() if key not in answered}
        for path, lines in ((self.path, answered), (self.failed_path, failed)):
            places = sorted(lines, key=lambda key: (order.get(key, len(order)), lines[key].start))
            _rewrite(path, [lines[key] for key in places])
        if not failed:
            self.failed_path.unlink(missing_ok=True)
        self.answered, self.failed = answered, failed


def _lines(path: Path) -> dict[str, Line]:
    """Return the last line of each id; only places are kept, not the texts. A torn end of the file is no line."""
    found: dict[str, Line] = {}
    if not path.exists():
        return found
    start = 0
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            torn = not raw.endswith(b"\n") and not _is_json(raw)
            if raw.strip() and not torn:
                key, line = _read(raw, start, f"{path}, line {number}")
                found[key] = line
            start += len(raw)
    return found


def _is_json(raw: bytes) -> bool:
    try:
        json.loads(raw)
    except ValueError:
        return False
    return True


def _read(raw: bytes, start: int, where: str) -> tuple[str, Line]:
    try:
        row = json.loads(raw)
    except ValueError:
        raise DataError(f"{where}: not JSON; remove the line or choose another --output-path") from None
    if not isinstance(row, dict) or not isinstance(row.get("pair_id"), str):
        raise DataError(f"{where}: expected an object with 'pair_id'; is this file from another program?")
    failure = row.get("failure")
    note = failure if isinstance(failure, dict) else row.get("generation")
    note = note if isinstance(note, dict) else {}
    prompt, answer = (note.get(name, 0) for name in ("prompt_tokens", "answer_tokens"))
    good = isinstance(row.get("result"), str) and bool(row["result"].strip())
    reason = "" if good else str(note.get("reason", "no_answer"))
    return row["pair_id"], Line(start, len(raw), int(prompt), int(answer), reason)


def _rewrite(path: Path, lines: list[Line]) -> None:
    """Make a file of these of its lines, in this order, atomically and without holding them all."""
    if not path.exists():
        return
    if not lines:
        write_atomic(path, b"")
        return
    tidy = all(line.start == before.start + before.length for before, line in pairwise(lines))
    if tidy and lines[0].start == 0 and lines[-1].start + lines[-1].length == path.stat().st_size:
        return
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as target, path.open("rb") as source:
            for line in lines:
                source.seek(line.start)
                target.write(source.read(line.length).rstrip(b"\n") + b"\n")
        os.chmod(temporary, path.stat().st_mode)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
