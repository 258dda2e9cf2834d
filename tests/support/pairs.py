"""Files of preference pairs about the tiny images, and their training runs."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tests.support.runs import arguments
from tests.support.tiny import tiny_image


def write_pairs(folder: Path, num_pairs: int = 12, *, num_images: int = 3, seed: int = 0) -> Path:
    """Write pairs about a few images, every fifth without one; return the data file."""
    draw = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(num_images):
        tiny_image(number).save(folder / "images" / f"{number}.png")
    rows = []
    for number in range(num_pairs):
        has_image = number % 5 != 4
        sides = [" ".join(draw.choice("abcdefg") for _ in range(draw.randrange(1, 12))) for _ in range(2)]
        row = {"id": str(number), "prompt": f"Question {number}?", "chosen": f"y {sides[0]}", "rejected": sides[1]}
        rows.append(row | ({"image": f"{number % num_images}.png"} if has_image else {}))
    path = folder / "pairs.json"
    path.write_text(json.dumps(rows))
    return path


def pair_arguments(parts: Path, output: Path, **changed: object) -> list[str]:
    """Return the command line of a short preference training of the pairs in `parts`."""
    options: dict[str, object] = {
        "objective": "dpo",
        "data_path": parts / "pairs" / "pairs.json",
        "image_folder": parts / "pairs" / "images",
        "max_steps": 2,
        "learning_rate": 1e-3,
    }
    return arguments(parts, output, **options | changed)
