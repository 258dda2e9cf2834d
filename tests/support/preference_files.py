"""Files of questions, answers and judgments for tests of the commands that make preference pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.tiny import tiny_image


def answered(number: int, answers: Sequence[str] = ("The lung is clear.", "no"), **fields: Any) -> dict[str, Any]:
    """Return a row of answers; pairs of questions share an image."""
    row = {"id": str(number), "img": f"{number // 2}.png", "prompt": f"Question {number}?", "answers": list(answers)}
    return row | fields


def write_answers(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows of answers and their images; return the file."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(sorted({row["img"] for row in rows if "img" in row})):
        tiny_image(number).save(folder / "images" / name)
    path = folder / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
