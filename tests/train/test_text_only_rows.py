"""Alignment with text-only rows: their steps have a loss and no gradient, on one rank and on two."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.ranks import run_ranks
from tests.support.runs import arguments, losses, steps, train
from tests.support.tiny import tiny_image

ALIGN = {"tune_mm_mlp_adapter": True, "per_device_train_batch_size": 1, "learning_rate": 1e-2}
TOWER = {"freeze_backbone": True, "unfreeze_mm_vision_tower": True, "per_device_train_batch_size": 1}


def write(folder: Path, kinds: str) -> dict[str, Path]:
    """Write rows with an image (`i`) and without (`t`); return the options that name them."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for number, kind in enumerate(kinds):
        question = "<image>\nQ?" if kind == "i" else f"What is {number}?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "word " * (1 + number % 3)}]
        rows.append({"id": f"{kind}{number}", "conversations": turns})
        if kind == "i":
            tiny_image(number).save(folder / "images" / f"{number}.png")
            rows[-1]["image"] = f"{number}.png"
    (folder / "rows.json").write_text(json.dumps(rows))
    return {"data_path": folder / "rows.json", "image_folder": folder / "images"}


@pytest.mark.parametrize(
    "changed",
    [
        ALIGN,
        {**ALIGN, "group_by_modality_length": True},
        {**ALIGN, "gradient_accumulation_steps": 2},
        {**ALIGN, "max_tokens_per_row": 1, "per_device_train_batch_size": 4},
        {**ALIGN, "loss_normalization": "micro_batches", "gradient_accumulation_steps": 3},
        {**ALIGN, "gradient_checkpointing": True},
        {**ALIGN, "mm_use_im_start_end": True},
        {**ALIGN, "max_grad_norm": 0.0, "weight_decay": 0.1},
        {**ALIGN, "train_sampling_strategy": "sequential"},
        TOWER,
        {**TOWER, "group_by_modality_length": True},
        {**TOWER, "freeze_mm_mlp_adapter": True},
    ],
    ids=" ".join,
)
def test_every_step_has_a_finite_loss(parts: Path, tmp_path: Path, changed: dict[str, object]) -> None:
    train(arguments(parts, tmp_path / "run", **write(tmp_path, "iiiittt"), **changed))
    size = int(str(changed["per_device_train_batch_size"])) * int(str(changed.get("gradient_accumulation_steps", 1)))
    assert steps(tmp_path / "run") == list(range(1, -(-7 // size) + 1))
    assert all(loss > 0 for loss in losses(tmp_path / "run"))


def test_the_projector_is_written_and_text_rows_do_not_move_it(parts: Path, tmp_path: Path) -> None:
    """Without momentum and decay, steps of text-only rows leave the weights as they are."""
    plain = {**ALIGN, "optim": "sgd", "train_sampling_strategy": "sequential", "lr_scheduler_type": "constant"}
    train(arguments(parts, tmp_path / "mixed", **write(tmp_path / "a", "iittt"), **plain))
    train(arguments(parts, tmp_path / "images", **write(tmp_path / "b", "ii"), **plain))
    both = [torch.load(tmp_path / name / "mm_projector.bin", weights_only=True) for name in ("mixed", "images")]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[1])
    found = losses(tmp_path / "mixed", "grad_norm")
    assert all(norm > 0 for norm in found[:2]) and found[2:] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("kinds", "changed"), [("ititit", ALIGN), ("iiittt", TOWER), ("tttti", ALIGN)], ids=["mixed", "tower", "text"]
)
def test_two_ranks_of_which_one_has_only_text(
    parts: Path, tmp_path: Path, kinds: str, changed: dict[str, object]
) -> None:
    """The loss is that of one rank with both rows in a step."""
    words = {**write(tmp_path, kinds), **changed, "train_sampling_strategy": "sequential"}
    run_ranks(2, train, arguments(parts, tmp_path / "two", **words))
    train(arguments(parts, tmp_path / "one", **{**words, "per_device_train_batch_size": 2}))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_a_file_without_images_says_that_nothing_is_trained(
    parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        train(arguments(parts, tmp_path / "run", **write(tmp_path, "ttt"), **ALIGN))
    assert "no row has an image, and only parts for images are trained: their weights do not change" in caplog.text
