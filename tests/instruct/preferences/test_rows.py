"""Rows of questions and answers: layouts, keys, placeholders, and files that are extended row by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava.errors import DataError
from llava.instruct.preferences.rows import Asked, KeyedFile, answered_of, read_answered, read_questions


def write(tmp_path: Path, *rows: Any) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_questions_of_every_layout(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": "Left"}]
    found = read_questions(
        write(
            tmp_path,
            {"id": 7, "image": "a.png", "conversations": turns, "answer_type": "OPEN"},
            {"question_id": 3, "image": "b.png", "prompt": ["One?", "Two?"]},
            {"id": "x", "image": "b.png", "questions": ["Three?"], "weights": "abc"},
            {"question_id": 9, "image": "b.png", "prompt": "One?"},
            {"id": "t", "prompt": "Text only?"},
        )
    )
    assert [(one.id, one.images, one.text) for one in found] == [
        ("7", ("a.png",), "Where?"),
        ("3-0", ("b.png",), "One?"),
        ("3-1", ("b.png",), "Two?"),
        ("x", ("b.png",), "Three?"),
        ("t", (), "Text only?"),
    ]
    assert found[0].kept == {"reference": "Left", "answer_type": "OPEN"}
    assert found[0].shown == "<image>\nWhere?" and found[-1].shown == "Text only?"
    assert len({one.key for one in found}) == 5


@pytest.mark.parametrize(
    ("text", "num_images", "kept", "shown"),
    [
        ("Where?\n<image>", 1, "Where?", "<image>\nWhere?"),
        ("Q", 2, "Q", "<image>\n<image>\nQ"),
        ("First <image> then <image>?", 2, "First <image> then <image>?", "First <image> then <image>?"),
    ],
)
def test_placeholders_stay_where_their_place_matters(text: str, num_images: int, kept: str, shown: str) -> None:
    row = {"img": [f"{n}.png" for n in range(num_images)], "prompt": text, "answers": []}
    asked = answered_of(row, "0").asked
    assert (asked.text, asked.shown) == (kept, shown)
    again = answered_of({**asked.fields(), "answers": []}, "0").asked
    assert again == asked and again.key == asked.key


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Q"}, "expected 'prompt' .* and 'answers'"),
        ({"prompt": "Q", "answers": [1]}, "expected 'prompt'"),
        ({"prompt": " <image> ", "img": "a", "answers": []}, "no text"),
        ({"prompt": "<image> Q", "answers": []}, r"1 placeholder\(s\) for 0"),
        ({"prompt": "Q", "img": 3, "answers": []}, "file name"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    good = {"prompt": "Q", "answers": ["a"]}
    with pytest.raises(DataError, match=rf"rows\.jsonl, row 1: .*{message}"):
        read_answered(write(tmp_path, good, row))


def test_questions_must_have_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 0: field 'prompt' must be a question or a list"):
        read_questions(write(tmp_path, {"image": "a.png", "prompt": ["", "b"]}))


def test_a_file_continues_after_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    file = KeyedFile(path, {})
    file.append({"key": "b", "n": 1})
    file.append({"key": "a", "n": 2})
    with path.open("a") as stream:
        stream.write('{"key": "c", "n"')
    again = KeyedFile(path, {})
    assert set(again.rows) == {"a", "b"}
    again.append({"key": "c", "n": 3})
    again.settle(["a", "c"])
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "c", "b"]
    assert not KeyedFile(path, {}, resume=False).rows and path.read_text() == ""


def test_a_file_of_another_command_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 0: it has no key"):
        KeyedFile(write(tmp_path, {"id": 1}), {})


def test_the_key_depends_on_images_and_question() -> None:
    one = Asked("1", ("a",), "Q")
    assert one.key == Asked("2", ("a",), "Q", {"reference": "r"}).key
    assert one.key != Asked("1", ("b",), "Q").key != Asked("1", ("a",), "Q2").key


def test_rows_with_other_settings_are_refused_and_failed_rows_are_forgotten(tmp_path: Path) -> None:
    file = KeyedFile(tmp_path / "out.jsonl", {"seed": 0})
    file.append({"key": "a"})
    file.append({"key": "b", "error": "gone"})
    with pytest.raises(DataError, match="other seed"):
        KeyedFile(tmp_path / "out.jsonl", {"seed": 1})
    again = KeyedFile(tmp_path / "out.jsonl", {"seed": 0})
    again.forget(lambda row: "error" in row)
    assert list(again.rows) == ["a"]
