"""Completion in the shell: commands, options of training and of other commands, and values."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llava.cli import COMMANDS, main
from llava.completion import options_of, own_parser, parser_of
from llava.utils.cli import WATCHER

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
    assert {"--out", "--model-name-or-path"} <= options_of("preferences score", "").keys()


WITHOUT_OPTIONS = {"rules new", "checkpoint diff"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_the_help_is_offered(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        main([*name.split(), "--help", "all"])
    shown = set(re.findall(r"^  (--[a-z0-9-]+)", capsys.readouterr().out, re.MULTILINE)) - {"--help"}
    offered = options_of(name, COMMANDS[name].target).keys()
    assert shown <= offered and bool(offered) is (name not in WITHOUT_OPTIONS)


def test_the_parser_is_whole_after_it_was_looked_for() -> None:
    assert own_parser("llava.data.mixture:main") is not None and WATCHER.get() is None


def test_a_command_whose_extra_is_not_installed_offers_no_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llava.data.dicom.deid", None)  # as if its import failed
    assert own_parser("llava.data.dicom.deid:main") is None


def test_looking_for_options_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom llava.cli import COMMANDS\nfrom llava.completion import options_of\n"
        "for name, command in COMMANDS.items():\n    options_of(name, command.target)\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, check=False)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (0, b"", []), done.stderr
