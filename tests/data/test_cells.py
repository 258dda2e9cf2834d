"""Windows around labeled cells, and their split by smear."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava.data.cells import LabeledCell, cut_window, main, read_cells, window_of
from llava.errors import ConfigError, DataError


def write_smears(folder: Path, smears: dict[str, list[dict[str, Any]]]) -> Path:
    """Write gray images of 192 x 144 pixels with a red dot at every point, and their rows."""
    (folder / "images").mkdir()
    rows = []
    for name, cells in smears.items():
        image = Image.new("RGB", (192, 144), (90, 90, 90))
        for cell in cells:
            if "point" in cell:
                image.putpixel((int(cell["point"][0] * 192), int(cell["point"][1] * 144)), (255, 0, 0))
        image.save(folder / "images" / f"{name}.png")
        rows.append({"id": name, "image": f"{name}.png", "cells": cells, "n_rbc": 3, "patient": f"p-{name}"})
    (folder / "all.json").write_text(json.dumps(rows))
    return folder / "all.json"


def run(path: Path, *more: str) -> Path:
    out = path.parent / "cells"
    main([str(path), "--image-folder", str(path.parent / "images"), "--out", str(out), *more])
    return out


def test_a_window_is_centered_on_its_point(tmp_path: Path) -> None:
    cells = [{"type": "normal", "point": [0.5, 0.5]}, {"type": "burr cell", "point": [0.0, 0.99]}]
    out = run(write_smears(tmp_path, {"a": cells}))
    rows = json.loads((out / "all.json").read_text())
    assert [(row["id"], row["type"], row["smear"]) for row in rows] == [
        ("a-000", "normal", "a"),
        ("a-001", "burr cell", "a"),
    ]
    for row in rows:
        window = Image.open(out / "images" / row["image"])
        assert window.size == (28, 28) and window.getpixel((14, 14)) == (255, 0, 0)  # 56 of 384 is 28 of 192
    assert rows[0]["patient"] == "p-a" and "n_rbc" not in rows[0]
    corner = Image.open(out / "images" / "a-001.png")
    assert corner.getpixel((0, 0)) == (90, 90, 90)  # beyond the image: its median color


@pytest.mark.parametrize(
    ("cell", "window"),
    [
        (LabeledCell("a", 0.5, 0.5), (164, 116, 220, 172)),
        (LabeledCell("a", 0.5, 0.5, 0.25, 0.1), (135, 87, 250, 202)),  # a box of 96 pixels, 1.2 times as large
        (LabeledCell("a", 0.5, 0.5, 0.1, 0.1), (164, 116, 220, 172)),
    ],
)
def test_windows(cell: LabeledCell, window: tuple[int, int, int, int]) -> None:
    assert window_of(cell, (384, 288), side=56) == window


def test_a_window_outside_of_the_image_has_one_color() -> None:
    assert cut_window(Image.new("RGB", (4, 4), (1, 2, 3)), (10, 10, 12, 12)).getcolors() == [(4, (1, 2, 3))]


def test_splits_share_no_smear(tmp_path: Path) -> None:
    cells = [{"type": "normal", "point": [x / 10, 0.5]} for x in range(1, 6)]
    out = run(write_smears(tmp_path, {f"s{i}": cells for i in range(12)}), "--fractions", "train=0.5,test=0.5")
    tables = {split: json.loads((out / f"{split}.json").read_text()) for split in ("train", "test")}
    smears = {split: {row["smear"] for row in rows} for split, rows in tables.items()}
    assert smears["train"] and smears["test"] and not smears["train"] & smears["test"]
    assert sum(map(len, smears.values())) == 12


def test_types_select_cells_and_rows_without_cells_are_left_out(tmp_path: Path) -> None:
    smears = {"a": [{"type": "WBC", "box": [0.1, 0.1, 0.4, 0.5]}, {"type": "RBC", "box": [0, 0, 0.1, 0.1]}], "b": []}
    out = run(write_smears(tmp_path, smears), "--types", "WBC")
    assert [row["type"] for row in json.loads((out / "all.json").read_text())] == ["WBC"]
    assert json.loads((out / "manifest.json").read_text())["tables"]["all"]["types"] == {"WBC": 1}


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (None, "key 'cells'"),
        ([5], r"cells\[0\]: expected an object"),
        ([{"point": [0, 0]}], "key 'type'"),
        ([{"type": "a"}], "'point' .* or 'box'"),
        ([{"type": "a", "point": [0.5]}], "key 'point': expected 2 numbers"),
        ([{"type": "a", "point": [0.5, 1.5]}], "from 0 to 1"),
        ([{"type": "a", "point": [0.5, True]}], "from 0 to 1"),
        ([{"type": "a", "box": [0.5, 0.5, 0.4, 0.6]}], "x1 < x2"),
    ],
)
def test_unusable_cells(cells: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_cells({"cells": cells})


def test_errors_name_file_and_row(tmp_path: Path) -> None:
    path = write_smears(tmp_path, {"a": [{"type": "normal", "point": [0.5, 0.5]}]})
    (tmp_path / "images" / "a.png").unlink()
    with pytest.raises(DataError, match=r"all\.json, row 0: "):
        run(path)
    with pytest.raises(ConfigError, match="--window must be"):
        run(path, "--window", "2")
