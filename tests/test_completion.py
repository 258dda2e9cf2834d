"""Completion in the shell: commands, options of training and of other commands, and values."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llava.cli import COMMANDS
from llava.completion import options_of, parser_of

ROOT = Path(__file__).resolve().parents[1]


def finished(line: str, tmp_path: Path) -> list[str]:
    """Return what the shell offers for a line, as argcomplete asks for it."""
    answer = tmp_path / "answer"
    environment = {
        "_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "COMP_LINE": line,
        "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
        "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin",
    }  # fmt: skip
    subprocess.run([sys.executable, "-m", "llava.cli"], env=environment, cwd=tmp_path, check=True, capture_output=True)
    return answer.read_text().split("\n")


def test_options_of_training_are_offered(tmp_path: Path) -> None:
    assert finished("llava train --mm-projector-t", tmp_path) == ["--mm-projector-type"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_place(name: str) -> None:
    line = f"llava {name} "
    parser = parser_of(line, {name: COMMANDS[name].target})
    assert parser.parse_known_args(name.split())[1] == []


def test_values_and_options_of_other_commands() -> None:
    assert "cosine" in (options_of("train", COMMANDS["train"].target)["--lr-scheduler-type"] or ())
    assert {"--data", "--image-folder", "--no-blank-control"} <= options_of("eval", COMMANDS["eval"].target).keys()
