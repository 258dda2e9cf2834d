"""Stages run once, in order, and resume where they stopped; a folder holds one run."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from llava.errors import ConfigError, DataError
from llava.quickstart import command, run, settings
from llava.quickstart.machine import Machine
from llava.quickstart.settings import QuickstartSettings
from llava.quickstart.stages import STAGES, Context, Facts


def stages(calls: list[str], fail: str = "") -> run.Stages:
    def make(name: str) -> run.Stages:
        def function(context: Context) -> Facts:
            calls.append(name)
            if name == fail:
                raise RuntimeError("stopped")
            return {"seen": sorted(context.facts)}

        return {name: (f"title of {name}", function)}

    return {**make("one"), **make("two"), **make("three")}


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    options = QuickstartSettings(tmp_path / "run")
    calls: list[str] = []
    run.claim_folder(options, restart=False)
    with pytest.raises(RuntimeError, match="stopped"):
        run.run_stages(options, stages=stages(calls, fail="two"), out=io.StringIO())
    run.claim_folder(options, restart=False)
    out = io.StringIO()
    context = run.run_stages(options, stages=stages(calls), out=out)
    assert calls == ["one", "two", "two", "three"]
    assert context.facts["three"]["seen"] == ["one", "two"]
    assert "[1/3] title of one: done before" in out.getvalue()
    assert json.loads((tmp_path / "run/stages/two.json").read_text())["seconds"] >= 0


def test_a_folder_holds_one_run(tmp_path: Path) -> None:
    run.claim_folder(QuickstartSettings(tmp_path / "run"), restart=False)
    with pytest.raises(ConfigError, match="other seed"):
        run.claim_folder(QuickstartSettings(tmp_path / "run", seed=1), restart=False)
    (tmp_path / "run" / "left").write_text("")
    run.claim_folder(QuickstartSettings(tmp_path / "run", seed=1), restart=True)
    assert not (tmp_path / "run" / "left").exists()


@pytest.mark.parametrize("restart", [False, True])
def test_a_folder_of_something_else_is_never_touched(tmp_path: Path, restart: bool) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="files that are not"):
        run.claim_folder(QuickstartSettings(tmp_path), restart=restart)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


FOREIGN = [
    "{}",
    "[1, 2]",
    "7",
    "not JSON",
    '{"theme": "dark"}',
    '{"seed": 1, "num_train": 2, "num_test": 3, "other": 4}',
]


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("text", FOREIGN)
def test_settings_of_another_program_are_never_touched(
    tmp_path: Path, text: str, restart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava.quickstart.machine.measure_machine", lambda *_: Machine("cpu", 1, 10.0, 10.0))
    for name in ("settings.json", "plan.json"):
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match="holds files that are not a quickstart run"):
        command.main(["--out", str(tmp_path), *(["--restart"] if restart else [])])
    files = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert files == {"settings.json": text, "plan.json": text}


@pytest.mark.parametrize("text", ['{"a": 1}', "[1]", "7", "not JSON", '{"machine": "x", "reason": "y"}'])
def test_a_plan_of_another_program_is_one_line(tmp_path: Path, text: str) -> None:
    run.claim_folder(QuickstartSettings(tmp_path / "run"), restart=False)
    (tmp_path / "run" / "plan.json").write_text(text)
    with pytest.raises(ConfigError, match=r"plan\.json is not the plan of a quickstart run"):
        command.main(["--out", str(tmp_path / "run"), "--num-train", "480"])


def test_the_command_line(tmp_path: Path) -> None:
    for name in ("train.json", "test.json"):
        (tmp_path / name).write_text("[]")
    words = ["--data", str(tmp_path), "--lm", "a", "--vision_tower", "b", "--seed", "3", "--out", "o"]
    with pytest.raises(DataError, match="has no images"):
        settings.parse_settings(words)
    (tmp_path / "images").mkdir()
    parsed, restart = settings.parse_settings([*words, "--restart"])
    assert parsed == QuickstartSettings(Path("o"), tmp_path, "a", "b", 3) and restart
    assert (
        settings.parse_settings([])[0].size == settings.AUTO
        and settings.parse_settings(["--num_train", "9"])[0].num_train == 9
    )
    with pytest.raises(ConfigError, match="at least 50"):
        settings.parse_settings(["--num_test", "10"])


def test_every_stage_is_there() -> None:
    assert list(STAGES) == ["parts", "data", "before", "align", "tune", "after", "page"]
