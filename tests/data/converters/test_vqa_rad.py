"""VQA-RAD from the public JSON format, with the format of the shared data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava.data.converters.output import split_hash
from llava.data.converters.vqa_rad import main
from llava.data.records import load_samples
from llava.errors import ConfigError, DataError
from tests.support.releases import rows_in, vqa_rad, write_image, write_rows

LAYOUT = ("answer_type", "question_type", "image_organ", "phrase_type", "official_split")


def test_rows_of_the_public_release(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    main([str(vqa_rad(tmp_path / "raw")), "--out", str(out)])
    train, test = rows_in(out / "train.json"), rows_in(out / "test.json")
    assert [row["id"] for row in train] == ["vqarad_1", "vqarad_2", "vqarad_3"]
    assert [row["conversations"][1]["value"] for row in train] == ["Yes", "3", "None"]
    assert train[0]["conversations"][0] == {"from": "human", "value": "<image>\nIs there a mass?"}
    assert {name: train[0][name] for name in LAYOUT} == {
        "answer_type": "CLOSED",
        "question_type": "PRES",
        "image_organ": "CHEST",
        "phrase_type": "freeform",
        "official_split": "train",
    }
    assert [(row["phrase_type"], row["official_split"]) for row in test] == [("freeform", "test"), ("para", "test")]
    assert {row["license"] for row in train + test} == {"CC0 1.0 (images from MedPix)"}
    assert "question_frame" not in train[1] and train[1]["linked_id"] == "link-2"
    assert len(load_samples(out / "train.json", image_folder=out / "images")) == 3
    shown = capsys.readouterr().out
    assert split_hash(["vqarad_4", "vqarad_5"]) in shown and "DIFFER" in shown


def test_framed_questions_are_training_rows_of_their_own(tmp_path: Path) -> None:
    main([str(vqa_rad(tmp_path / "raw")), "--out", str(tmp_path / "out"), "--framed"])
    train = rows_in(tmp_path / "out" / "train.json")
    assert [row["id"] for row in train][3:] == ["vqarad_2_frame"]  # the framed test question stays out
    assert train[3]["phrase_type"] == "frame"
    assert train[3]["conversations"][0]["value"] == "<image>\nWhat is the count of nodules?"


def test_manifest_compares_with_the_published_sizes(tmp_path: Path) -> None:
    main([str(vqa_rad(tmp_path / "raw")), "--out", str(tmp_path / "out")])
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["compared_with_published"] == ["sizes"] and len(manifest["differs"]) == 2
    assert "'rows': 1797" in manifest["differs"][0] and "'rows': 3" in manifest["differs"][0]
    assert manifest["splits"]["train"]["answer_type"] == {"CLOSED": 1, "OPEN": 2}
    assert manifest["made_by"]["data"]["VQA_RAD Dataset Public.json"]["sha256"]


def test_a_missing_image_names_file_and_row(tmp_path: Path) -> None:
    raw = vqa_rad(tmp_path / "raw")
    (raw / "VQA_RAD Image Folder" / "synpic2.jpg").unlink()
    with pytest.raises(DataError, match=r"Public\.json, row 1, id 'vqarad_2': image synpic2\.jpg is not in"):
        main([str(raw), "--out", str(tmp_path / "out")])
    assert not list((tmp_path / "out").glob("*.json")) and not list((tmp_path / "out").glob(".*.part"))
    main([str(raw), "--out", str(tmp_path / "out"), "--skip_bad"])
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [(row["row"], row["id"]) for row in skipped] == [(1, "vqarad_2"), (4, "vqarad_5")]
    assert len(rows_in(tmp_path / "out" / "train.json")) == 2


def test_the_message_without_a_release_says_how_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    with pytest.raises(DataError, match=r"(?s)no VQA_RAD Dataset Public\.json.*osf\.io/89kps"):
        main([str(tmp_path / "raw"), "--out", str(tmp_path / "out")])
    with pytest.raises(ConfigError, match="no such file or folder"):
        main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("split", ["train", "test"])
def test_shared_rows_come_back_from_the_public_format(shared: Path, tmp_path: Path, split: str) -> None:
    """Rows of the shared set, written in the public format, are read to the same conversations and fields."""
    wanted = rows_in(shared / "data" / "vqa-rad" / f"{split}.json")[:200]
    raw = tmp_path / "raw"
    public = []
    for number, row in enumerate(wanted):
        mark = "test_" if split == "test" else ""
        question = row["conversations"][0]["value"].removeprefix("<image>\n")
        public.append(
            {
                "qid": number,
                "phrase_type": mark + row["phrase_type"],
                "image_name": row["image"],
                "question": question,
                "answer": row["conversations"][1]["value"],
                **{name: row[name] for name in ("answer_type", "question_type", "image_organ")},
            }
        )
        write_image(raw / "VQA_RAD Image Folder" / row["image"])
    write_rows(raw / "VQA_RAD Dataset Public.json", public)
    main([str(raw), "--out", str(tmp_path / "out")])
    found = rows_in(tmp_path / "out" / f"{split}.json")
    for row, expected in zip(found, wanted, strict=True):
        for name in ("image", "conversations", *LAYOUT):
            assert row[name] == expected[name]
        assert list(row)[:3] == list(expected)[:3]
