"""`llava data csv`: conversion of tables by column name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava.data.converters.csv_table import main
from llava.data.pseudonyms import key_of, read_salt
from llava.data.records import load_samples
from llava.errors import ConfigError, DataError
from tests.support.releases import image_bytes, rows_in, write_csv, write_image, write_rows


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


@pytest.mark.parametrize("name", ["ward/../ward/c", "{}/scans/../store/c", "{}/store/c"])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    write_image(tmp_path / "store" / "c.png")
    words = table(tmp_path, file=name.format(tmp_path))
    (tmp_path / "scans" / "ward").symlink_to(tmp_path / "store")
    with pytest.raises(DataError, match=r"lies outside|leads out of"):
        main(words)


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


def test_columns_of_persons_become_keys(tmp_path: Path) -> None:
    """The keys are those of DICOM rows with the same salt."""
    salt = tmp_path / "salt"
    more = ["--patient_column", "who", "--id_column", "MRN", "--keep", "age", "Patient_ID", "--salt-file", str(salt)]
    words = table(tmp_path)
    [first, second] = rows_in(write_rows(tmp_path / "cases.json", people()))
    main([str(tmp_path / "cases.json"), *words[1:], *more])
    rows = rows_in(tmp_path / "out" / "train.json")
    secret = read_salt(salt)
    assert [row["patient"] for row in rows] == [key_of("patient", who, secret) for who in (first["who"], second["who"])]
    assert rows[0]["id"] == key_of("patient", "4711", secret) and rows[0]["Patient_ID"] == rows[0]["id"]
    assert [row["age"] for row in rows] == [40, 50]
    written = "".join(path.read_text() for path in (tmp_path / "out").glob("*.json"))
    assert not [text for text in ("Zyx", "4711", "4712", str(salt)) if text in written]
    assert salt.stat().st_mode & 0o777 == 0o600


def test_the_folder_remembers_the_salt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*table(tmp_path), "--patient_column", "who"]
    main([*words, "--salt-file", str(tmp_path / "salt")])
    (tmp_path / "salt").rename(tmp_path / "moved")
    main([*words, "--salt-file", str(tmp_path / "moved")])
    assert "is already complete with the same settings" in capsys.readouterr().out
    for other in ([], ["--salt-file", str(tmp_path / "new")]):
        with pytest.raises(ConfigError, match="was written with another salt_file"):
            main([*words, *other])


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--patient_column", "who"], "column 'who' is written in clear; --salt-file FILE writes keys"),
        (["--id_column", "MRN"], "column 'MRN' is written in clear"),
        (["--keep", "Patient_ID"], "column 'Patient_ID' is written in clear"),
        (["--keep", "seen", "--salt-file", "SALT"], "column 'seen' is kept in clear; a value looks like an identifier"),
        (["--patient_column", "file", "--image-prefix", "case-"], "names of images contain values"),
    ],
)  # fmt: skip
def test_what_stays_in_clear_is_reported(
    tmp_path: Path, more: list[str], expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    words = table(tmp_path)
    write_image(tmp_path / "scans" / "case-Zyx01.png")
    rows = people()
    if "--image-prefix" in more:
        rows = [{**rows[0], "file": "Zyx01"}]
    write_rows(tmp_path / "cases.json", rows)
    main([str(tmp_path / "cases.json"), *words[1:], *(word.replace("SALT", str(tmp_path / "salt")) for word in more)])
    assert sum(expected in message for message in caplog.messages) == 1
    assert "Zyx" not in caplog.text


def test_nothing_is_said_about_other_columns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    main([*table(tmp_path), "--patient_column", "who", "--keep", "age", "--salt-file", str(tmp_path / "salt")])
    assert "in clear" not in caplog.text


def people() -> list[dict[str, Any]]:
    """Return rows of a table with columns that identify persons."""
    first = {
        "file": "a",
        "q": "Normal?",
        "a": "yes",
        "who": "Zyx Quentin",
        "MRN": 4711,
        "Patient_ID": "4711",
        "age": 40,
    }
    second = {"who": "Zyx Other", "file": "b", "MRN": 4712, "Patient_ID": "4712", "age": 50, "seen": "on 03.04.2021"}
    return [{**first, "seen": "no"}, {**first, **second}]
