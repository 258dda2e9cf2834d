"""Joining by id, kinds of answers, candidates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava.data.records import load_samples
from llava.errors import DataError
from llava.eval.medvqa import items
from tests.support.eval_fakes import row


def write(path: Path, rows: object) -> Path:
    path.write_text(json.dumps(rows))
    return path


def answers(*ids: object) -> list[dict]:
    return [{"question_id": identity, "text": f"answer {identity}", "metadata": {}} for identity in ids]


@pytest.fixture
def truth(tmp_path: Path) -> list:
    rows = [
        row(7, "a.png", "Q1?", "yes"),
        row("8", "a.png", "Q2?", 3, kind="number", types="POS, PRES"),
        row(9, "b.png", "Q3?", "x", kind="OPEN"),
    ]
    rows[2]["conversatons"] = rows[2].pop("conversations")
    return items.read_truth(write(tmp_path / "test.json", rows))


def test_join_by_id_not_by_order(truth: list) -> None:
    joined = items.join_answers(truth, answers("9", 8, 7))
    assert [(item.question_id, item.prediction) for item in joined] == [
        ("7", "answer 7"),
        ("8", "answer 8"),
        ("9", "answer 9"),
    ]
    assert [item.closed for item in joined] == [True, False, False]
    assert joined[1].reference == "3" and joined[1].types == ("POS", "PRES")
    assert joined[0].question == "Q1?" and joined[0].image == "a.png"


def test_missing_and_extra_ids_are_named(truth: list) -> None:
    with pytest.raises(DataError, match=r"1 ids \(9\) without an answer, 1 ids \(10\) answered"):
        items.join_answers(truth, answers(7, 8, 10))
    with pytest.raises(DataError, match=r"more than once|unique"):
        items.join_answers(truth, answers(7, 7, 8, 9))
    with pytest.raises(DataError, match="row 0: expected question_id and text"):
        items.join_answers(truth, [{"id": 1}])


@pytest.mark.parametrize("text", [None, True, ["yes"]])
def test_answer_that_is_not_text_is_refused(truth: list, text: object) -> None:
    rows = answers(7, 8, 9)
    rows[1]["text"] = text
    with pytest.raises(DataError, match=r"^out\.jsonl, row 1: field 'text' must be text or a number, got \w+"):
        items.join_answers(truth, rows, source="out.jsonl")
    rows[1]["text"] = 3
    assert items.join_answers(truth, rows)[1].prediction == "3"


def test_rows_without_ids_are_named_by_their_number(tmp_path: Path) -> None:
    rows = [row(None, "a.png", "Q1?", "yes"), row("x", "a.png", "Q2?", "no"), row(None, "b.png", "Q3?", "no")]
    del rows[2]["id"]
    path = write(tmp_path / "test.json", rows)
    samples = items.read_truth(path)
    assert [sample.id for sample in samples] == [sample.id for sample in load_samples(path)] == ["0", "x", "2"]
    assert items.join_answers(samples, answers("0", "x", "2"))[2].prediction == "answer 2"


def test_bad_truth_names_file_and_row(tmp_path: Path) -> None:
    good = row(1, "a.png", "Q?", "yes")
    question_only = {**row(2, "a.png", "Q?", "yes"), "conversations": good["conversations"][:1]}
    with pytest.raises(DataError, match=r"test\.json, row 1: id '2': expected a question and its answer"):
        items.read_truth(write(tmp_path / "test.json", [good, question_only]))
    with pytest.raises(DataError, match="unique"):
        items.read_truth(write(tmp_path / "test.json", [good, good]))


def test_candidates_from_both_files(tmp_path: Path) -> None:
    rows = [row(1, "a", "?", "lung", kind="OPEN"), row(2, "a", "?", "yes"), row(3, "b", "?", "lung", kind="OPEN")]
    assert items.read_candidates(write(tmp_path / "train.json", rows)) == ["lung"]
    assert items.read_candidates(write(tmp_path / "candidate.json", {"0": ["a", 3]})) == ["a", "3"]
    (tmp_path / "pretty.json").write_text(json.dumps({"0": ["a", 3]}, indent=1))
    assert items.read_candidates(tmp_path / "pretty.json") == ["a", "3"]
    with pytest.raises(DataError, match='object with key "0"'):
        items.read_candidates(write(tmp_path / "other.json", {"1": []}))
