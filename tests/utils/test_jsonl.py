"""Reading records by content, resuming after a crash, atomic writes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from llava.errors import DataError
from llava.utils import jsonl
from llava.utils.json_rows import read_records
from llava.utils.jsonl import open_atomic, write_atomic

ROWS = [{"id": 1, "text": "é\u2028x"}, {"id": "b", "text": ""}]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("array", [False, True])
def test_read_by_content(tmp_path: Path, suffix: str, zipped: bool, array: bool) -> None:
    text = json.dumps(ROWS, indent=1) if array else "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    assert list(read_records(path)) == ROWS


def test_errors_name_file_and_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 1}\n{"id": ')
    with pytest.raises(DataError, match=r"rows\.jsonl, row 1: not JSON"):
        list(read_records(path))
    path.write_text('[{"id": 1}, 3]')
    with pytest.raises(DataError, match="row 1: expected an object, got int"):
        list(read_records(path))
    path.write_text('[{"id": 1}')
    with pytest.raises(DataError, match="row 1: expected ',' or ']'"):
        list(read_records(path))
    with pytest.raises(DataError, match="no such file"):
        list(read_records(tmp_path / "none.json"))
    path.write_bytes(b"\x1f\x8bbroken")
    with pytest.raises(DataError, match="cannot be read"):
        list(read_records(path))


def test_append(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers.jsonl"
    for row in ROWS:
        jsonl.append_record(path, row)
    assert list(read_records(path)) == ROWS


def test_torn_line_is_dropped_and_the_file_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"id": 1}\n{"id": 2, "te')
    assert jsonl.drop_incomplete_line(path)
    assert not jsonl.drop_incomplete_line(path)
    jsonl.append_record(path, {"id": 3})
    assert [row["id"] for row in read_records(path)] == [1, 3]


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
    assert [row["id"] for row in read_records(path)] == [1, 2]


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
        list(read_records(path))


def test_a_damaged_gzip_file_is_a_named_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    zipped = gzip.compress(json.dumps(ROWS * 50).encode())
    path.write_bytes(zipped[:30] + b"\0\0\0" + zipped[33:])
    with pytest.raises(DataError, match="cannot be read"):
        list(read_records(path))


KILLED = "import os, signal, sys\nfrom llava.utils.jsonl import open_atomic\n"
KILLED += "with open_atomic(sys.argv[1]) as stream:\n    stream.write(b'half')\n    stream.flush()\n"


@pytest.mark.parametrize("name", ["rows.json", "a b.html", ".hidden", "x" * 200, "ü.json"])
def test_what_a_killed_run_left_is_used_again(tmp_path: Path, name: str) -> None:
    """`llava data check --fix` and every other command that writes a whole file."""
    code = KILLED + "    os.kill(os.getpid(), signal.SIGKILL)\n"
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=False).returncode == -9
    assert len(list(tmp_path.iterdir())) == 1
    write_atomic(tmp_path / name, "whole")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(name, "whole")]


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    with open_atomic(tmp_path / "x") as first, open_atomic(tmp_path / "x") as second:
        first.write(b"first " * 1000)
        second.write(b"second")
    assert (tmp_path / "x").read_bytes() == b"first " * 1000
    assert [file.name for file in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("kind", ["link", "hard link", "dangling link", "folder", "locked"])
def test_another_file_under_the_temporary_name_is_not_touched(tmp_path: Path, kind: str) -> None:
    other, temporary = tmp_path / "other", tmp_path / ".x.tmp"
    other.write_text("precious")
    if kind == "link":
        temporary.symlink_to(other)
    elif kind == "hard link":
        temporary.hardlink_to(other)
    elif kind == "dangling link":
        temporary.symlink_to(tmp_path / "nothing")
    elif kind == "folder":
        temporary.mkdir()
    else:
        temporary.write_text("at work")
    with temporary.open() if kind == "locked" else contextlib.nullcontext() as stream:
        if stream is not None:
            fcntl.flock(stream, fcntl.LOCK_EX)
        write_atomic(tmp_path / "x", "new")
        assert (tmp_path / "x").read_text() == "new" and other.read_text() == "precious"
        assert stream is None or temporary.read_text() == "at work"
    assert not (tmp_path / "nothing").exists()


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        with pytest.raises(OSError, match=r"x\.json") as caught:
            write_atomic(tmp_path / "x.json", b"0" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert caught.value.errno == errno.EFBIG and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", "null", '{"a": 1} {"b": 2}', '{"a": ' * 5000 + "1" + "}" * 5000, "\udc80", "1" * 5000],
)
def test_a_file_without_one_object_is_named(content: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text(content, errors="surrogateescape")
    with pytest.raises(DataError, match=r"settings\.json: ") as caught:
        jsonl.read_object(path)
    assert len(str(caught.value)) < 400


def test_a_text_of_more_bytes_than_allowed_is_refused(tmp_path: Path) -> None:
    for name, content in (("plain", b"x" * 101), ("zipped", gzip.compress(b" " * 1_000_000))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}: the text has more than 100 bytes"):
            jsonl.read_text(tmp_path / name, max_bytes=100)
    (tmp_path / "plain").write_bytes(b"x" * 100)
    assert jsonl.read_text(tmp_path / "plain", max_bytes=100) == "x" * 100
