"""Audit log: who asked when, with counts instead of content, chained by the hash of the line before.

python -m llava.serve.audit FILE          check the chain; status 1 at the first break
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llava.errors import DataError
from llava.utils.cli import Parser, run_program
from llava.utils.terminal import write_out

logger = logging.getLogger(__name__)

START = "0" * 64
"""Hash before the first line."""

READ_BACK = 1 << 16
"""Bytes at the end of a file in which its last line is searched; lines are far shorter."""


def audit_line(fields: Mapping[str, Any], previous: str) -> bytes:
    """Return a line of the file: the fields and the hash of the line before."""
    return json.dumps({**fields, "previous": previous}, ensure_ascii=True).encode() + b"\n"


def line_hash(line: bytes) -> str:
    """Return the hash of a line, without its line end."""
    return hashlib.sha256(line.rstrip(b"\n")).hexdigest()


def now_text() -> str:
    """Return the time in UTC with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class AuditLog:
    """Log of requests for answers, and the file that it is appended to; processes may share the file."""

    def __init__(self, path: Path | None = None) -> None:
        """Use `path`, or only the log.

        Raises:
            DataError: the file cannot be opened, or ends in the middle of a line.
        """
        self.path = path
        if path is not None:
            self._append(None)

    def write(self, fields: Mapping[str, Any]) -> None:
        """Write one line; a file that cannot be written is reported in the log."""
        logger.info("request %s", " ".join(f"{name}={value}" for name, value in fields.items()))
        if self.path is None:
            return
        try:
            self._append(fields)
        except (DataError, OSError) as error:
            logger.error("the audit line of request %s is lost: %s", fields.get("request_id"), error)

    def _append(self, fields: Mapping[str, Any] | None) -> None:
        assert self.path is not None
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DataError(f"--audit-file {self.path} cannot be opened: {error.strerror or error}") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)  # controller and worker may write to one file
            previous = self._last_hash(handle)
            if fields is not None:
                _write_whole(handle, audit_line(fields, previous))
        finally:
            os.close(handle)

    def _last_hash(self, handle: int) -> str:
        size = os.fstat(handle).st_size
        if size == 0:
            return START
        tail = os.pread(handle, READ_BACK, max(0, size - READ_BACK))
        if not tail.endswith(b"\n"):
            raise DataError(
                f"--audit-file {self.path} ends in the middle of a line; name another file and keep this one"
            )
        return line_hash(tail[:-1].rpartition(b"\n")[2])


def _write_whole(handle: int, line: bytes) -> None:
    """Append a line, or nothing: after half a line no other line could be appended.

    Raises:
        OSError: the line does not fit the disk.
    """
    size = os.fstat(handle).st_size
    if os.write(handle, line) < len(line):
        os.ftruncate(handle, size)  # the lock of the file is held, so that nothing has followed
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def check_chain(path: Path) -> int:
    """Return the number of lines of a file whose chain is whole.

    Raises:
        DataError: a line is damaged, or does not follow the one before; the message names it.
    """
    previous, number = START, 0
    try:
        with open(path, "rb") as stream:
            for number, line in enumerate(stream, 1):
                if _previous_of(line) != previous:
                    raise DataError(f"{path}, line {number}: does not follow the line before")
                previous = line_hash(line)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    return number


def _previous_of(line: bytes) -> str | None:
    try:
        fields = json.loads(line)
    except ValueError:
        return None
    is_whole = isinstance(fields, dict) and line.endswith(b"\n")
    return fields.get("previous") if is_whole else None


def main(argv: Sequence[str] | None = None) -> None:
    """Check the chain of an audit file."""
    parser = Parser(
        prog="python -m llava.serve.audit",
        description="Check the chain of an audit file.",
        epilog="example: python -m llava.serve.audit requests.jsonl",
    )
    parser.add_argument("file", type=Path, help="file of --audit-file")
    path = parser.parse_args(argv).file
    try:
        write_out(f"{path}: {check_chain(path)} lines, the chain is whole\n")
    except DataError as error:
        sys.stderr.write(f"llava: error: {error}\n")
        raise SystemExit(1) from None


if __name__ == "__main__":
    run_program(main)
