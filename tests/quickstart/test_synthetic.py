"""Drawings follow their ground truth, repeat by seed, and ask balanced questions about unseen images."""

from __future__ import annotations

import json
import math
import random
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava.quickstart import synthetic
from llava.quickstart.synthetic import DENSITIES, SIDE, STAINS, Cell, Smear, corner_of, draw_smear, sample_smear
from llava.samples import from_row


def difference(first: Smear, second: Smear) -> np.ndarray[Any, Any]:
    """Return where two drawings differ, [H, W] of bool."""
    pixels = [np.asarray(draw_smear(smear), dtype=int) for smear in (first, second)]
    return np.asarray(np.abs(pixels[0] - pixels[1]).sum(axis=2) > 30)


def test_a_seed_gives_the_same_image() -> None:
    assert draw_smear(sample_smear(5)).tobytes() == draw_smear(sample_smear(5)).tobytes()
    assert draw_smear(sample_smear(5)).tobytes() != draw_smear(sample_smear(6)).tobytes()
    assert draw_smear(sample_smear(5)).size == (SIDE, SIDE)


def test_the_truth_is_within_its_ranges() -> None:
    smears = [sample_smear(seed) for seed in range(200)]
    for smear in smears:
        low, high = DENSITIES[smear.density]
        assert low <= len(smear.red) <= high
        assert len(smear.white) <= 3 and len({cell.kind for cell in smear.white}) <= 1
        assert all(0 <= cell.x <= SIDE and 0 <= cell.y <= SIDE for cell in (*smear.red, *smear.white))
    assert {smear.stain for smear in smears} == STAINS.keys()
    assert {len(smear.white) for smear in smears} == {0, 1, 2, 3}
    share = sum(bool(smear.platelets) for smear in smears) / len(smears)
    assert math.isclose(share, 0.5, abs_tol=0.12)


def test_a_white_cell_changes_the_image_in_its_own_quarter_only() -> None:
    smear = next(s for s in map(sample_smear, range(100)) if len(s.white) == 1)
    changed = difference(smear, replace(smear, white=()))
    rows, columns = np.nonzero(changed)
    center = Cell("any", float(columns.mean()), float(rows.mean()), 1.0)
    assert changed.sum() > 500
    assert corner_of(center) == corner_of(smear.white[0])


def test_parasites_and_platelets_are_drawn() -> None:
    smear = next(s for s in map(sample_smear, range(100)) if s.platelets and s.parasites)
    assert difference(smear, replace(smear, platelets=())).sum() > 50
    assert difference(smear, replace(smear, parasites=())).sum() > 50


def test_answers_follow_the_truth() -> None:
    smear = sample_smear(0)
    cell = Cell("lymphocyte", 30.0, 200.0, 25.0)
    smear = replace(smear, white=(cell,), platelets=(), parasites=(0,), stain="blue", density="sparse")
    answers = {question.name: question.answer(smear) for question in synthetic.QUESTIONS}
    assert answers == {
        "white_presence": "yes",
        "platelet_presence": "no",
        "parasite_presence": "yes",
        "white_count": "one",
        "white_type": "lymphocyte",
        "white_place": "lower left",
        "stain": "blue",
        "density": "sparse",
    }
    text = synthetic.smear_caption(smear)
    assert text.startswith("Synthetic") and "one lymphocyte in the lower left" in text and "no platelets" in text
    without = replace(smear, white=())
    asked = {row["question_type"] for row in synthetic.question_rows(without, "a.png", random.Random(0))}
    assert "white_type" not in asked and "white_place" not in asked and "white_count" in asked


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("drawn")
    synthetic.write_dataset(path, num_train=60, num_test=40, seed=3)
    return path


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / name).read_text())
    return rows


def test_every_answer_is_equally_frequent_within_its_type(folder: Path) -> None:
    for name in ("train.json", "test.json"):
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for row in rows_of(folder, name):
            counts[row["question_type"]][row["conversations"][1]["value"]] += 1
        assert set(counts) == {question.name for question in synthetic.QUESTIONS}
        for counter in counts.values():
            assert len(set(counter.values())) == 1 and len(counter) > 1


def test_rows_are_llava_rows_marked_synthetic(folder: Path) -> None:
    for name in ("captions.json", "train.json", "test.json"):
        rows = rows_of(folder, name)
        assert len({row["id"] for row in rows}) == len(rows)
        for row in rows:
            sample = from_row(row)
            assert sample.images == (row["image"],) and row["image"].startswith("synthetic-")
            assert "SYNTHETIC" in row["source"]
            assert (folder / "images" / row["image"]).is_file()
    first = rows_of(folder, "train.json")[0]["image"]
    assert "SYNTHETIC" in Image.open(folder / "images" / first).info["Comment"]


def test_test_images_are_unseen(folder: Path) -> None:
    pixels = {
        split: {Image.open(path).tobytes() for path in (folder / "images").glob(f"synthetic-{split}-*.png")}
        for split in ("train", "test")
    }
    assert len(pixels["train"]) == 60 and len(pixels["test"]) == 40
    assert not pixels["train"] & pixels["test"]


def test_the_same_seed_writes_the_same_files(folder: Path, tmp_path: Path) -> None:
    synthetic.write_dataset(tmp_path, num_train=60, num_test=40, seed=3)
    for name in ("captions.json", "train.json", "test.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_a_pick_spreads_over_the_images() -> None:
    rows = [{"id": f"{image}-{number}", "image": f"{image}.png"} for image in range(6) for number in range(image + 1)]
    picked = synthetic.pick_rows(rows, 8, seed=0)
    assert len(picked) == 8 and [row for row in rows if row in picked] == picked
    assert {row["image"] for row in picked} == {f"{image}.png" for image in range(6)}
    assert synthetic.pick_rows(rows, 100, seed=0) == rows
    assert synthetic.pick_rows(rows, 8, seed=0) == picked != synthetic.pick_rows(rows, 8, seed=1)
