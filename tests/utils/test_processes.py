"""Commands of tests leave no process behind, whatever sessions their processes have."""

from __future__ import annotations

import signal
import subprocess
import sys
import uuid

import psutil
import pytest

from tests.support.processes import have_ended, marked_processes, run_command, started

SLEEPER = "echo asleep; exec sleep 600"
PARENT = "setsid sleep 600 & echo $!; {then}"
"""A command with a child in a session of its own, as torchrun has its ranks; a shell, which starts at once."""


def test_a_command_in_time_has_status_and_output() -> None:
    code = "import sys; print('out'); print('error', file=sys.stderr); sys.exit(3)"
    done = run_command([sys.executable, "-c", code], timeout=900)
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "error\n")
    both = run_command([sys.executable, "-u", "-c", code], timeout=900, joined=True)
    assert (both.stdout, both.stderr) == ("out\nerror\n", "")


def test_a_command_without_end_is_ended_with_its_processes() -> None:
    with pytest.raises(AssertionError, match="no end within 3 s") as caught:
        run_command(["sh", "-c", PARENT.format(then="exec sleep 600")], timeout=3)
    child = int(str(caught.value).splitlines()[-1])
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("then", ["exec sleep 600", "exit"])
def test_a_failing_test_leaves_nothing(then: str) -> None:
    mark = uuid.uuid4().hex
    words = ["sh", "-c", PARENT.format(then=then)]
    with pytest.raises(RuntimeError), started(words, mark=mark, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline().strip().isdigit()
        assert marked_processes(mark) and not have_ended(mark, seconds=0.1)
        raise RuntimeError
    assert marked_processes(mark) == []


def test_other_processes_are_not_touched() -> None:
    with started(["sh", "-c", SLEEPER], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == "asleep\n"
        assert run_command([sys.executable, "-c", "pass"], timeout=900).returncode == 0
        assert other.poll() is None
    assert other.returncode == -signal.SIGKILL
