"""Classes: counts, and that no text becomes a class."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava.data.check import scan
from llava.data.check.cli import write_fixed
from llava.data.check.report import check_file
from llava.data.check.scan import OTHER
from llava.errors import DataError
from tests.support.check_files import row, write_rows


def classes(tmp_path: Path, rows: list[object]) -> dict[str, dict[str, int]]:
    return check_file(write_rows(tmp_path / "rows.json", rows)).scans[0].balance.tables()


def test_types_and_flags_and_closed_answers(tmp_path: Path) -> None:
    def answered(number: int, answer: str, **fields: object) -> dict[str, object]:
        turns = [{"from": "human", "value": f"{number}?"}, {"from": "gpt", "value": answer}]
        return row(number, conversations=turns, **fields)

    rows: list[object] = [
        answered(0, "Yes.", answer_type="CLOSED", question_type=["PRES", "POS"]),
        answered(1, "no", question_type="PRES", domain={"mri": True, "ct_scan": False}),
        answered(2, "left", answer_type="CLOSED", domain={"mri": True}),
        answered(3, "yes, it is large", answer_type="OPEN", domain=None),
        {"label": 3},
    ]
    assert classes(tmp_path, rows) == {
        "answer_type": {"CLOSED": 2, "OPEN": 1},
        "question_type": {"PRES": 2, "POS": 1},
        "closed answers": {"yes": 1, "no": 1, "neither yes nor no": 1},
        "domain": {"mri": 2},
        "label": {"3": 1},
    }


def test_texts_and_identifiers_are_no_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "MAX_CLASSES", 4)
    labels = ["a long text with words " * 5, "Dr. Quimbleton", "03/14/2019", *"abcdefgh"]
    found = classes(tmp_path, [row(number, label=label) for number, label in enumerate(labels)])["label"]
    assert found == {OTHER: 8, "(long text)": 1, "a": 1, "b": 1}


def test_a_file_that_grows_meanwhile_gives_no_copy(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.json", [row(0)])
    report = check_file(path)
    path.write_text(json.dumps([row(0), row(1)]))
    with pytest.raises(DataError, match="changed"):
        write_fixed(report, tmp_path / "copy.json")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rows.json"]
