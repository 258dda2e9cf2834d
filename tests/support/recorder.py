"""Command that records its arguments in place of an interpreter or a launcher that a script would start."""

from __future__ import annotations

from pathlib import Path

# The shell writes line by line, so that calls at one time would mix their lines: each call is appended by one write.
_RECORD = """#!/usr/bin/env bash
[ "$1" != -c ] || exit 0
printf "%s\\n" "$@" "--end" >"${RECORD}.$$"
cat "${RECORD}.$$" >>"${RECORD}"
rm "${RECORD}.$$"
"""


def write_recorder(path: Path, after: str = "") -> Path:
    """Write a command that appends its arguments to the file `$RECORD`, then runs the shell text `after`.

    Called with `-c`, as a script asks an interpreter for packages, it succeeds and records nothing.
    """
    path.write_text(_RECORD + after)
    path.chmod(0o755)
    return path


def recorded_calls(path: Path) -> list[list[str]]:
    """Return the arguments of each call, in the order in which the calls came."""
    return [call.splitlines() for call in path.read_text().split("--end\n") if call]
