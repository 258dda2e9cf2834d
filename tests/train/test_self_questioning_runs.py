"""Runs that learn to ask, with an adapter in the vision tower."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from llava.errors import ConfigError
from llava.model.checkpoint.formats import ADAPTER_FILE
from llava.model.checkpoint.load_parts import read_tensors
from tests.support.ranks import run_ranks
from tests.support.runs import arguments, losses, metrics, train


@pytest.fixture(scope="module")
def dialogues(parts: Path) -> Path:
    rows = json.loads((parts / "vqa" / "train.json").read_text())
    by_image: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_image.setdefault(row["image"], []).extend(row["conversations"])
    for turns in by_image.values():
        for turn in turns:
            turn["value"] = turn["value"].removeprefix("<image>\n")
    joined = [{"id": name, "image": name, "conversations": turns} for name, turns in by_image.items()]
    (parts / "vqa" / "dialogues.json").write_text(json.dumps(joined))
    return parts / "vqa" / "dialogues.json"


@pytest.fixture(scope="module")
def settings(dialogues: Path) -> dict[str, object]:
    return {
        "version": "v1_sq",
        "sq_r": 0.5,
        "data_path": dialogues,
        "per_device_train_batch_size": 1,
        "num_train_epochs": 2,
        "lora_enable": True,
        "lora_r": 4,
        "vit_lora_enable": True,
        "lora_r_vit": 2,
        "mm_projector_type": "cluster",
        "mm_cluster_num_centers": 3,
        "mm_projector_lr": 1e-3,
        "vision_tower_lr": 1e-2,
        "save_strategy": "steps",
        "save_steps": 2,
    }


@pytest.fixture(scope="module")
def run(parts: Path, settings: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "first"
    train(arguments(parts, output, **settings))
    return output


def test_losses_of_questions_and_answers_are_logged(run: Path) -> None:
    assert len(losses(run)) == 6
    assert losses(run, "question_loss") and len(losses(run, "answer_loss")) == 6
    for row in (row for row in metrics(run) if "question_loss" in row):
        low, high = sorted((row["question_loss"], row["answer_loss"]))
        assert low - 1e-4 <= row["loss"] <= high + 1e-4


def test_the_towers_adapter_moves_below_the_last_block(run: Path) -> None:
    weights = read_tensors(run / ADAPTER_FILE)
    second = {name: w for name, w in weights.items() if "vision_tower." in name and "lora_B" in name}
    assert len(second) == 12 and all(bool(weight.any()) for weight in second.values())
    assert not any("layers.2." in name for name in second)


def test_all_of_the_cluster_projector_trains_except_its_unused_norm(run: Path) -> None:
    first, last = (
        read_tensors(folder / "non_lora_trainables.bin") for folder in (run / "checkpoint-2", run / "checkpoint-6")
    )
    moved = {name for name, weight in first.items() if not torch.equal(weight, last[name])}
    assert {name for name in first if name not in moved} == {name for name in first if "ln_1" in name} != set()


def test_a_resumed_run_is_the_uninterrupted_one(
    parts: Path, run: Path, settings: dict[str, object], tmp_path: Path
) -> None:
    output = tmp_path / "again"
    output.mkdir()
    for name in ("checkpoint-2", "provenance.json", "resolved_arguments.json"):
        source = run / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, output / name)
    train(arguments(parts, output, **settings))
    for name in (ADAPTER_FILE, "non_lora_trainables.bin"):
        ours, theirs = read_tensors(output / name), read_tensors(run / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"version": "v1"}, r"--sq-r 0.5: template v1 has no header"),
        ({"feature_cache_dir": "cache"}, r"--feature-cache-dir needs a frozen vision tower"),
        ({"unfreeze_mm_vision_tower": True}, "set one of them"),
        ({"sq_r": 1.5}, "expected a number from 0 to 1"),
    ],
)
def test_what_is_refused(
    parts: Path, settings: dict[str, object], tmp_path: Path, changed: dict[str, object], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        train(arguments(parts, tmp_path / "out", **{**settings, **changed}))
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_two_ranks_train_as_one(parts: Path, run: Path, settings: dict[str, object], tmp_path: Path) -> None:
    same = {**settings, "lora_dropout": 0.0, "lora_dropout_vit": 0.0, "save_strategy": "no", "num_train_epochs": 1}
    same |= {"seed": 5, "sq_r": 1.0, "logging_steps": 1}
    train(arguments(parts, tmp_path / "one", **{**same, "per_device_train_batch_size": 2}))
    run_ranks(2, train, arguments(parts, tmp_path / "two", **{**same, "per_device_train_batch_size": 1}))
    for name in ("loss", "question_loss", "answer_loss"):
        assert losses(tmp_path / "two", name) == pytest.approx(losses(tmp_path / "one", name), abs=1e-4), name
