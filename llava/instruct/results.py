"""Files of a generation run: answers, and failed rows.

    append_answer / append_failure (in order of arrival)   ...   settle: both files in the order of the captions

A row is written when its answer arrives, so a killed run loses only the requests in flight. At the end the files are
sorted in the order of the captions, so an uninterrupted and a resumed run write equal files.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from llava.errors import DataError
from llava.openai_transport import ApiFailure
from llava.utils.jsonl import append_record, drop_incomplete_line, write_atomic

Row = Mapping[str, Any]

WASTED = "wasted"
"""Field with the tokens of unusable attempts, which count as spent."""


@dataclass(frozen=True, slots=True)
class Line:
    """Position of one row in its file, and its counts.

    Attributes:
        start: offset of the first byte.
        length: length in bytes.
        spent: tokens of prompts and answers, including failed attempts.
        num_answer: tokens of the answer alone.
        reason: reason of a failure.
    """

    start: int
    length: int
    spent: tuple[int, int]
    num_answer: int
    reason: str = ""


class Results:
    """Files `NAME.jsonl` and `NAME.failed.jsonl` with an index of their rows.

    Args:
        path: the file of answers.

    Raises:
        DataError: a line of either file is not a row of this command; the message names file and line.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        stem = self.path.name.removesuffix(".jsonl")
        self.failed_path = self.path.with_name(f"{stem}.failed.jsonl")
        self.answered = _lines(self.path, _read_answer)
        self.failed = _without(_lines(self.failed_path, _read_failure), self.answered)

    def repair(self) -> None:
        """Remove incomplete last lines, left by a killed process, before rows are appended."""
        for file in (self.path, self.failed_path):
            drop_incomplete_line(file)

    def append_answer(
        self, row: Row, answer: str, *, model: str, tokens: tuple[int, int], wasted: tuple[int, int] = (0, 0)
    ) -> None:
        """Append one answered row: the caption row, `result`, and `generation` with model and tokens.

        Args:
            row: the caption row.
            answer: the text.
            model: name of the model as the endpoint states it.
            tokens: tokens of prompt and answer.
            wasted: tokens of unusable attempts.
        """
        note: dict[str, Any] = {"model": model, **_counts(tokens)}
        lost = self._lost(row, wasted)
        append_record(
            self.path, {**row, "result": answer, "generation": note | ({WASTED: _counts(lost)} if any(lost) else {})}
        )

    def append_failure(self, row: Row, failure: ApiFailure) -> None:
        """Append one failed row: the caption row and `failure`."""
        lost = self._lost(row, (failure.num_prompt_tokens, failure.num_answer_tokens))
        note = {"reason": failure.reason, "detail": failure.detail, "attempts": failure.num_attempts}
        append_record(self.failed_path, {**row, "failure": {**note, WASTED: _counts(lost)}})

    def _lost(self, row: Row, tokens: tuple[int, int]) -> tuple[int, int]:
        """Return these tokens plus those of an earlier failure, whose line will be removed."""
        earlier = self.failed.get(row["pair_id"])
        return tokens if earlier is None else (tokens[0] + earlier.spent[0], tokens[1] + earlier.spent[1])

    def spent(self) -> tuple[int, int]:
        """Return the tokens of prompts and answers in both files."""
        lines = [*self.answered.values(), *self.failed.values()]
        return sum(line.spent[0] for line in lines), sum(line.spent[1] for line in lines)

    def settle(self, order: Mapping[str, int]) -> None:
        """Sort both files, each id once, and remove answered rows from the failed ones.

        Args:
            order: position of each id; other ids follow in the order of the file.
        """
        answered = _lines(self.path, _read_answer)
        failed = _without(_lines(self.failed_path, _read_failure), answered)
        for path, lines in ((self.path, answered), (self.failed_path, failed)):
            places = sorted(lines, key=lambda key: (order.get(key, len(order)), lines[key].start))
            _rewrite(path, [lines[key] for key in places])
        if not failed:
            self.failed_path.unlink(missing_ok=True)
        self.answered, self.failed = answered, failed


def _without(lines: dict[str, Line], others: Mapping[str, Line]) -> dict[str, Line]:
    return {key: line for key, line in lines.items() if key not in others}


def _counts(tokens: tuple[int, int]) -> dict[str, int]:
    return {"prompt_tokens": tokens[0], "answer_tokens": tokens[1]}


def _tokens(note: object) -> tuple[int, int]:
    """Return the counts that `_counts` wrote; 0 for values that are not numbers."""
    values = [note.get(name) if isinstance(note, dict) else 0 for name in ("prompt_tokens", "answer_tokens")]
    prompt, answer = (value if isinstance(value, int) else 0 for value in values)
    return prompt, answer


def _lines(path: Path, read: Callable[[dict[str, Any], int, int], Line | None]) -> dict[str, Line]:
    """Return the last line of each id, without its text; an incomplete last line is ignored."""
    found: dict[str, Line] = {}
    if not path.exists():
        return found
    start = 0
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            row = _decode(raw)
            if row is not _BROKEN or raw.endswith(b"\n"):
                key = row.get("pair_id") if isinstance(row, dict) else None
                line = read(row, start, len(raw)) if isinstance(row, dict) else None
                if line is not None and isinstance(key, str):
                    found[key] = line
                elif raw.strip():
                    raise DataError(f"{path}, line {number}: not a row of this command; choose another --output-path")
            start += len(raw)
    return found


_BROKEN = object()


def _decode(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return _BROKEN


def _read_answer(row: dict[str, Any], start: int, length: int) -> Line | None:
    note, result = row.get("generation"), row.get("result")
    if not isinstance(result, str) or not result.strip():
        return None
    (prompt, answer), lost = _tokens(note), _tokens(note.get(WASTED) if isinstance(note, dict) else None)
    return Line(start, length, (prompt + lost[0], answer + lost[1]), answer)


def _read_failure(row: dict[str, Any], start: int, length: int) -> Line | None:
    note = row.get("failure")
    if not isinstance(note, dict):
        return None
    return Line(start, length, _tokens(note.get(WASTED)), 0, str(note.get("reason", "unknown")))


def _rewrite(path: Path, lines: list[Line]) -> None:
    """Rewrite a file atomically with these of its lines in this order, reading one line at a time."""
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
