"""`llava reports label`: rows in, labels with evidence out."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

import pytest

from llava.errors import ConfigError, DataError
from llava.eval.reports.label import main
from llava.report_labels.findings import FINDINGS
from llava.utils.json_rows import read_records


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_labels_and_evidence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rows(tmp_path / "in.jsonl", {"id": "a", "text": "Small effusion."}, {"text": "No edema."})
    main([str(file), "--out", str(tmp_path / "out.jsonl")])
    first, second = read_records(tmp_path / "out.jsonl")
    assert list(first) == ["id", "labels", "evidence"]
    assert (first["id"], second["id"]) == ("a", 1)
    assert list(first["labels"]) == list(FINDINGS)
    assert first["labels"]["Pleural Effusion"] == 1
    assert first["evidence"] == [{"finding": "Pleural Effusion", "value": 1, "start": 6, "end": 14, "cue": ""}]
    assert second["labels"]["Edema"] == 0
    assert "Total reports: 2" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["text", "findings", "prediction"])
def test_fields_with_the_text(tmp_path: Path, key: str) -> None:
    file = write_rows(tmp_path / "in.jsonl", {"id": 7, key: "Small effusion."})
    main([str(file), "--out", str(tmp_path / "out.jsonl")])
    row = next(read_records(tmp_path / "out.jsonl"))
    assert (row["id"], row["labels"]["Pleural Effusion"]) == (7, 1)


def test_chosen_field(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "in.jsonl", {"text": "Small effusion.", "impression": "No effusion."})
    main([str(file), "--out", str(tmp_path / "out.jsonl"), "--text-key", "impression"])
    assert next(read_records(tmp_path / "out.jsonl"))["labels"]["Pleural Effusion"] == 0


def test_table_in_the_convention_of_chexpert(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "in.jsonl", {"id": "a", "text": "Possible edema. No effusion. Cardiomegaly."})
    main([str(file), "--out", str(tmp_path / "out.jsonl"), "--csv"])
    header, row = csv.reader(io.StringIO((tmp_path / "out.csv").read_text()))
    cells = dict(zip(header, row, strict=True))
    assert header == ["id", *FINDINGS]
    assert [cells[name] for name in ("Edema", "Pleural Effusion", "Cardiomegaly", "Fracture")] == [
        "-1.0",
        "0.0",
        "1.0",
        "",
    ]


def test_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "Small effusion."}\n')))
    main(["-", "--out", str(tmp_path / "out.jsonl")])
    assert next(read_records(tmp_path / "out.jsonl"))["labels"]["Pleural Effusion"] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "fine"}\n{"id": 1}\n', "row 1: no field 'text' or 'findings' or 'prediction'; it has 'id'"),
        ('{"text": null}\n', "row 0: field 'text' is null; expected text"),
        ('{"text": NaN}\n', "row 0: field 'text' is NaN; expected text"),
        ('{"text": 3}\n', "row 0: field 'text' is int; expected text"),
        ("[]", "the file has no rows"),
        ('{"text": "patient words"}\n{broken\n', "row 1"),
    ],
)
def test_bad_rows(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text(content)
    with pytest.raises(DataError) as caught:
        main([str(file), "--out", str(tmp_path / "out.jsonl")])
    assert message in str(caught.value)
    assert "patient words" not in str(caught.value)
    assert not (tmp_path / "out.jsonl").exists()


def test_input_is_not_overwritten(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "in.jsonl", {"text": "Small effusion."})
    with pytest.raises(ConfigError):
        main([str(file), "--out", str(file)])
