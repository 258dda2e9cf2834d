"""Small data files and images for the tests of `llava data check`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava.data.check.report import CheckReport, check_file
from llava.data.check.rules import RULES


def row(number: int, image: str | None = None, **fields: Any) -> dict[str, Any]:
    """Return a row with its own question and answer; `fields` are added or replace others."""
    turns = [
        {"from": "human", "value": f"{'<image>' if image else ''}\nIs sign {number} seen here?"},
        {"from": "gpt", "value": f"Sign {number} is."},
    ]
    return {"id": f"row {number}", **({"image": image} if image else {}), "conversations": turns, **fields}


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    """Write rows as a JSON array."""
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def smooth(seed: int, side: int = 64) -> Image.Image:
    """Return a gray image of random soft spots that depends on the seed."""
    spots = np.random.default_rng(seed).integers(30, 226, (12, 12), dtype=np.uint8)
    return Image.fromarray(spots).resize((side, side), Image.Resampling.BICUBIC)


def rules_of(report: CheckReport) -> dict[str, list[int]]:
    """Return the rows of the checked file by rule."""
    return {
        rule: sorted(set(report.findings.of(rule, file).rows)) for rule, file in report.findings.rules() if file == 0
    }


def check_rows(tmp_path: Path, rows: Sequence[Any], **options: Any) -> dict[str, list[int]]:
    """Check an array of rows; return the rows by rule."""
    found = rules_of(check_file(write_rows(tmp_path / "rows.json", rows), **options))
    assert found.keys() <= RULES.keys()
    return found
