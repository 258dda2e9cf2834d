"""Commands of tests that end with everything that they started.

The ranks of torchrun, servers and browsers are processes of a command, some of them in sessions of their own. They
inherit its environment, so a variable with a value of its own finds all of them, also those that outlive their parent.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

MARK = "LLAVA_TEST_COMMAND"
"""Variable that all processes of one command have."""

TAIL = 3000
"""Characters of each stream in the message about a command that did not end."""

Words = Sequence[object]
Environment = Mapping[str, str] | None


def marked_processes(mark: str) -> list[psutil.Process]:
    """Return the living processes that have a mark in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # ended meanwhile, or of another user
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def end_marked(mark: str) -> None:
    """Kill all processes with a mark, and those that they start meanwhile."""
    while found := marked_processes(mark):
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.02)


def have_ended(mark: str, *, seconds: float) -> bool:
    """Return whether all processes with a mark end by themselves within a time."""
    deadline = time.monotonic() + seconds
    while living := marked_processes(mark):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return not living


@contextlib.contextmanager
def started(
    words: Words, *, env: Environment = None, cwd: str | Path | None = None, mark: str = "", **settings: Any
) -> Iterator[subprocess.Popen[str]]:
    """Start a command; when the context ends, however it ends, all its processes are killed.

    Args:
        words: the command.
        env: its environment; None for that of the test.
        cwd: its working directory.
        mark: mark of its processes; empty for a new one.
        settings: other arguments of `subprocess.Popen`.
    """
    mark = mark or uuid.uuid4().hex
    environment = {**(os.environ if env is None else env), MARK: mark}
    command = [str(word) for word in words]
    with subprocess.Popen(command, env=environment, cwd=cwd, text=True, **settings) as process:
        try:
            yield process
        finally:
            end_marked(mark)


def run_command(
    words: Words, *, timeout: float, env: Environment = None, cwd: str | Path | None = None, joined: bool = False
) -> subprocess.CompletedProcess[str]:
    """Return a finished command with its output; one that does not end in time fails the test.

    Args:
        words: the command.
        timeout: seconds after which all its processes are killed.
        env: its environment; None for that of the test.
        cwd: its working directory.
        joined: both streams are `stdout`.
    """
    mark = uuid.uuid4().hex
    errors = subprocess.STDOUT if joined else subprocess.PIPE
    with started(words, env=env, cwd=cwd, mark=mark, stdout=subprocess.PIPE, stderr=errors) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            end_marked(mark)
            streams = process.communicate()
            shown = "\n".join(part[-TAIL:] for part in streams if part)
            raise AssertionError(f"no end within {timeout:g} s: {process.args}\n{shown}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err or "")
