"""Suggestions for mistyped options, and equal values of an option and its alias."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava.errors import ConfigError
from llava.train.parsing import parse_training_args
from tests.support.runs import arguments


def test_unknown_options_name_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--mm-projecter-lr 1 *; did you mean --mm-projector-lr\?"):
        parse_training_args([*arguments(tmp_path, tmp_path), "--mm_projecter_lr", "1"])


def test_both_names_of_the_tower_rate(tmp_path: Path) -> None:
    assert (
        parse_training_args([*arguments(tmp_path, tmp_path), "--vision_tower_lr", "1e-6"])[2].mm_vision_tower_lr == 1e-6
    )
    with pytest.raises(ConfigError, match="differ"):
        parse_training_args(
            [*arguments(tmp_path, tmp_path), "--vision_tower_lr", "1e-6", "--mm_vision_tower_lr", "1e-5"]
        )
