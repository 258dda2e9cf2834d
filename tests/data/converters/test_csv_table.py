"""`llava data csv`: conversion of tables by column name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava.data.converters.csv_table import main
from llava.data.records import load_samples
from llava.errors import ConfigError, DataError
from tests.support.releases import image_bytes, rows_in, write_csv, write_image


def table(folder: Path, **changes: Any) -> list[str]:
    rows = [
        {"file": "a", "q": "Normal?", "a": "yes", "who": "p1", "part": "train", "age": 40},
        {"file": "b", "q": "What is it?", "a": "None", "who": "p2", "part": "dev", "age": 50},
    ]
    rows[1].update(changes)
    for name in ("a", "b"):
        write_image(folder / "scans" / f"{name}.png")
    path = write_csv(folder / "cases.csv", rows)
    flags = {"image_root": str(folder / "scans"), "image_suffix": ".png", "image_column": "file", "answer_column": "a"}
    return [str(path), "--out", str(folder / "out"), *(word for name in flags for word in (f"--{name}", flags[name]))]


def test_columns_become_fields(tmp_path: Path) -> None:
    more = ["--question_column", "q", "--patient_column", "who", "--split_column", "part", "--keep", "age"]
    main([*table(tmp_path), *more, "--source", "Our hospital", "--license", "internal"])
    assert rows_in(tmp_path / "out" / "train.json") == [
        {
            "id": "cases_0",
            "image": "a.png",
            "conversations": [{"from": "human", "value": "<image>\nNormal?"}, {"from": "gpt", "value": "yes"}],
            "answer_type": "CLOSED",
            "patient": "p1",
            "age": "40",
            "source": "Our hospital",
            "license": "internal",
        }
    ]
    assert rows_in(tmp_path / "out" / "val.json")[0]["conversations"][1]["value"] == "None"
    assert json.loads((tmp_path / "out/manifest.json").read_text())["license"] == "internal"


def test_one_question_for_all(tmp_path: Path) -> None:
    main([*table(tmp_path), "--question", "Describe the scan."])
    rows = rows_in(tmp_path / "out" / "train.json")
    assert [row["conversations"][0]["value"] for row in rows] == ["<image>\nDescribe the scan."] * 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"file": "c"}, r"row 1, id 'cases_1': image c\.png is not in"),
        ({"file": "x" * 300}, "is not in"),
        ({"file": ""}, "names no image"),
        ({"file": "../scans/a"}, "leads out of --image-root"),
        ({"file": "/etc/passwd"}, "lies outside --image-root"),
        ({"a": ""}, "the answer is empty"),
        ({"part": "sometimes"}, r"column 'part' holds str of length 9; expected a split, one of .*val"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, changes: dict[str, str], reason: str) -> None:
    with pytest.raises(DataError, match=rf"cases\.csv, row 1.*{reason}|{reason}"):
        main([*table(tmp_path, **changes), "--split_column", "part"])


def test_links_that_the_user_put_into_the_folder_are_followed_and_become_files(tmp_path: Path) -> None:
    """Names must not leave --image-root, but links inside of it are followed."""
    write_image(tmp_path / "store" / "c.png")
    words = table(tmp_path, file="ward/c")
    (tmp_path / "scans" / "ward").symlink_to(tmp_path / "store")
    main(words)
    placed = tmp_path / "out" / "images" / "ward" / "c.png"
    assert placed.read_bytes() == (tmp_path / "store" / "c.png").read_bytes() and not placed.is_symlink()
    assert len(load_samples(tmp_path / "out" / "train.json", image_folder=tmp_path / "out" / "images")) == 2
    for name in ("ward/../ward/c", f"{tmp_path}/scans/../store/c", f"{tmp_path}/store/c"):
        with pytest.raises(DataError, match=r"lies outside|leads out of"):
            main([*table(tmp_path, file=name), "--overwrite"])


@pytest.mark.parametrize("column", ["a", "q", "who", "file"])
def test_booleans_are_not_text(tmp_path: Path, column: str) -> None:
    words = table(tmp_path)
    row = {"file": "a", "q": "Normal?", "a": "yes", "who": "p1", "seen": True}
    (tmp_path / "cases.json").write_text(json.dumps([row, {**row, column: True}]))
    more = ["--question_column", "q", "--patient_column", "who", "--keep", "seen"]
    with pytest.raises(DataError, match=rf"row 1, .*column '{column}' holds a boolean"):
        main([str(tmp_path / "cases.json"), *words[1:], *more])
    main([str(tmp_path / "cases.json"), *words[1:], *more, "--skip_bad"])
    [kept] = rows_in(tmp_path / "out" / "train.json")
    assert kept["seen"] is True


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column 'absent'; it has 'file', 'q', 'a', 'who', 'part', 'age'"):
        main([*table(tmp_path), "--patient_column", "absent"])


def test_a_table_without_a_header_shows_no_cell(tmp_path: Path) -> None:
    (tmp_path / "bare.csv").write_text("a.png,What is it?,Smith has a mass\n")
    with pytest.raises(DataError) as shown:
        main([str(tmp_path / "bare.csv"), *table(tmp_path)[1:]])
    assert "3 that do not look like column names (is the header line missing?)" in str(shown.value)
    assert "Smith" not in str(shown.value)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--delimiter", "ab"], "--delimiter must be one character"),
        (["--keep", "id"], "--keep id: every row has a field"),
    ],
)
def test_wrong_options(tmp_path: Path, options: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        main([*table(tmp_path), *options])


def test_a_folder_is_not_a_table(tmp_path: Path) -> None:
    words = table(tmp_path)
    with pytest.raises(ConfigError, match="no table given"):
        main([str(tmp_path / "scans"), *words[1:]])


def test_a_table_that_contains_its_images(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"image": {"bytes": image_bytes(n), "path": None}, "text": f"scan {n}", "x": float("nan")} for n in (1, 2, 1)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    flags = ["--image_column", "image", "--answer_column", "text", "--keep", "x", "--out", str(tmp_path / "out")]
    main([str(tmp_path / "t.parquet"), *flags])
    found = rows_in(tmp_path / "out" / "train.json")
    assert found[0]["image"] == found[2]["image"] != found[1]["image"] and "x" not in found[0]
    assert (tmp_path / "out/images" / found[1]["image"]).read_bytes() == image_bytes(2)
