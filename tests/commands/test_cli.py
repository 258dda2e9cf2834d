"""The `llava` command: help and version without heavy imports, dispatch, errors."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from llava import __version__, cli
from llava.errors import ConfigError, LlavaError
from llava.generation.loading import open_engine

ROOT = Path(__file__).resolve().parents[2]


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\nfrom llava.cli import main\nmain(['--version'])\nmain(['data'])\nmain(['--help'])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'PIL'} & sys.modules.keys()\nassert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, command in cli.COMMANDS.items():
        assert f"  {name} " in done.stdout
        assert command.example in done.stdout


def test_help_of_no_command_imports_torch() -> None:
    code = (
        "import sys\nfrom llava import cli\n"
        "for name in cli.COMMANDS:\n"
        "    try:\n        cli.main([*name.split(), '--help'])\n"
        "    except SystemExit as end:\n        assert end.code == 0, name\n"
        "    heavy = {'torch', 'transformers', 'fastapi', 'gradio'} & sys.modules.keys()\n"
        "    assert not heavy, (name, heavy)\n"
        "import time\nassert time.process_time() < 60, time.process_time()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") >= len(cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_leads_to_a_function(name: str) -> None:
    module, function = cli.COMMANDS[name].target.split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_the_rest_of_the_words_goes_to_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    module = types.ModuleType("fake_command")
    module.go = seen.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_command", module)
    monkeypatch.setitem(cli.COMMANDS, "train", cli.Command("fake_command:go", "", ""))
    monkeypatch.setitem(cli.COMMANDS, "data show", cli.Command("fake_command:go", "", ""))
    cli.main(["train", "--seed", "1"])
    cli.main(["data", "show", "train.json", "--row", "3"])
    assert seen == [["--seed", "1"], ["train.json", "--row", "3"]]


def test_help_of_a_command_shows_its_example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, command in cli.COMMANDS.items():
        fake = types.ModuleType("fake_command")
        fake.go = lambda words: None  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "fake_command", fake)
        monkeypatch.setitem(cli.COMMANDS, name, cli.Command("fake_command:go", command.summary, command.example))
        cli.main([*name.split(), "--help"])
        assert f"example: {command.example}" in capsys.readouterr().out


def help_of(name: str, *words: str) -> list[str]:
    """Return the lines that a command prints for `--help` and further words."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit) as end:
        cli.main([*name.split(), "--help", *words])
    assert end.value.code == 0
    return text.getvalue().splitlines()


MAX_LINES = {"train": 120}
"""Largest number of lines of the help of a command, where it is not `MAX_LINES_OF_OTHERS`."""

MAX_LINES_OF_OTHERS = 45

SHORT = ("eval", "serve", "chat", "findings", "ask", "preferences answer", "data images", "instruct generate")
"""Commands whose help shows first what a beginner needs."""


@pytest.mark.parametrize("name", SHORT)
def test_help_is_short_and_help_all_is_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    module = importlib.import_module(cli.COMMANDS[name].target.split(":")[0])
    names = {one.option_strings[0] for one in module.make_parser()._actions if one.option_strings} - {"-h"}
    shown, whole = help_of(name), help_of(name, "all")
    assert f"every option: llava {name} --help all" in shown and len(shown) < len(whole)
    assert max(map(len, [*shown, *whole])) <= 120 and shown[1].startswith("example: llava ")
    assert {line.split()[0].rstrip(",") for line in whole if line.startswith("  --")} >= names
    assert "other options:" not in whole
    assert help_of(name, "all") == whole


SCRIPTS = {
    "llava.eval.model_vqa_med": 35, "llava.eval.model_vqa": 35, "llava.eval.run_med_datasets_eval_batch": 35,
    "llava.eval.run_eval": 35, "llava.eval.run_eval_batch": 35, "llava.eval.eval_multimodal_chat_gpt_score": 45,
    "llava.eval.summarize_gpt_review": 45, "llava.eval.visual_sq": 35, "llava.eval.model_collectA": 35,
    "llava.eval.model_mimic_cxr": 35, "llava.eval.rrg_eval.run": 40, "llava.eval.chexprompt": 45,
    "llava.model.apply_delta": 35, "llava.model.make_delta": 35, "llava.model.consolidate": 35,
    "llava.model.merge_lora": 35, "llava.serve.controller": 35, "llava.serve.model_worker": 45,
    "llava.serve.test_message": 35, "llava.serve.register_worker": 35, "llava.serve.gradio_web_server": 35,
    "llava.serve.audit": 35, "llava.data.download_images": 45, "llava.instruct.instruct_generate": 45,
    "llava.instruct.instruct_postprocess": 35, "llava.train.train_mem": 115, "llava.train.train": 115,
    "llava.train.train_mem_dpo": 115, "llava.train.train_dpo": 115, "llava.train.train_rl": 115,
}  # fmt: skip
"""Published scripts, and the largest number of lines of their help."""


