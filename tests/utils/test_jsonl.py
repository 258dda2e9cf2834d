"""Reading records by content, resuming after a crash, atomic writes."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from llava.errors import DataError
from llava.utils import jsonl

ROWS = [{"id": 1, "text": "é\u2028x"}, {"id": "b", "text": ""}]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("array", [False, True])
def test_read_by_content(tmp_path: Path, suffix: str, zipped: bool, array: bool) -> None:
    text = json.dumps(ROWS, indent=1) if array else "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    assert list(jsonl.read_records(path)) == ROWS


def test_errors_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 1}\n{"id": ')
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2"):
        list(jsonl.read_records(path))
    path.write_text('[{"id": 1}, 3]')
    with pytest.raises(DataError, match="row 1: expected an object, got int"):
        list(jsonl.read_records(path))
    path.write_text('[{"id": 1}')
    with pytest.raises(DataError, match="not a JSON array"):
        list(jsonl.read_records(path))
    with pytest.raises(DataError, match="no such file"):
        list(jsonl.read_records(tmp_path / "none.json"))
    path.write_bytes(b"\x1f\x8bbroken")
    with pytest.raises(DataError, match="cannot be read"):
        list(jsonl.read_records(path))


def test_append(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers.jsonl"
    for row in ROWS:
        jsonl.append_record(path, row)
    assert list(jsonl.read_records(path)) == ROWS


def test_torn_line_is_dropped_and_the_file_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"id": 1}\n{"id": 2, "te')
    assert jsonl.drop_incomplete_line(path)
    assert not jsonl.drop_incomplete_line(path)
    jsonl.append_record(path, {"id": 3})
    assert [row["id"] for row in jsonl.read_records(path)] == [1, 3]


@pytest.mark.parametrize("content", ['[\n  {"id": 1}\n]', '{\n  "id": 1\n}', "a,b\n1,2", '{"id": 1, \n"x": 2}', "text"])
def test_other_files_keep_their_last_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "named by mistake.json"
    path.write_text(content)
    assert not jsonl.drop_incomplete_line(path) and path.read_text() == content


def test_append_after_a_complete_line_without_its_end(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"id": 1}')
    assert not jsonl.drop_incomplete_line(path)
    jsonl.append_record(path, {"id": 2})
    assert [row["id"] for row in jsonl.read_records(path)] == [1, 2]


def test_write_atomic_leaves_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    jsonl.write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    assert path.stat().st_mode & 0o777 == 0o666 & ~jsonl._umask()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        jsonl.write_records(path, [{"a": 2}])
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[" + b"1" * 5000 + b"]", b"1" * 5000, b'{"a":' * 100_000])
def test_what_the_decoder_has_no_error_of_its_own_for_is_a_named_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.json"):
        list(jsonl.read_records(path))


def test_a_damaged_gzip_file_is_a_named_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    zipped = gzip.compress(json.dumps(ROWS * 50).encode())
    path.write_bytes(zipped[:30] + b"\0\0\0" + zipped[33:])
    with pytest.raises(DataError, match="cannot be read"):
        list(jsonl.read_records(path))
