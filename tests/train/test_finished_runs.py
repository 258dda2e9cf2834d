"""A finished run that is started again says so, trains nothing and changes no file."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.errors import ConfigError
from tests.support.pairs import pair_arguments, write_pairs
from tests.support.ranks import run_ranks
from tests.support.runs import arguments, losses, saved, steps, train

KINDS: dict[str, dict[str, Any]] = {
    "steps, saved at the end": {"max_steps": 2, "save_strategy": "steps", "save_steps": 500},
    "steps, within an epoch": {"max_steps": 4, "save_strategy": "epoch"},
    "steps, without a checkpoint": {"max_steps": 2, "save_strategy": "no"},
    "epochs": {"num_train_epochs": 2, "save_strategy": "epoch"},
    "epochs, only the last kept": {"num_train_epochs": 2, "save_strategy": "epoch", "save_total_limit": 1},
    "epochs, without a checkpoint": {"num_train_epochs": 1, "save_strategy": "no"},
    "a projector": {"max_steps": 2, "save_strategy": "steps", "tune_mm_mlp_adapter": True},
    "an adapter": {"max_steps": 2, "save_strategy": "steps", "lora_enable": True, "lora_r": 2},
}


def states(folder: Path) -> dict[str, tuple[int, str]]:
    """Return time and hash of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in files
    }


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes(parts: Path, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    words = arguments(parts, tmp_path / "run", **KINDS[kind])
    train(words)
    before = states(tmp_path / "run")
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            train(words)
        assert "the run is finished (step" in caplog.text and "--overwrite-output-dir" in caplog.text
        assert states(tmp_path / "run") == before


@pytest.mark.parametrize(
    "others",
    [
        {"save_strategy": "steps", "save_steps": 1},
        {"save_strategy": "no"},
        {"save_strategy": "steps", "lora_enable": True, "lora_r": 2},
        {"save_strategy": "epoch", "pref_loss": "simpo"},
        {"save_strategy": "steps", "objective": "reward"},
    ],
)
def test_nothing_changes_in_a_run_of_pairs(parts: Path, tmp_path: Path, others: dict[str, Any]) -> None:
    write_pairs(tmp_path / "pairs")
    data = {"data_path": tmp_path / "pairs" / "pairs.json", "image_folder": tmp_path / "pairs" / "images"}
    words = pair_arguments(parts, tmp_path / "run", **data, **others)
    train(words)
    before = states(tmp_path / "run")
    train(words)
    assert states(tmp_path / "run") == before


def test_a_run_that_stopped_early_is_finished(parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    held_out = {"eval_data_path": parts / "vqa" / "train.json", "eval_answers": 0, "save_strategy": "epoch"}
    words = {**held_out, "num_train_epochs": 9, "early_stopping_patience": 1, "learning_rate": 0.0}
    train(arguments(parts, tmp_path / "run", **words))
    assert steps(tmp_path / "run")[-1] == 6, "stopped after the second epoch"
    before = states(tmp_path / "run")
    with caplog.at_level(logging.INFO):
        train(arguments(parts, tmp_path / "run", **words))
    assert "the run is finished (step 6 of 27)" in caplog.text and states(tmp_path / "run") == before


def test_skipped_rows_keep_their_list(parts: Path, tmp_path: Path) -> None:
    rows = json.loads((parts / "vqa" / "train.json").read_text())
    rows[3]["image"] = "gone.png"
    (tmp_path / "rows.json").write_text(json.dumps([*rows, 7]))
    words = arguments(parts, tmp_path / "run", data_path=tmp_path / "rows.json", skip_bad=True, max_steps=1)
    train(words)
    before = states(tmp_path / "run")
    train(words)
    assert states(tmp_path / "run") == before and "quarantine.jsonl" in before


def test_two_ranks_change_nothing(parts: Path, tmp_path: Path) -> None:
    words = arguments(parts, tmp_path / "run", max_steps=2, save_strategy="steps", per_device_train_batch_size=2)
    run_ranks(2, train, words)
    before = states(tmp_path / "run")
    run_ranks(2, train, words)
    assert states(tmp_path / "run") == before


@pytest.mark.parametrize("kind", ["steps, saved at the end", "epochs"])
def test_a_run_that_ended_before_its_last_save_is_completed(parts: Path, tmp_path: Path, kind: str) -> None:
    """With the weights of its last step: no step is trained again."""
    words = KINDS[kind]
    train(arguments(parts, tmp_path / "whole", **words))
    folder = Path(shutil.copytree(tmp_path / "whole", tmp_path / "run"))
    (folder / "model.safetensors").unlink()
    train(arguments(parts, folder, **words))
    first, second = saved(tmp_path / "whole"), saved(folder)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert losses(folder) == losses(tmp_path / "whole")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert "train_runtime" in lines[-1] and "train_loss" not in lines[-1], "no loss was computed"


def test_more_steps_continue_and_changed_weights_are_saved_again(parts: Path, tmp_path: Path) -> None:
    words = {"save_strategy": "epoch"}
    train(arguments(parts, tmp_path, **words, num_train_epochs=1))
    train(arguments(parts, tmp_path, **words, num_train_epochs=2))
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-4] + b"\1\1\1\1")
    train(arguments(parts, tmp_path, **words, num_train_epochs=2))
    assert (tmp_path / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(("before", "now"), [(0, 42), (42, 0), (1, 2), (7, 42), (42, 43)])
def test_another_seed_is_refused(parts: Path, tmp_path: Path, before: int, now: int) -> None:
    words = {"max_steps": 1, "save_strategy": "steps"}
    train(arguments(parts, tmp_path, **words, seed=before))
    earlier = states(tmp_path)
    for changed in ({}, {"max_steps": 2}):
        with pytest.raises(ConfigError, match=f"cannot be resumed: its run had seed {before}, this run has {now}"):
            train(arguments(parts, tmp_path, **{**words, **changed}, seed=now))
    assert states(tmp_path) == earlier


def test_it_starts_over_where_that_is_requested(parts: Path, tmp_path: Path) -> None:
    words = {"max_steps": 1, "save_strategy": "steps"}
    train(arguments(parts, tmp_path, **words))
    before = states(tmp_path)
    train(arguments(parts, tmp_path, **words, overwrite_output_dir=True))
    assert states(tmp_path)["model.safetensors"][0] > before["model.safetensors"][0]
    train(arguments(parts, tmp_path, **{**words, "save_strategy": "no"}, learning_rate=1e-4, overwrite_output_dir=True))
    assert states(tmp_path)["model.safetensors"][1] != before["model.safetensors"][1]
