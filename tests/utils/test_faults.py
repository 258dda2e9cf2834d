"""Faults of the machine end in one line, whoever reports them; a mistake in the code keeps its traceback."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llava.utils.cli import run_program
from llava.utils.faults import fault_line

FULL = OSError(errno.ENOSPC, "No space left on device")


class SafetensorError(Exception):
    """Stands for the class of the safetensors package."""


def caused(error: Exception, cause: BaseException) -> Exception:
    """Return an error that was raised after another one."""
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FULL, "the disk is full"),
        (OSError(errno.EFBIG, "File too large"), "ulimit -f"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/home/me/x.json"), "/home/me/x.json.*quota"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "disk is full"),
        (SafetensorError("I/O error: File too large (os error 27)"), "ulimit -f"),
        (RuntimeError("[enforce fail at inline_container.cc:863] . PytorchStreamWriter failed writing data/3"), "full"),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 512 vs 402"), "full, or"),
        (caused(RuntimeError("Could not save"), caused(ValueError("x"), FULL)), "the disk is full"),
        (RuntimeError("Parent directory /runs/a does not exist."), "/runs/a cannot be written"),
        (OSError(errno.EROFS, "Read-only file system", "/proc/x/y.json"), "the folder .* is read-only"),
        (PermissionError(errno.EACCES, "Permission denied", "/proc/1/x"), "permission denied|read-only"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/a/b"), "/a/b"),
        (OSError("several\nlines"), "several lines"),
    ],
)
def test_faults_are_one_line(error: Exception, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    def program() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        run_program(program)
    text = capsys.readouterr().err
    assert stop.value.code == 2 and text.startswith("llava: error: ") and text.count("\n") == 1
    assert re.search(reason, text), text
    assert "enforce" not in text and "os error" not in text


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyError("x"), RuntimeError("shapes differ"), AssertionError(), ZeroDivisionError("x")]
)
def test_mistakes_keep_their_traceback(error: Exception) -> None:
    def program() -> None:
        raise error

    assert fault_line(error) is None
    with pytest.raises(type(error)):
        run_program(program)


def run(code: str, *words: object, limit: int | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program through `run_program`, with files of at most `limit` bytes."""

    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    whole = f"import sys\nfrom llava.utils.cli import run_program\ndef program():\n    {code}\nrun_program(program)\n"
    return subprocess.run(
        [sys.executable, "-c", whole, *map(str, words)],
        stderr=subprocess.PIPE,
        stdout=options.get("stdout", subprocess.PIPE),
        text=True,
        check=False,
        preexec_fn=limited,
    )


WRITERS = {
    "torch": "import torch; torch.save({'a': torch.zeros(100_000), 'b': torch.ones(9)}, sys.argv[1])",
    "torch stream": "import torch; torch.save({'a': torch.zeros(100_000)}, open(sys.argv[1], 'wb'))",
    "safetensors": "from safetensors.torch import save_file; import torch; "
    "save_file({'a': torch.zeros(100_000)}, sys.argv[1])",
    "image": "from PIL import Image; Image.effect_noise((500, 500), 9).save(sys.argv[1] + '.png')",
    "text": "from llava.utils.jsonl import write_json; write_json(sys.argv[1], list(range(30_000)))",
    "rows": "from llava.utils.jsonl import append_record as add\n    for _ in [0] * 999: add(sys.argv[1], {1: 9**99})",
    "numpy": "import numpy; numpy.save(sys.argv[1], numpy.zeros(100_000))",
}


@pytest.mark.parametrize("code", WRITERS.values(), ids=WRITERS.keys())
def test_a_file_size_limit_is_one_line(tmp_path: Path, code: str) -> None:
    done = run(code, tmp_path / "x", limit=50_000)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("llava: error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "limit" in done.stderr or "full" in done.stderr


def test_a_full_output_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = run("sys.stdout.write('row ' * 100_000)", stdout=full)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "the disk is full" in done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "print('started', flush=True); time.sleep(30)",
        "print('started', flush=True); [0 for _ in iter(int, 1)]",
        "print('started', flush=True); threading.Event().wait(30)",
        "print('started', flush=True); subprocess.run(['sleep', '30'])",
        "from concurrent.futures import ThreadPoolExecutor; p = ThreadPoolExecutor(2); f = p.submit(time.sleep, 1); "
        "print('started', flush=True); f.result(); time.sleep(30)",
    ],
)
def test_ctrl_c_is_one_line(code: str) -> None:
    whole = "import subprocess, sys, threading, time\nfrom llava.utils.cli import run_program\n"
    whole += f"def program():\n    {code}\nrun_program(program)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", whole], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None and process.stdout.readline() == b"started\n"
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors.decode() == "llava: error: interrupted; rerun the same command to continue\n"
