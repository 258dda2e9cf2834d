"""`llava env`: versions of the packages and the devices, as text and as JSON, without paths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llava import __version__, cli


def test_versions_and_devices(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["env", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["llava"] == __version__ and found["torch"] == torch.__version__
    assert found["cpus"] >= 1 and "memory" in found and ("gpus" in found or "gpu 0" in found)
    assert str(Path.home()) not in json.dumps(found)


def test_the_text_has_one_line_a_fact(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["env"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["llava", __version__] and any(line.startswith("transformers ") for line in lines)
