"""Chain of audit lines."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from llava.errors import DataError
from llava.serve.audit import START, AuditLog, check_chain, main


def written(path: Path, number: int = 4) -> list[bytes]:
    log = AuditLog(path)
    for place in range(number):
        log.write({"request_id": f"r{place}", "code": "ok"})
    return path.read_bytes().splitlines(keepends=True)


def test_lines_are_chained_and_private(tmp_path: Path) -> None:
    path = tmp_path / "audit"
    lines = written(path)
    assert check_chain(path) == 4
    assert json.loads(lines[0])["previous"] == START and json.loads(lines[1])["previous"] != START
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "audit"
    written(path)
    written(path)
    assert check_chain(path) == 8


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda lines: [lines[0].replace(b"r0", b"rX"), *lines[1:]], 2),
        (lambda lines: [*lines[:1], *lines[2:]], 2),
        (lambda lines: [lines[1], lines[0], *lines[2:]], 1),
        (lambda lines: [*lines[:3], lines[3][:-5]], 4),
        (lambda lines: [*lines[:2], b"{}\n", *lines[2:]], 3),
        (lambda lines: [*lines[:2], b"\xff\n", *lines[2:]], 3),
    ],
)
def test_the_first_break_is_named(change, line: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "audit"
    path.write_bytes(b"".join(change(written(path))))
    with pytest.raises(SystemExit) as ended:
        main([str(path)])
    assert ended.value.code == 1 and f"line {line}:" in capsys.readouterr().err


def test_a_whole_chain_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / "audit")
    main([str(tmp_path / "audit")])
    assert "4 lines, the chain is whole" in capsys.readouterr().out


def test_a_file_that_ends_in_a_line_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "audit"
    path.write_bytes(b'{"previous"')
    with pytest.raises(DataError, match="middle of a line"):
        AuditLog(path)


def test_a_line_that_is_written_in_part_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, write = tmp_path / "audit", os.write
    lines = written(path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda handle, line: write(handle, line[:20]))  # as a full disk does
        AuditLog(path).write({"request_id": "r9"})
    assert path.read_bytes() == b"".join(lines)
    assert "the audit line of request r9 is lost: [Errno 28]" in caplog.text
    written(path, 1)
    assert check_chain(path) == len(lines) + 1


def _write_many(path: Path) -> None:
    written(path, 20)


def test_two_processes_share_a_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(tmp_path / "audit",)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert check_chain(tmp_path / "audit") == 40
