"""`llava preferences answer`: sampled answers with a seed for each question, failures as rows, and resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava.errors import DataError
from llava.instruct.preferences import answer
from llava.model.checkpoint.save import save_model
from tests.support.preference_files import lines
from tests.support.tiny import tiny_image, tiny_llava


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    loaded = tiny_llava()
    save_model(loaded.model, loaded.processor, folder, origin=loaded.origin)
    return folder


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(2):
        tiny_image(number).save(tmp_path / "images" / f"{number}.png")
    rows = [{"question_id": n, "image": f"{n % 2}.png", "prompt": [f"What {n}?", f"Why {n}?"]} for n in range(3)]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(questions: Path, model: Path, *words: str, out: str = "answers.jsonl") -> Path:
    path = questions.parent / out
    options = ["--model", str(model), "--image-folder", str(questions.parent / "images"), "--max-new-tokens", "6"]
    answer.main([str(questions), "--out", str(path), *options, *words])
    return path


def test_rows_hold_what_the_judge_needs(questions: Path, model: Path) -> None:
    rows = lines(run(questions, model, "--n", "3"))
    assert [row["id"] for row in rows] == ["0-0", "0-1", "1-0", "1-1", "2-0", "2-1"]
    first: dict[str, Any] = rows[0]
    assert (first["img"], first["prompt"], first["seed"]) == ("0.png", "What 0?", 0)
    assert len(first["answers"]) == len(first["finishes"]) == 3 and len(first["weights"]) == 64
    assert first["model"] == model.name and len({tuple(row["answers"]) for row in rows}) > 1


def test_batches_and_a_restart_do_not_change_answers(questions: Path, model: Path) -> None:
    whole = run(questions, model)
    single = run(questions, model, "--batch-size", "1", out="single.jsonl")
    assert single.read_bytes() == whole.read_bytes()
    kept = whole.read_text().splitlines(keepends=True)
    whole.write_text(kept[4] + kept[1] + '{"key": "ha')
    assert run(questions, model).read_bytes() == single.read_bytes()
    assert run(questions, model, "--seed", "1", out="other.jsonl").read_bytes() != single.read_bytes()


def test_other_settings_are_refused(questions: Path, model: Path) -> None:
    run(questions, model)
    with pytest.raises(DataError, match=r"other sampling\.temperature"):
        run(questions, model, "--temperature", "0.5")


def test_a_missing_image_is_a_row_that_can_be_asked_again(questions: Path, model: Path) -> None:
    image = questions.parent / "images" / "1.png"
    image.unlink()
    rows = lines(run(questions, model))
    assert [bool(row["answers"]) for row in rows] == [True, True, False, False, True, True]
    assert rows[2]["error"] == "image '1.png' is not in the image folder"
    tiny_image(1).save(image)
    assert lines(run(questions, model)) == rows
    assert all(row["answers"] for row in lines(run(questions, model, "--retry-failed")))
