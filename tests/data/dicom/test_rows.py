"""Folders of studies to rows: grouping, texts from a table, keys instead of numbers, one training step."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava.data.dicom import rows as dicom_rows
from llava.data.pseudonyms import key_of, new_uid, read_salt
from llava.errors import ConfigError, DataError
from llava.train.run import run_sft
from tests.support.dicom_files import SECRET, corpus, make
from tests.support.runs import arguments, losses, write_parts

Rows = list[dict[str, Any]]


def write_study(folder: Path) -> Path:
    """Write a CT series, a chest radiograph, the MR slice of another patient, and a text file."""
    values = np.arange(64, dtype=np.int16).reshape(8, 8)
    axial = [1, 0, 0, 0, 1, 0]
    for number in (3, 1, 2):
        fields = {"Modality": "CT", "SOPInstanceUID": f"1.2.{number}", "InstanceNumber": number}
        (folder / "a").mkdir(parents=True, exist_ok=True)
        file = make(values + number, ImageOrientationPatient=axial, BodyPartExamined="CHEST", **fields)
        (folder / "a" / f"slice{number}").write_bytes(file)
    radiograph = {"Modality": "CR", "SOPInstanceUID": "1.3.1", "SeriesInstanceUID": "1.3", "ViewPosition": "PA"}
    (folder / "a" / "cr.dcm").write_bytes(make(values, BodyPartExamined=f"CHEST {SECRET[:5]}", **radiograph))
    other = {"Modality": "MR", "SOPInstanceUID": "1.4.1", "SeriesInstanceUID": "1.4", "StudyInstanceUID": "1.9"}
    (folder / "mr").write_bytes(make(values, PatientID="ID-0815", AccessionNumber="A77", **other))
    (folder / "notes.txt").write_text("nothing")
    return folder


def run(folder: Path, out: Path, *words: str) -> Rows:
    """Run the command and return its rows."""
    dicom_rows.main([str(folder), "--out", str(out), *words])
    rows: Rows = json.loads(out.read_text())
    return rows


def test_a_row_for_every_instance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(write_study(tmp_path / "in"), tmp_path / "rows.json")
    assert [row["image"] for row in rows] == ["a/cr.dcm", "a/slice1", "a/slice2", "a/slice3", "mr"]
    radiograph, slice1, mr = rows[0], rows[1], rows[4]
    assert (slice1["modality"], slice1["body_part"], slice1["view"]) == ("CT", "chest", "axial")
    assert (radiograph["modality"], radiograph["view"]) == ("X-ray", "PA")
    assert "body_part" not in radiograph, "a word outside the lists was copied"
    assert slice1["conversations"][0]["value"].startswith("<image>\n")
    assert slice1["conversations"][1]["value"] == "Axial CT of the chest."
    assert radiograph["patient"] == slice1["patient"] != mr["patient"]
    assert radiograph["study"] == slice1["study"] != mr["study"] and radiograph["series"] != slice1["series"]
    assert len({row["id"] for row in rows}) == 5
    printed = capsys.readouterr()
    assert "5 rows" in printed.out and "1 files of other formats" in printed.out
    skipped = (tmp_path / "rows.skipped.jsonl").read_text()
    assert json.loads(skipped)["file"] == "notes.txt"


def test_no_output_names_a_patient(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    folder = write_study(tmp_path / "in")
    caplog.clear()  # pydicom complains about what this test writes
    run(folder, tmp_path / "rows.json", "--png", str(tmp_path / "png"))
    texts = [file.read_bytes() for file in tmp_path.glob("rows*")] + [
        file.read_bytes() for file in tmp_path.glob("png/*")
    ]
    printed = capsys.readouterr()
    texts += [printed.out.encode(), printed.err.encode(), caplog.text.encode()]
    for text in texts:
        assert all(word.encode() not in text for word in (SECRET, SECRET[:5], "4711", "0815", "19010203", "1.2.3.4"))


def test_keys_depend_on_the_salt_and_on_nothing_else(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "in")
    salt = tmp_path / "salt"
    first = run(folder, tmp_path / "1.json", "--salt_file", str(salt))
    assert oct(os.stat(salt).st_mode & 0o777) == "0o600"
    assert run(folder, tmp_path / "2.json", "--salt_file", str(salt)) == first
    plain = run(folder, tmp_path / "3.json")
    assert [row["patient"] for row in plain] != [row["patient"] for row in first]
    assert [row["image"] for row in plain] == [row["image"] for row in first]
    assert key_of("patient", "1", b"x") != key_of("study", "1", b"x") != key_of("study", "1", b"y")
    uid = new_uid("1.2.3", b"x")
    assert uid == new_uid("1.2.3", b"x") != new_uid("1.2.4", b"x") and uid.startswith("2.25.") and len(uid) <= 44
    (tmp_path / "short").write_text("guess")
    with pytest.raises(DataError, match="5 bytes"):
        read_salt(tmp_path / "short")


def test_the_row_of_a_series_is_its_middle(tmp_path: Path) -> None:
    rows = run(write_study(tmp_path / "in"), tmp_path / "rows.json", "--per", "series")
    assert [row["image"] for row in rows] == ["a/cr.dcm", "a/slice2", "mr"]
    assert [row["id"] for row in rows] == [row["series"] for row in rows]


@pytest.mark.parametrize(
    ("key", "value", "images"),
    [
        ("study", "1.2.3", ["a/cr.dcm", "a/slice1", "a/slice2", "a/slice3"]),
        ("series", "1.3", ["a/cr.dcm"]),
        ("path", "a/slice3", ["a/slice3"]),
        ("patient", "ID-0815", ["mr"]),
        ("accession", "A77", ["mr"]),
    ],
)
def test_texts_from_a_table(tmp_path: Path, key: str, value: str, images: list[str]) -> None:
    folder = write_study(tmp_path / "in")
    table = tmp_path / "reports.csv"
    table.write_text(f'number,findings,impression\n{value},"No effusion, no mass.",Normal.\nother,x,y\n')
    words = ["--table", str(table), "--key", key, "--key_column", "number", "--question", "What is seen?"]
    words += ["--facts", "False", "--text_column", "findings", "impression"]
    rows = run(folder, tmp_path / "rows.json", *words)
    assert [row["image"] for row in rows] == images
    turns = [turn["value"] for turn in rows[0]["conversations"]]
    assert turns == ["<image>\nWhat is seen?", "No effusion, no mass.\nNormal."]
    assert value not in json.dumps([{**row, "image": ""} for row in rows])


def test_texts_without_an_image_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, table, out = write_study(tmp_path / "in"), tmp_path / "reports.csv", tmp_path / "rows.json"
    words = ["--table", str(table), "--key", "study", "--key_column", "number", "--text_column", "text"]
    table.write_text(f"number,text\n1.2.3,seen\n9.9,{SECRET}\n8.8,{SECRET}\n")
    run(folder, out, *words)
    assert "2 keys of the table without an image" in capsys.readouterr().out
    out.unlink()
    table.write_text(f"number,text\n{SECRET},seen\n8.8,{SECRET}\n")
    with pytest.raises(DataError, match="none of its 2 keys with a text") as caught:
        run(folder, out, *words)
    assert SECRET not in str(caught.value) and not out.exists()


def test_every_question_of_a_table_is_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, table = write_study(tmp_path / "in"), tmp_path / "questions.csv"
    table.write_text(
        "number,q,a\n1.2.2,Is there a mass?,no\nA77,x,y\n1.2.2,Which organ?,lung\n"
        "1.2.2,Is there a mass?,no\n1.4.1,Who?,\n"
    )
    words = ["--table", str(table), "--key", "instance", "--key-column", "number", "--text-column", "a"]
    rows = run(folder, tmp_path / "rows.json", *words, "--question-column", "q", "--salt-file", str(tmp_path / "salt"))
    asked = [row for row in rows if row["image"] == "a/slice2"]
    texts = [[turn["value"] for turn in row["conversations"]] for row in asked]
    assert texts[:2] == [["<image>\nIs there a mass?", "no"], ["<image>\nWhich organ?", "lung"]]
    assert len(texts) == 3 and texts[2][0].startswith("<image>\n") and "modality" in texts[2][0]
    assert len({row["id"] for row in rows}) == len(rows) == 7
    assert [row["id"] for row in asked[:2]] == [f"{asked[2]['id']}-{number}" for number in (0, 1)]
    printed = capsys.readouterr().out
    assert "2 questions of the table" in printed and "1 with a text" in printed
    rows = run(folder, tmp_path / "bare.json", *words, "--question-column", "q", "--facts", "False")
    assert [row["image"] for row in rows] == ["a/slice2"] * 2


@pytest.mark.parametrize(
    ("lines", "more", "reason"),
    [
        (f"7,a,{SECRET}\n7,b,another\n", [], "row 1: .*repeats a key .*pass --question-column"),
        (f"7,a,{SECRET}\n7,a,another\n", ["--question-column", "q"], "row 1: .*repeats a key of an earlier row"),
        (f"7,,{SECRET}\n", ["--question-column", "q"], "row 0: column 'q' is empty; expected the question"),
        ("7,a,b\n", ["--question-column", "asked"], "no column 'asked'"),
    ],
)
def test_a_table_that_contradicts_itself(tmp_path: Path, lines: str, more: list[str], reason: str) -> None:
    table = tmp_path / "reports.csv"
    table.write_text(f"number,q,text\n{lines}")
    words = ["--table", str(table), "--key-column", "number", "--text-column", "text", *more]
    with pytest.raises(DataError, match=reason) as caught:
        dicom_rows.main([str(tmp_path), "--out", str(tmp_path / "rows.json"), *words])
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(("words", "reason"), [(["--table", "t.csv"], "belong together"),
                                              (["--question-column", "q"], "names a column of --table")])  # fmt: skip
def test_options_of_a_table_belong_together(tmp_path: Path, words: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        dicom_rows.main([str(tmp_path), "--out", str(tmp_path / "rows.json"), *words])


def test_png_files_follow_the_options(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "in")
    rows = run(folder, tmp_path / "rows.json", "--png", str(tmp_path / "png"), "--dicom_window", "31.5,1")
    assert {row["image"] for row in rows} == {file.name for file in (tmp_path / "png").iterdir()}
    with Image.open(tmp_path / "png" / rows[0]["image"]) as image:
        assert set(np.unique(np.asarray(image))) == {0, 255}


def test_broken_and_repeated_files_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_study(tmp_path / "in")
    shutil.copy(folder / "mr", folder / "mr-again")
    (folder / "a" / "slice2").write_bytes((folder / "a" / "slice2").read_bytes()[:-20])
    rows = run(folder, tmp_path / "rows.json")
    assert [row["image"] for row in rows] == ["a/cr.dcm", "a/slice1", "a/slice3", "mr"]
    listed = [json.loads(line) for line in (tmp_path / "rows.skipped.jsonl").read_text().splitlines()]
    assert {row["file"] for row in listed} == {"mr-again", "notes.txt", "a/slice2"}
    assert "1 broken" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image gives a row"):
        run(tmp_path / "empty", tmp_path / "none.json")
    with pytest.raises(DataError, match="is not a folder"):
        run(tmp_path / "absent", tmp_path / "none.json")


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "in")
    (tmp_path / "secret.dcm").write_bytes(make(np.zeros((4, 4), np.uint8), SOPInstanceUID="9.9"))
    (folder / "link.dcm").symlink_to(tmp_path / "secret.dcm")
    assert "link.dcm" not in [row["image"] for row in run(folder, tmp_path / "rows.json")]


def test_four_modalities_train_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Convert a CT, an MR, an X-ray and an ultrasound file of the corpus, and train one step."""
    monkeypatch.setenv("LLAVA_CACHE", str(tmp_path / "cache"))
    wanted = {"CT_small.dcm", "MR_small_RLE.dcm", "6154", "examples_rgb_color.dcm"}
    (tmp_path / "in").mkdir()
    for _, path in corpus():
        if path.name in wanted:
            shutil.copy(path, tmp_path / "in" / path.name)
    rows = run(tmp_path / "in", tmp_path / "rows.json")
    assert sorted(row["modality"] for row in rows) == ["CT", "MRI", "X-ray", "ultrasound"]
    parts = write_parts(tmp_path / "parts")
    changed = {"data_path": tmp_path / "rows.json", "image_folder": tmp_path / "in", "max_steps": 1}
    run_sft(arguments(parts, tmp_path / "run", version="v1", dicom_window="soft_tissue", **changed))
    assert len(losses(tmp_path / "run")) == 1 and np.isfinite(losses(tmp_path / "run")[0])
    saved = json.loads((tmp_path / "run" / "llava_processor.json").read_text())
    assert saved["dicom"] == {"version": 1, "window": "soft_tissue", "frame": "first"}
