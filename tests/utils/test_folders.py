"""Folders appear whole or not at all; what a killed process left is removed by the next one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llava.errors import CheckpointError
from llava.utils.folders import final_path, new_folder

KILLED = """
import os, signal, sys
from pathlib import Path
from llava.utils import folders
moment, path = sys.argv[1], Path(sys.argv[2])
die = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
if moment == "before the rename":
    folders.os.replace = die
with folders.new_folder(path) as folder:
    if moment == "empty":
        die()
    (folder / "model.safetensors").write_bytes(b"x" * 1000)
    (folder / "inner").mkdir()
    (folder / "inner" / "config.json").write_text("{}")
    if moment == "half":
        die()
"""


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("moment", ["empty", "half", "before the rename"])
def test_a_kill_leaves_nothing_that_the_next_run_refuses_or_keeps(tmp_path: Path, moment: str, exists: bool) -> None:
    target = tmp_path / "out"
    if exists:
        target.mkdir()
    command = [sys.executable, "-c", KILLED, moment, str(target)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert target.exists() == exists and len(list(tmp_path.iterdir())) == 1 + exists
    with new_folder(target) as folder:
        (folder / "config.json").write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in target.iterdir()] == ["config.json"]


def test_the_folder_of_a_running_process_stays(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with new_folder(target) as first:
        (first / "a").write_text("")
        with pytest.raises(CheckpointError, match="full"), new_folder(target):
            raise CheckpointError("full")
        assert (first / "a").is_file()
    assert (target / "a").is_file() and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", [".out-notes", ".out-abcd123", ".out-abcd12345", ".other-abcd1234", "out-abcd1234"])
def test_only_its_own_leftovers_are_removed(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("")
    assert (tmp_path / name).is_dir()


def test_a_hidden_folder_with_other_content_stays(tmp_path: Path) -> None:
    (tmp_path / ".out-abcd1234" / "mine").mkdir(parents=True)
    (tmp_path / ".out-abcd5678").write_text("a file")
    with new_folder(tmp_path / "out"):
        pass
    assert (tmp_path / ".out-abcd1234" / "mine").is_dir() and (tmp_path / ".out-abcd5678").is_file()


def test_its_path_is_known_before_it_appears(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as folder:
        assert final_path(folder) == tmp_path / "out" and folder != tmp_path / "out"
    assert final_path(tmp_path / "out") == tmp_path / "out"


def test_a_link_to_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("")
    assert (tmp_path / "real" / "a").is_file() and (tmp_path / "out").is_symlink()


def test_a_full_folder_and_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    (tmp_path / "file").write_text("")
    for name in ("full", "file"):
        with pytest.raises(CheckpointError, match="exists already"), new_folder(tmp_path / name):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with (
        pytest.raises(CheckpointError, match=r"cannot be written: the folder .* is read-only"),
        new_folder(tmp_path / "a" / "b"),
    ):
        pass
    tmp_path.chmod(0o700)
