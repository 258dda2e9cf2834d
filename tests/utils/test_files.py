"""Claims on output folders and files: the second of two runs ends in one line, and no kill leaves a claim."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from llava.errors import ConfigError, LlavaError
from llava.utils.files import CLAIM_FILE, exclusive_file, exclusive_folder

HOLD = """
import sys, time
from pathlib import Path
from llava.utils.files import {kind}
with {kind}(sys.argv[1], {argument}):
    {work}
    print("held", flush=True)
    time.sleep(60)
"""
FORK = "import os; os.fork() or (time.sleep(30), os._exit(0))"
"""A worker process that outlives its parent."""


def holder(path: Path, kind: str = "exclusive_folder", *, work: str = "pass") -> subprocess.Popen[bytes]:
    """Start a process that holds a claim or a lock; it holds it when this returns."""
    argument = "purpose='a test'" if kind == "hold_lock" else "option='--out'"
    code = HOLD.format(kind=kind, argument=argument, work=work)
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    return process


def kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def test_the_second_run_ends_in_one_line(tmp_path: Path) -> None:
    process = holder(tmp_path / "run")
    pattern = rf"another run .*process {process.pid} on .*set another --output-dir"
    with pytest.raises(ConfigError, match=pattern) as caught:
        ExitStack().enter_context(exclusive_folder(tmp_path / "run", option="--output-dir"))
    assert str(caught.value).isprintable()
    kill(process)


@pytest.mark.parametrize("work", ["pass", FORK], ids=["alone", "with a worker"])
@pytest.mark.parametrize("kind", ["exclusive_folder", "exclusive_file", "hold_lock"])
def test_a_killed_run_leaves_no_claim(tmp_path: Path, kind: str, work: str) -> None:
    path = tmp_path / "run"
    kill(holder(path, kind, work=work))
    started = time.monotonic()
    kill(holder(path, kind))
    assert time.monotonic() - started < 20


def test_a_claim_leaves_nothing(tmp_path: Path) -> None:
    with exclusive_folder(tmp_path / "a" / "b", option="--out") as claim:
        claim.check()
        assert [file.name for file in claim.folder.iterdir()] == [CLAIM_FILE]
    assert not list(tmp_path.iterdir())
    with exclusive_folder(tmp_path / "a", option="--out") as claim:
        (claim.folder / "kept").touch()
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["kept"]
    with exclusive_file(tmp_path / "rows.jsonl", option="--answers-file"):
        (tmp_path / "rows.jsonl").touch()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "rows.jsonl"]


def removed(folder: Path) -> None:
    shutil.rmtree(folder)


def made_again(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def taken_over(folder: Path) -> None:
    made_again(folder)
    (folder / CLAIM_FILE).write_text("another")


def renamed(folder: Path) -> None:
    folder.rename(folder.with_name("other"))


def replaced_by_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.touch()


@pytest.mark.parametrize("change", [removed, made_again, taken_over, renamed, replaced_by_a_file])
def test_a_folder_that_is_no_longer_there(tmp_path: Path, change: object) -> None:
    assert callable(change)
    with exclusive_folder(tmp_path / "run", option="--out") as claim:
        (claim.folder / "kept").touch()
        change(claim.folder)
        with pytest.raises(LlavaError, match="was removed while this run"):
            claim.check()


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="expected a folder"):
            ExitStack().enter_context(exclusive_folder(path, option="--out"))


def claimed(folder: Path) -> int:
    """Job: the number of claims out of 20 that this process got while others tried too."""
    number = 0
    for _ in range(20):
        try:
            with exclusive_folder(folder, option="--out"):
                (folder / "one").open("x").close()  # raises if two hold the claim
                time.sleep(0.001)
                (folder / "one").unlink()
            number += 1
        except ConfigError:
            time.sleep(0.001)
    return number


def test_never_two_at_once(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert sum(pool.map(claimed, [tmp_path] * 4)) > 0


def test_a_worker_process_does_not_keep_a_lock(tmp_path: Path) -> None:
    with exclusive_folder(tmp_path, option="--out"):
        child = os.fork()
        if not child:
            time.sleep(20)
            os._exit(0)
    with exclusive_folder(tmp_path, option="--out"):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
