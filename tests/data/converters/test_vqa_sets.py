"""SLAKE, PathVQA and PMC-VQA from small synthetic releases."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest

from llava.data.converters import pathvqa, pmc_vqa, slake
from llava.errors import ConfigError, DataError
from llava.imaging.decode import load_image
from tests.support import releases
from tests.support.releases import image_bytes, pmc_vqa_row, rows_in, write_csv, write_image, write_rows


def manifest_of(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "manifest.json").read_text())
    return content


@pytest.mark.parametrize(("lang", "num_rows"), [("en", 1), ("zh", 1), ("all", 2)])
def test_slake_by_language(tmp_path: Path, lang: str, num_rows: int) -> None:
    out = tmp_path / "out"
    slake.main([str(releases.slake(tmp_path / "raw")), "--out", str(out), "--lang", lang])
    for split in ("train", "val", "test"):
        rows = rows_in(out / f"{split}.json")
        assert len(rows) == num_rows
        load_image(rows[0]["image"], out / "images")
    row = rows_in(out / "val.json")[0]
    assert row["image"] == "xmlab1/source.jpg" and row["official_split"] == "val"
    wanted = ("image_organ", "modality", "question_type", "base_type")
    assert [row[name] for name in wanted] == ["Lung", "X-Ray", "Plane", "vqa"]
    assert row["q_lang"] == ("zh" if lang == "zh" else "en")
    excluded = manifest_of(out)["splits"]["train"].get("excluded", {})
    assert excluded == ({} if lang == "all" else {"another language": 1})


def test_slake_with_its_images_in_an_archive(tmp_path: Path) -> None:
    raw = releases.slake(tmp_path / "raw")
    archive = tmp_path / "imgs.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in (raw / "imgs").rglob("*.jpg"):
            file.write(path, path.relative_to(raw))
            path.unlink()
    slake.main([str(raw), str(archive), "--out", str(tmp_path / "out")])
    assert load_image("xmlab2/source.jpg", tmp_path / "out" / "images").size == (8, 8)
    assert not (tmp_path / "out" / ".unpacked_archives").exists()


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_pathvqa_from_parquet(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        rows = [
            {"image": {"bytes": image_bytes(1), "path": None}, "question": "What is seen?", "answer": "liver"},
            {
                "image": {"bytes": image_bytes(1), "path": None},
                "question": "how many cells are there?",
                "answer": "2",
            },
            {"image": {"bytes": image_bytes(2), "path": None}, "question": "is it benign?", "answer": "yes"},
        ]
        write_parquet(tmp_path / "raw" / "data" / f"{split}-00000-of-00001-ab.parquet", rows)
    out = tmp_path / "out"
    pathvqa.main([str(tmp_path / "raw"), "--out", str(out)])
    rows = rows_in(out / "val.json")
    assert [(row["answer_type"], row["question_type"]) for row in rows] == [
        ("OPEN", "what"),
        ("OPEN", "how many"),
        ("CLOSED", "yes/no"),
    ]
    assert rows[0]["image"] == rows[1]["image"] != rows[2]["image"]
    assert len(list((out / "images").iterdir())) == 2  # equal images are one file, in all splits
    assert load_image(rows[2]["image"], out / "images").getpixel((0, 0)) == (2, 2, 2)


def test_pathvqa_from_json(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    for split in ("train", "val", "test"):
        row = {"image": f"{split}_0001", "question": "where is it?", "answer": "left", "answer_type": "other"}
        write_rows(raw / f"{split}_qa.json", [row])
        write_image(raw / "images" / split / f"{split}_0001.jpg")
    pathvqa.main([str(raw), "--out", str(tmp_path / "out")])
    row = rows_in(tmp_path / "out" / "test.json")[0]
    assert (row["image"], row["answer_type"], row["question_type"]) == ("test_0001.jpg", "OPEN", "where")


def test_pathvqa_never_opens_a_pickle(tmp_path: Path) -> None:
    path = tmp_path / "raw" / "qas" / "train_qa.pkl"
    path.parent.mkdir(parents=True)

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path(tmp_path / "sprung").touch, ())

    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DataError, match=r"train_qa\.pkl is a pickle.*Parquet release"):
        pathvqa.main([str(tmp_path / "raw"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "sprung").exists()


def test_pmc_vqa_open_and_with_choices(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    write_csv(raw / "train.csv", [pmc_vqa_row("PMC1_F1.jpg", "B"), pmc_vqa_row("PMC1_F1.jpg", "D")])
    write_csv(raw / "test.csv", [pmc_vqa_row("PMC2_F1.jpg", "A")])
    for name in ("PMC1_F1.jpg", "PMC2_F1.jpg"):
        write_image(raw / "images" / name)
    pmc_vqa.main([str(raw), "--out", str(tmp_path / "open")])
    rows = rows_in(tmp_path / "open" / "train.json")
    assert [row["conversations"][1]["value"] for row in rows] == ["Focal uptake", "Bone"]
    assert rows[0]["answer_type"] == "OPEN" and rows[0]["answer_label"] == "B"
    pmc_vqa.main([str(raw), "--out", str(tmp_path / "choices"), "--choices"])
    row = rows_in(tmp_path / "choices" / "test.json")[0]
    asked = "<image>\nWhat is the pattern?\nA: Diffuse uptake\nB: Focal uptake\nC: None\nD: Bone"
    assert row["conversations"][0]["value"] == asked
    assert row["conversations"][1]["value"] == "A: Diffuse uptake" and row["answer_type"] == "CLOSED"


def test_pmc_vqa_release_2_marks_the_answer_by_its_letter(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    first = pmc_vqa_row("PMC1_F1_0.jpg", "B")
    del first["Answer_label"]
    row = {"index": "0", **first, "Answer": "B", "Caption": "A figure.", "split": "train"}
    for split in ("train", "test"):
        write_csv(raw / f"{split}_2.csv", [{**row, "split": split}])
    write_image(raw / "images_2" / "figures" / "PMC1_F1_0.jpg")
    pmc_vqa.main([str(raw), "--out", str(tmp_path / "out"), "--captions"])
    found = rows_in(tmp_path / "out" / "train.json")[0]
    assert found["conversations"][1]["value"] == "Focal uptake" and found["caption"] == "A figure."
    write_csv(raw / "train.csv", [first])
    with pytest.raises(ConfigError, match="--release 1 or --release 2"):
        pmc_vqa.main([str(raw), "--out", str(tmp_path / "both")])


def test_pmc_vqa_row_without_answer_is_named(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    wrong = {**pmc_vqa_row("PMC1_F1.jpg", "B"), "Answer": "something else", "Answer_label": ""}
    write_csv(raw / "train.csv", [pmc_vqa_row("PMC1_F1.jpg", "A"), wrong])
    write_csv(raw / "test.csv", [pmc_vqa_row("PMC1_F1.jpg", "A")])
    write_image(raw / "images" / "PMC1_F1.jpg")
    with pytest.raises(DataError, match=r"train\.csv, row 1, id 'pmcvqa1_train_1': no choice is marked") as caught:
        pmc_vqa.main([str(raw), "--out", str(tmp_path / "out")])
    assert "something else" not in str(caught.value)
