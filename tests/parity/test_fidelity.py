"""The comparison with recorded numbers: what it says of the oracles at hand, and that it can say no."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks import fidelity
from benchmarks.oracles.folder import Differences, Line, Oracle, within
from benchmarks.oracles.published import is_shifted
from llava.compat import COMPAT, parse_names, table
from llava.errors import ConfigError

SLOW = ("train_log.json", "generate.json", "forward.npz", "expected_metrics.json", "lora_forward.npz", "grads.json")
"""Checks that take seconds; other tests run what they run, `generate.json` below."""

FOLDERS = ("llava-1.2.2", "llava-med-1.0", "llava-med-1.5-mistral", "llava-rad", "stllava-med")


@pytest.fixture
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {name: check for name, check in fidelity.CHECKS.items() if name not in SLOW}
    monkeypatch.setattr(fidelity, "CHECKS", {**quick, **{name: lambda _: iter(()) for name in SLOW}})


@pytest.mark.usefixtures("calm")
@pytest.mark.parametrize("folder", FOLDERS)
def test_recorded_texts_and_pictures(shared: Path, folder: str) -> None:
    lines = list(fidelity.checked(shared / "oracles" / folder, frozenset(COMPAT)))
    assert not [line for line in lines if line.status == "FAIL"]
    assert all(line.note for line in lines if line.status == "skipped")
    assert sum(line.status == "ok" for line in lines) >= 2


@pytest.mark.parametrize("folder", FOLDERS[:4])
def test_recorded_generations(shared: Path, folder: str) -> None:
    lines = list(fidelity.CHECKS["generate.json"](Oracle(shared / "oracles" / folder)))
    assert lines and all(line.status == "ok" for line in lines), lines


def copy_of(shared: Path, target: Path, *names: str) -> Path:
    target.mkdir()
    for name in names:
        source = shared / "oracles" / "llava-1.2.2" / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target / name)
    return target


@pytest.mark.parametrize("name", ["counted_labels", "ignored_rows", "shifted_labels", "refused_rows"])
def test_without_its_name_nothing_is_explained(shared: Path, name: str) -> None:
    oracle = Oracle(shared / "oracles" / "llava-1.2.2", frozenset(COMPAT) - {name})
    lines = {line.quantity: line for line in fidelity.CHECKS["preprocess.json"](oracle)}
    wrong = lines["token ids" if name == "refused_rows" else "labels"]
    assert wrong.status == "FAIL" and name in wrong.note


def test_a_changed_label_and_a_changed_prompt_are_seen(shared: Path, tmp_path: Path) -> None:
    folder = copy_of(shared, tmp_path / "x", "base_llm", "data.json", "preprocess.json", "prompts.json")
    rows = {"sp_legacy": {"v1": json.loads((folder / "preprocess.json").read_text())["sp_legacy"]["v1"]}}
    rows["sp_legacy"]["v1"]["img_mid"]["labels"][-1] = -100
    (folder / "preprocess.json").write_text(json.dumps(rows))
    prompts = json.loads((folder / "prompts.json").read_text())
    prompts["v1"]["prompt"] += " "
    (folder / "prompts.json").write_text(json.dumps(prompts))
    lines = {line.quantity: line for line in fidelity.checked(folder, frozenset(COMPAT))}
    assert lines["labels"].status == "FAIL" and "img_mid" in lines["labels"].note
    assert lines["token ids"].status == "ok"
    assert lines["prompts"].status == "FAIL" and "v1" in lines["prompts"].note


def test_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "some"
    folder.mkdir()
    (folder / "dpo.npz").write_bytes(b"")
    assert fidelity.report(tmp_path) == 0
    (folder / "unheard.npz").write_bytes(b"")
    assert fidelity.report(tmp_path) == 1
    (folder / "unheard.npz").unlink()
    (folder / "tower.npz").write_bytes(b"")
    assert fidelity.report(tmp_path) == 1
    printed = capsys.readouterr().out
    assert "FAIL" in printed and "1 skipped (1 without a reason)" not in printed
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no folder of recorded numbers"):
        fidelity.report(tmp_path / "empty")


def test_differences() -> None:
    found = Differences()
    found.add([1.0, 2.0], np.array([1.0, 2.5]))
    found.add([], [])
    assert (found.largest, found.num_compared) == (0.5, 2)
    assert within("q", found.largest, 0.5) == Line("q", 0.5, "ok")
    with pytest.raises(ValueError, match="shape"):
        found.add([1.0], [1.0, 2.0])
    found.add([float("nan")], [1.0])
    assert within("q", found.largest, 9.0).status == "FAIL"


def test_shifted_labels() -> None:
    assert is_shifted([-100, 5, 6, -100], [5, 5, -100, -100])
    assert not is_shifted([-100, 5, 6, -100], [-100, -100, -100, -100])
    assert not is_shifted([-100, 5, 6, 7, -100], [-100, -100, -100, 7, -100])


def test_names() -> None:
    assert parse_names("all") == frozenset(COMPAT) and parse_names("none") == frozenset()
    assert parse_names("cut_prompt, ignored_rows") == {"cut_prompt", "ignored_rows"}
    with pytest.raises(ConfigError, match="nonsense"):
        parse_names("cut_prompt,nonsense")
    assert len(table().splitlines()) == len(COMPAT)
    assert all(case.original and case.spec for case in COMPAT.values())
