"""The published command: every option of the original, and a recorded number that each one changes."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from llava.train.rollout_args import WITHOUT_EFFECT
from llava.train.train_rl import main
from tests.support.rollouts import rl_arguments, rollouts, write_toy
from tests.support.runs import metrics

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "train_rl_model.sh"

ORIGINAL = """
step_batch_size step_per_device_batch_size rollout_batch_size rollout_per_device_batch_size base_model_name
reward_model_per_device_batch_size policy_model_name_or_path reward_base_model_name reward_model_name_or_path
init_value_with_reward dataset_path train_splits total_epochs noptepochs kl_coef whiten_rewards whitening_async_stats
penalty_reward_value length_bonus_score correct_bonus_score relative_stop_token_penalty penalize_no_stop_token
clean_tokens_after_eos resume_from_training query_len response_len temperature reward_prompt_file
"""
"""Options of the original command."""

NOT_IN_SCRIPT = {"reward_base_model_name", "reward_model_name_or_path", "reward_prompt_file"}
"""Files of a reward model, of which the script has none."""


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy"))


def script_options() -> dict[str, str]:
    """Return the options of the script with their values."""
    text = SCRIPT.read_text().split("train_rl.py", 1)[1]
    return dict(re.findall(r'--(\w+) "?([^"\s\\]+)"?', text))


def test_the_script_has_every_option_of_the_original() -> None:
    assert set(ORIGINAL.split()) - script_options().keys() == NOT_IN_SCRIPT


def run(parts: Path, folder: Path, **changed: object) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Run the published command with the options of the script, smaller; return metrics and rollouts."""
    toy = rl_arguments(parts, folder)
    toy_values = dict(zip([word.removeprefix("--") for word in toy[::2]], toy[1::2], strict=True))
    paths = {"rules": toy_values["rules"], "base_model_name": toy_values["model_name_or_path"],
             "dataset_path": toy_values["data_path"]}  # fmt: skip
    small = {"policy_model_name_or_path": None, "vision_tower": toy_values["vision_tower"], "version": "vicuna_v1",
             "image_folder": toy_values["image_folder"], "output_dir": folder, "rollout_batch_size": 4,
             "step_batch_size": 2, "rollout_per_device_batch_size": 4, "step_per_device_batch_size": 2,
             "total_epochs": 1, "lora_r": 4, "response_len": 2, "report_to": "none", "save_strategy": "no",
             "disable_tqdm": True, "learning_rate": 1e-3, "bf16": False, "warmup_steps": 0}  # fmt: skip
    options: dict[str, object] = {**script_options(), **paths, **small, **changed}
    main([word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))])
    return metrics(folder), rollouts(folder)


def test_options_change_recorded_numbers(parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        before, first = run(parts, tmp_path / "first")
    warned = [text for text in caplog.messages if "without effect, since the reward is symbolic" in text]
    assert len(warned) == 1 and all(
        f"--{n.replace('_', '-')}" in warned[0] for n in set(WITHOUT_EFFECT) - NOT_IN_SCRIPT
    )
    after, second = run(
        parts, tmp_path / "second", rollout_batch_size=6, step_batch_size=6, rollout_per_device_batch_size=2,
        step_per_device_batch_size=3, total_epochs=2, noptepochs=1, kl_coef=0.3, penalty_reward_value=-3.0,
        response_len=3, temperature=2.0,
    )  # fmt: skip
    lines = [[line for line in found if "loss" in line] for found in (before, after)]
    per_step = [sum(row["step"] == 1 for row in found) for found in (first, second)]
    assert per_step == [4, 6]  # rollout_batch_size
    assert [max(row["step"] for row in found) for found in (first, second)] == [2, 2]  # total_epochs: 6 cases
    # step_batch_size and noptepochs: 2 x 2 updates of a rollout, or one
    assert [[line["step"] for line in found] for found in lines] == [[4, 8], [1, 2]]
    for name, values in (("rollout_slots", (4, 2)), ("update_rows", (1, 2)), ("kl_coef", (0.1, 0.3))):
        assert tuple(found[0][name] for found in lines) == values
    assert lines[0][0]["answer_tokens"] <= 4 < lines[1][0]["answer_tokens"] <= 6  # response_len
    assert lines[0][0]["entropy"] != lines[1][0]["entropy"]  # temperature
    for rows, penalty in ((first, -2.0), (second, -3.0)):
        unfinished = [row for row in rows if "stop" not in row["finishes"]]
        assert unfinished and all(row["score"] == pytest.approx(row["total"] + penalty) for row in unfinished)


@pytest.mark.parametrize(("name", "number"), [
    ("whiten_rewards", "advantages"), ("relative_stop_token_penalty", "score"), ("penalize_no_stop_token", "score"),
])  # fmt: skip
def test_one_option_changes_the_first_rollout(
    parts: Path, tmp_path: Path, published: list[dict[str, Any]], name: str, number: str
) -> None:
    _, rows = run(parts, tmp_path, **{name: False, "max_steps": 1})
    assert [row["answers"] for row in rows] == [row["answers"] for row in published]
    assert [row[number] for row in rows] != [row[number] for row in published]


def test_splits_select_the_cases(parts: Path, tmp_path: Path) -> None:
    rows = json.loads((parts / "table.json").read_text())
    splits = ["train", "val", "train", "val", "test", "train"]
    (tmp_path / "rows.json").write_text(
        json.dumps([row | {"split": split} for row, split in zip(rows, splits, strict=True)])
    )
    cases = {}
    for name in ("train", "val,test"):
        options = {"dataset_path": tmp_path / "rows.json", "train_splits": name, "noptepochs": 1}
        cases[name] = {row["case"] for row in run(parts, tmp_path / name, **options)[1]}
    assert cases == {"train": {"case0", "case2", "case5"}, "val,test": {"case1", "case3", "case4"}}


@pytest.fixture(scope="module")
def published(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Episodes of one rollout with the options of the script."""
    return run(parts, tmp_path_factory.mktemp("published"), max_steps=1)[1]
