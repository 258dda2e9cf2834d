"""Loading of data files: formats by content, layouts of the family, and bad rows named or skipped."""

from __future__ import annotations

import gzip
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from llava.data.quarantine import Quarantine
from llava.data.records import load_samples
from llava.errors import ConfigError, DataError
from llava.utils.json_rows import read_rows


def vqa(number: int, **fields: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\nq{number}"}, {"from": "gpt", "value": f"a{number}"}]
    return {"id": number, "image": f"{number}.png", "conversations": turns, **fields}


ROWS = [vqa(0), vqa(1), vqa(2)]
FORMATS = {
    "array": json.dumps(ROWS),
    "indented": "\n  " + json.dumps(ROWS, indent=4) + "\n",
    "lines": "".join(json.dumps(row) + "\n" for row in ROWS),
    "blank lines": "\r\n\r\n".join(json.dumps(row) for row in ROWS),
    "byte order mark": "\ufeff" + json.dumps(ROWS),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("form", FORMATS)
def test_the_format_is_told_by_content(tmp_path: Path, form: str, zipped: bool) -> None:
    content = FORMATS[form].encode()
    path = tmp_path / "train.txt"
    path.write_bytes(gzip.compress(content) if zipped else content)
    samples = load_samples(path)
    assert [sample.id for sample in samples] == ["0", "1", "2"]
    assert [sample.origin for sample in samples] == [(str(path), 0), (str(path), 1), (str(path), 2)]
    assert samples[2].conversation.turns[1].text == "a2"


def test_rows_are_decoded_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "cut.json"
    path.write_text(json.dumps(ROWS)[:-30])
    rows = read_rows(path)
    assert next(rows) == (0, ROWS[0])
    assert next(rows) == (1, ROWS[1])
    with pytest.raises(DataError, match=r"cut\.json, row 2: not JSON"):
        next(rows)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no row can be used; the file is empty"),
        ("[]", "the file is empty"),
        ("[{} {}]", "row 0, id '': the row has no conversation: .*got no fields"),
        (json.dumps(ROWS)[:-1], "row 3: expected ',' or ']'.* truncated"),
        ("null", "must be a JSON object, got NoneType"),
        ('{"id": 1}\n', "row 0, id '1': the row has no conversation"),
    ],
)
def test_a_file_without_usable_rows_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "train.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        load_samples(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_an_unknown_loader(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_samples(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="unknown loader 'mimic'; known: chexpert_plus_findings, default"):
        load_samples(tmp_path / "none.json", loader="mimic")


BAD = {
    "no conversation": {"id": "x", "image": "1.png"},
    "wrong role": {"id": "x", "conversations": [{"from": "nurse", "value": "q"}]},
    "not an object": ["x"],
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_named_or_skipped_and_listed(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    path, listed = tmp_path / "train.json", tmp_path / "quarantine.jsonl"
    path.write_text(json.dumps([ROWS[0], BAD[kind], ROWS[1]]))
    with pytest.raises(DataError, match=r"train\.json, row 1, id"):
        load_samples(path)
    quarantine = Quarantine(listed)
    with caplog.at_level(logging.WARNING):
        samples = load_samples(path, skip_bad=True, quarantine=quarantine)
    assert [sample.id for sample in samples] == ["0", "1"]
    assert [sample.origin.row for sample in samples if sample.origin] == [0, 2]
    assert "skipped 1 of 3 rows" in caplog.text
    (line,) = [json.loads(line) for line in listed.read_text().splitlines()]
    assert list(line) == ["file", "row", "id", "reason"]
    assert (line["file"], line["row"]) == (str(path), 1)
    assert len(quarantine) == 1


def test_a_broken_line_does_not_hide_the_ones_after_it(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join([json.dumps(ROWS[0]), '{"id": 1, ', json.dumps(ROWS[2])]))
    with pytest.raises(DataError, match="row 1, id '': not JSON"):
        load_samples(path)
    quarantine = Quarantine()
    assert [sample.id for sample in load_samples(path, skip_bad=True, quarantine=quarantine)] == ["0", "2"]
    assert [bad.row for bad in quarantine.rows] == [1]


def test_missing_image_files_are_found_when_the_folder_is_given(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps(ROWS))
    for number in (0, 2):
        (tmp_path / f"{number}.png").touch()
    with pytest.raises(DataError, match=r"row 1, id '1': image .*1\.png does not exist"):
        load_samples(path, image_folder=tmp_path)
    assert [sample.id for sample in load_samples(path, image_folder=tmp_path, skip_bad=True)] == ["0", "2"]


def test_question_files_of_the_chat_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"question_id": 0, "image": "a.jpg", "text": "What?\n<image>", "type": "conversation"}))
    (sample,) = load_samples(path)
    assert sample.id == "0"
    assert sample.images == ("a.jpg",)
    assert [(turn.role, turn.text) for turn in sample.conversation.turns] == [("human", "What?\n<image>")]
    assert sample.meta["question_id"] == 0
    assert sample.meta["type"] == "conversation"


def test_rows_without_an_id_are_called_by_their_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "train.json"
    turns = [{"from": "gpt", "value": "hi"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    path.write_text(json.dumps([{"conversations": turns}] * 2))
    assert [sample.id for sample in load_samples(path)] == ["0", "1"]
    assert "2 rows began with an answer" in caplog.text


def test_shared_files_load(shared: Path) -> None:
    counts = {"train": 2489, "test": 372}
    for split, num in counts.items():
        folder = shared / "data" / "vqa-rad"
        samples = load_samples(folder / f"{split}.json", image_folder=folder / "images")
        assert len(samples) == num
        assert {sample.meta["answer_type"] for sample in samples} == {"OPEN", "CLOSED"}
    notes = load_samples(shared / "data" / "cxr-notes" / "train.json", skip_bad=True)
    assert len(notes) == 163
    assert len(load_samples(shared / "oracles" / "llava-med-eval" / "llava_med_eval_qa50_qa.jsonl")) == 193
    with pytest.raises(DataError, match=r"row 0, id 'BloodImage_00000': the row has no conversation"):
        load_samples(shared / "data" / "blood-bccd" / "train.json")


@pytest.mark.parametrize("content", ["[" * 100_000, "[" + "1" * 5000 + "]", '{"a":' * 100_000])
def test_what_the_decoder_has_no_error_of_its_own_for_is_a_named_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"rows\.json"):
        load_samples(path)


@pytest.mark.parametrize("kind", ["folder", "filled folder", "linked folder", "broken link", "link to itself", "pipe"])
def test_a_folder_is_no_image(tmp_path: Path, kind: str) -> None:
    image = tmp_path / "images" / "1.png"
    image.parent.mkdir()
    if "link" in kind:
        (image.parent / "sub").mkdir()
        image.symlink_to({"linked folder": "sub", "broken link": "none", "link to itself": image.name}[kind])
    elif kind == "pipe":
        os.mkfifo(image)
    else:
        image.mkdir()
        (image / "x.png").write_text("") if kind == "filled folder" else None
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([vqa(1)]))
    with pytest.raises(DataError, match=r"image .*images/\S+ does not exist"):
        load_samples(file, image_folder=tmp_path / "images")
