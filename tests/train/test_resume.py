"""A killed run resumes with the results of an uninterrupted one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.ranks import run_ranks, start
from tests.support.runs import (
    arguments,
    losses,
    metrics,
    saved,
    steps,
    train,
    train_killed_while_saving,
    train_until_killed,
)

KINDS: dict[str, dict[str, Any]] = {
    "projector": {"tune_mm_mlp_adapter": True, "mm_use_im_start_end": True},
    "adapter": {"lora_enable": True, "lora_r": 4, "lora_dropout": 0.2},
    "model": {"lr_scheduler_type": "cosine"},
}
EVERY_STEP = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}


@pytest.fixture(scope="module")
def killed(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed at step 5 of 6; its last checkpoint is from step 4."""
    folder = tmp_path_factory.mktemp("killed")
    outcome = start(1, train_until_killed, arguments(parts, folder, **EVERY_STEP, **KINDS["model"]), 5)
    assert outcome == [("died", -9)]
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_equals_uninterrupted(parts: Path, tmp_path: Path, kind: str) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = {**EVERY_STEP, **KINDS[kind]}
    run_ranks(1, train, arguments(parts, whole, **options))
    assert start(1, train_until_killed, arguments(parts, broken, **options), 3) == [("died", -9)]
    assert steps(broken) == [1, 2, 3]
    run_ranks(1, train, arguments(parts, broken, **options))
    assert steps(whole) == steps(broken) == [1, 2, 3, 4, 5, 6]
    assert losses(whole) == losses(broken)
    assert losses(whole, "grad_norm") == losses(broken, "grad_norm")
    first, second = saved(whole), saved(broken)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_half_written_checkpoint_is_passed_over(parts: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_ranks(1, train, arguments(parts, whole, **EVERY_STEP))
    assert start(1, train_killed_while_saving, arguments(parts, broken, **EVERY_STEP), 4) == [("died", -9)]
    assert (broken / "checkpoint-4").is_dir() and not (broken / "checkpoint-4" / "trainer_state.json").exists()
    run_ranks(1, train, arguments(parts, broken, **EVERY_STEP))
    assert losses(whole) == losses(broken) and steps(broken) == [1, 2, 3, 4, 5, 6]
    assert all(torch.equal(tensor, saved(broken)[name]) for name, tensor in saved(whole).items())


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def test_a_torn_metrics_line_is_dropped(parts: Path, killed: Path, tmp_path: Path) -> None:
    folder = copied(killed, tmp_path / "run")
    with open(folder / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 5, "lo')
    run_ranks(1, train, arguments(parts, folder, **EVERY_STEP, **KINDS["model"]))
    assert steps(folder) == [1, 2, 3, 4, 5, 6]


def refusal(parts: Path, folder: Path, **changed: object) -> str:
    (kind, text), *_ = start(1, train, arguments(parts, folder, **{**EVERY_STEP, **KINDS["model"], **changed}))
    assert kind == "error" and text.startswith("ConfigError")
    return str(text)


def test_other_data_or_another_batch_are_refused(parts: Path, killed: Path, tmp_path: Path) -> None:
    folder = copied(killed, tmp_path / "run")
    rows = json.loads((parts / "vqa" / "train.json").read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps(rows[:-1]))
    before = (folder / "metrics.jsonl").read_bytes()
    assert "data_sha256" in refusal(parts, folder, data_path=other)
    assert "global_batch 4, this run has 2" in refusal(parts, folder, per_device_train_batch_size=2).replace("'", "")
    assert "trains model, this run has adapter" in refusal(parts, folder, lora_enable=True).replace("'", "")
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_resumed_on_two_ranks(parts: Path, killed: Path, tmp_path: Path) -> None:
    """The same global batch on another number of ranks draws the same rows."""
    one, two = copied(killed, tmp_path / "one"), copied(killed, tmp_path / "two")
    options = {**EVERY_STEP, **KINDS["model"]}
    run_ranks(1, train, arguments(parts, one, **options))
    run_ranks(2, train, arguments(parts, two, **{**options, "per_device_train_batch_size": 2}))
    assert steps(two) == [1, 2, 3, 4, 5, 6]
    assert losses(one) == pytest.approx(losses(two), rel=2e-5)


def test_overwriting_starts_over(parts: Path, killed: Path, tmp_path: Path) -> None:
    folder = copied(killed, tmp_path / "run")
    run_ranks(1, train, arguments(parts, folder, **KINDS["model"], num_train_epochs=1, overwrite_output_dir=True))
    assert steps(folder) == [1, 2, 3]
    assert not list(folder.glob("checkpoint-*"))


def test_a_finished_run_does_nothing_again(parts: Path, tmp_path: Path) -> None:
    options = {**EVERY_STEP, "log_row_ids": True, "save_steps": 3}
    run_ranks(1, train, arguments(parts, tmp_path, **options))
    before = {name: (tmp_path / name).read_text() for name in ("row_ids-0.jsonl",)}
    weights = saved(tmp_path)
    run_ranks(1, train, arguments(parts, tmp_path, **options))
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert sum("train_runtime" in row for row in metrics(tmp_path)) == 1
    assert before == {name: (tmp_path / name).read_text() for name in before}
    assert all(torch.equal(tensor, saved(tmp_path)[name]) for name, tensor in weights.items())


def test_row_ids_of_a_resumed_run_are_not_doubled(parts: Path, tmp_path: Path) -> None:
    options = {**EVERY_STEP, "log_row_ids": True}
    assert start(1, train_until_killed, arguments(parts, tmp_path, **options), 5) == [("died", -9)]
    run_ranks(1, train, arguments(parts, tmp_path, **options))
    rows = [json.loads(line) for line in (tmp_path / "row_ids-0.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert sorted(number for row in rows for number in row["rows"]) == sorted(list(range(12)) * 2)
