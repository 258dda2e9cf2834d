"""YAML text: what aliases stand for is bounded, and every fault is an error of YAML."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from llava.data.mixture import read_mixture
from llava.errors import ConfigError
from llava.eval.task_files import read_task
from llava.utils.config_file import read_config
from llava.utils.yaml_files import MAX_VALUES, parse_yaml


def laughs(depth: int, first: str = "[x, x, x, x, x, x, x, x, x, x]") -> str:
    """Return lines of which each repeats the one before ten times."""
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{line}: &a{line} [{', '.join([f'*a{line - 1}'] * 10)}]" for line in range(1, depth)]
    return "\n".join(lines)


TEXTS = {
    "lists": (laughs(9), "aliases stand for more than 1,000,000 values"),
    "tables": (laughs(9, "{k: x, l: x}"), "aliases stand for more than 1,000,000 values"),
    "a value in itself": ("a: &a [*a]", "nested too deeply|recursive"),
    "deep": ("a: " + "[" * 5000, "nested too deeply"),
    "no such day": ("a: 2024-13-45", "a value cannot be read: month must be in 1..12"),
    "a tag that does not fit": ("a: !!int x", "a value cannot be read"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_fault_is_named(name: str) -> None:
    text, expected = TEXTS[name]
    with pytest.raises(yaml.YAMLError, match=expected):
        parse_yaml(text)


@pytest.mark.parametrize("read", [read_config, read_mixture, read_task])
@pytest.mark.parametrize("name", TEXTS)
def test_every_reader_refuses_it_in_one_line(tmp_path: Path, name: str, read: object) -> None:
    assert callable(read)
    path = tmp_path / "file.yaml"
    path.write_text(TEXTS[name][0])
    with pytest.raises(ConfigError) as raised:
        read(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_values_are_counted_with_their_repetitions() -> None:
    assert parse_yaml(laughs(5))["a4"][0][0][0][0] == ["x"] * 10  # 123,456 values
    assert MAX_VALUES < 10 * 123_456
    with pytest.raises(yaml.YAMLError):
        parse_yaml(laughs(6))
