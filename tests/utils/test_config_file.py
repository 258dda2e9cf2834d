"""Configuration files: precedence, unknown keys, kinds of values, and broken files."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava.errors import ConfigError
from llava.utils.config_file import config_text, expand, read_config

KNOWN = {"--learning-rate", "--pref-loss", "--bf16", "--fsdp-config", "--seed", "--warmup-steps", "--warmup-ratio"}
LISTS = {"--pref-loss"}


def written(tmp_path: Path, text: str) -> str:
    (tmp_path / "run.yaml").write_text(text)
    return str(tmp_path / "run.yaml")


def expanded(words: list[str]) -> list[str]:
    return expand(words, lists=LISTS, known=KNOWN, aliases={"--warmup-ratio": "--warmup-steps"})


@pytest.mark.parametrize("form", [["{}"], ["--config", "{}"], ["--config={}"]])
def test_options_of_a_file_come_first(form: list[str], tmp_path: Path) -> None:
    path = written(tmp_path, "learning_rate: 2e-5\nbf16: true\npref-loss: [sigmoid, sft]\nseed:\n")
    words = expanded([*(word.format(path) for word in form), "--seed", "3"])
    assert words == ["--learning-rate=2e-5", "--bf16", "True", "--pref-loss", "sigmoid", "sft", "--seed", "3"]


@pytest.mark.parametrize("given", [["--learning-rate", "1"], ["--learning_rate=1"], ["--learning", "1"]])
def test_the_command_line_wins(given: list[str], tmp_path: Path) -> None:
    path = written(tmp_path, "learning_rate: 2e-5\nseed: 4\n")
    assert expanded([path, *given]) == ["--seed=4", *given]


def test_the_command_line_wins_over_a_published_name(tmp_path: Path) -> None:
    path = written(tmp_path, "warmup_ratio: 0.1\n")
    assert expanded([path, "--warmup-steps", "5"]) == ["--warmup-steps", "5"]


def test_a_list_on_the_command_line_replaces_that_of_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "pref_loss: [sigmoid, sft]\n")
    assert expanded([path, "--pref-loss", "ipo"]) == ["--pref-loss", "ipo"]


def test_a_table_becomes_json(tmp_path: Path) -> None:
    path = written(tmp_path, "fsdp_config:\n  min_num_params: 5\n")
    assert expanded([path]) == ['--fsdp-config={"min_num_params": 5}']


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lerning_rate: 1\n", r"run.yaml: unknown option lerning_rate; did you mean --learning-rate\?"),
        ("seed: [1\n", r"run.yaml line 2: not YAML"),
        ("- seed\n", "expected a table of options"),
        ("seed: 1\nseed: 2\n", "repeated"),
        ("seed: 1\nlearning-rate: 1\nlearning_rate: 1\n", "two spellings"),
        ("seed: 2020-01-01\n", "expected a text, a number or a list"),
        ("!!python/object/apply:os.system ['true']\n", "not YAML"),
    ],
)
def test_a_broken_file_is_refused(text: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=expected):
        expanded([written(tmp_path, text)])


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    options = {"learning_rate": 2e-05, "bf16": "auto", "pref_loss": ["sigmoid"], "seed": 3}
    path = written(tmp_path, config_text(options, comment="options"))
    assert read_config(path) == {f"--{name.replace('_', '-')}": value for name, value in options.items()}