def test_help_of_no_published_script_imports_torch() -> None:
    code = (
        "import contextlib, importlib, io, json, sys\n"
        "for name, limit in json.loads(sys.argv[1]).items():\n"
        "    text = io.StringIO()\n"
        "    with contextlib.redirect_stdout(text):\n"
        "        try:\n            importlib.import_module(name).main(['--help'])\n"
        "        except SystemExit as end:\n            assert end.code == 0, name\n"
        "    lines = text.getvalue().splitlines()\n"
        "    assert lines[0].startswith('usage: ') and len(lines) <= limit, (name, len(lines))\n"
        "    assert any(line.startswith('example: ') or line == 'example:' for line in lines), name\n"
        "    assert max(map(len, lines)) <= 130, name\n"
        "    heavy = {'torch', 'transformers', 'fastapi', 'gradio'} & sys.modules.keys()\n"
        "    assert not heavy, (name, heavy)\n"
    )
    words = [sys.executable, "-c", code, json.dumps(SCRIPTS)]
    environment = {**os.environ, "COLUMNS": "118"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("word", ["--help=all", "--help-all"])
def test_other_spellings_of_help_all(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name, option in (("eval", "--num-beams"), ("train", "--vision-tower-lr"), ("data check", "--max-listed")):
        with contextlib.suppress(SystemExit):
            cli.main([*name.split(), word])
        shown = capsys.readouterr().out
        assert option in shown and f"example: {cli.COMMANDS[name].example}" in shown


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_no_help_is_long(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    with contextlib.suppress(SystemExit):
        cli.main([*name.split(), "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= MAX_LINES.get(name, MAX_LINES_OF_OTHERS), f"llava {name} --help: {len(lines)} lines"
    assert any(line.startswith("example: ") for line in lines)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--version"])
    assert capsys.readouterr().out == f"llava {__version__}\n"


@pytest.mark.parametrize("words", [["data"], ["data", "--help"], ["checkpoint"], ["instruct", "-h"]])
def test_a_group_lists_its_members_only(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(words)
    printed = capsys.readouterr().out
    shown = {name for name in cli.COMMANDS if f"\n  {name} " in printed}
    assert shown == {name for name in cli.COMMANDS if name.startswith(f"{words[0]} ")}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["data", "shwo"], "unknown command 'data shwo'; did you mean 'data show'?"),
        (["checkpiont", "inspect"], "unknown command 'checkpiont'; did you mean 'checkpoint'?"),
        (["checkpoint", "xyzzyxyzzy"], "expected checkpoint inspect, checkpoint doctor, "),
        ([""], "unknown command ''; `llava --help` lists all commands"),
        (["xyzzy"], "unknown command 'xyzzy'; `llava --help` lists all commands"),
    ],
)
def test_an_unknown_command_names_similar_ones(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert expected in message and message.count("\n") == 1 and "traceback" not in message.lower()


def test_a_traceback_is_shown_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_TRACEBACK", "1")
    with pytest.raises(ConfigError):
        cli.main(["trian"])


FOLDERS = {
    "eval": "llava.eval.run --model {m} --data {d} --image-folder nope --out o",
    "eval --rules": "llava.eval.run --rules chest-xray --model {m} --data {d} --image-folder nope --out o",
    "model_vqa": "llava.eval.model_vqa --model-name {m} --question-file {d} --image-folder nope --answers-file o",
    "med": "llava.eval.model_vqa_med --model-name {m} --question-file {d} --image-folder nope --answers-file o",
    "batch": "llava.eval.run_med_datasets_eval_batch --model-name {m} --question-file {d} --image-folder nope "
    "--answers-file o",
    "findings": "llava.eval.model_mimic_cxr --model-path {m} --query-file {d} --image-folder nope --prediction-file o",
    "collect": "llava.eval.model_collectA --model-path {m} --question-file {d} --image-folder nope --answers-file o",
    "answer": "llava.instruct.preferences.answer {d} --model {m} --image-folder nope --out o",
    "ask": "llava.instruct.ask --rows {d} --model {m} --image-folder nope --out o",
    "show": "llava.data.show_command {d} --model {m} --image-folder nope",
    "align": "llava.data.converters.alignment {d} --image-folder nope --out o",
    "split": "llava.data.converters.split {d} --by image --image-folder nope --fractions train=0.5,test=0.5 --out o",
    "cells": "llava.data.cells {d} --image-folder nope --out o",
    "check": "llava.data.check.cli {d} --images nope",
    "check, other": "llava.data.check.cli {d} --images . --against {d} --against-images nope",
    "ask, folder": "llava.instruct.ask --images nope --model {m} --out o",
    "visual_sq": "llava.eval.visual_sq --model-path {m} --image-folder nope --answers-file o",
    "rollouts": "llava.train.rollout.page run --image-folder nope",
}
"""A missing folder of images on the command line of each command that reads images."""


@pytest.mark.parametrize("name", FOLDERS)
def test_a_missing_folder_of_images_is_named_before_a_model_is_loaded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.json").write_text("[]")
    monkeypatch.chdir(tmp_path)
    module, *words = FOLDERS[name].format(m="no-model", d="rows.json").split()
    with pytest.raises(LlavaError, match=r"^--(image-folder|(against-)?images) nope: no such folder"):
        importlib.import_module(module).main(words)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_an_unknown_template_is_named_before_a_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown template 'v9'"):
        open_engine(str(tmp_path / "none"), template="v9")
