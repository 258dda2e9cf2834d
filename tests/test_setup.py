"""The script that makes the environment: what it installs, what it compiles, and that a second call does nothing."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Stands for the interpreter of the environment: writes down its arguments and whether it would write compiled modules.
RECORDER = """#!/usr/bin/env bash
printf '%s|%s\\n' "$*" "${PYTHONDONTWRITEBYTECODE:-}" >>"$(dirname "$0")/calls"
cat >/dev/null
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Return a folder with the files that the script reads and an environment whose interpreter only records."""
    for name in ("scripts/setup.sh", "scripts/pretrained.sha256", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(RECORDER, encoding="utf-8")
    python.chmod(0o755)
    return tmp_path


def calls(clone: Path, extras: str, dont_write: str) -> list[str]:
    """Return the calls of the interpreter that the script made."""
    record = clone / ".venv/bin/calls"
    record.write_text("", encoding="utf-8")
    subprocess.run(
        ["bash", clone / "scripts/setup.sh", extras],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": dont_write},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
    )
    return record.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("dont_write", ["", "1"])
def test_what_is_imported_is_compiled_once_where_python_would_not_keep_it(clone: Path, dont_write: str) -> None:
    first = calls(clone, "rad", dont_write)
    installed = [call for call in first if call.startswith("-m pip install")]
    assert len(installed) == 2
    assert "torch==2.13.0" in installed[0]
    # The call that imports, in which compiled modules are written.
    assert first[2:] == (["-P -|"] if dont_write else [])
    assert calls(clone, "rad", dont_write) == []


def test_what_cannot_be_compiled_does_not_stop_the_setup(clone: Path) -> None:
    python = clone / ".venv/bin/python"
    python.write_text(RECORDER + '[ "$1" != "-P" ]\n', encoding="utf-8")
    assert calls(clone, "rad", "1")[-1] == "-P -|"
    assert calls(clone, "rad", "1") == []


def test_fewer_extras_than_installed_need_nothing(clone: Path) -> None:
    calls(clone, "dev,rad", "")
    assert calls(clone, "rad", "") == []
    assert calls(clone, "data", "") != []


def test_a_changed_pin_installs_again(clone: Path) -> None:
    calls(clone, "rad", "")
    pins = clone / "constraints.txt"
    pins.write_text(pins.read_text(encoding="utf-8") + "# another\n", encoding="utf-8")
    assert calls(clone, "rad", "") != []
