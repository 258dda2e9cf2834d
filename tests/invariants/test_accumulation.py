"""Training results do not depend on how a batch is split and laid out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.runs import arguments, losses, saved, train, write_parts, write_uneven


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_parts(tmp_path_factory.mktemp("parts"))
    write_uneven(folder, 24)
    return folder


def options(parts: Path, **changed: object) -> dict[str, Any]:
    """Thirty steps of 8 rows with 1 to 60 trained tokens, some without images."""
    data = {"data_path": parts / "uneven.json", "image_folder": parts / "images"}
    return {**data, "per_device_train_batch_size": 8, "max_steps": 30, "learning_rate": 1e-3, **changed}


@pytest.fixture(scope="module")
def plain(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    train(arguments(parts, folder, **options(parts)))
    return folder


def assert_same(first: Path, second: Path) -> None:
    """Return the losses of all steps, the gradient norms, and the final weights."""
    assert len(losses(first)) == 30
    assert losses(second) == pytest.approx(losses(first), rel=5e-4)
    assert losses(second)[:5] == pytest.approx(losses(first)[:5], rel=2e-6)
    assert losses(second, "grad_norm")[:5] == pytest.approx(losses(first, "grad_norm")[:5], rel=2e-4)
    ours, theirs = saved(first), saved(second)
    for name, tensor in ours.items():
        difference = (tensor - theirs[name]).norm()
        assert difference <= 2e-2 * tensor.norm() + 1e-3, name


@pytest.mark.parametrize("accumulation", [2, 8])
def test_accumulation_changes_nothing(parts: Path, plain: Path, tmp_path: Path, accumulation: int) -> None:
    changed = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    train(arguments(parts, tmp_path, **options(parts, **changed)))
    assert losses(tmp_path) == losses(plain)
    assert all(torch.equal(tensor, saved(tmp_path)[name]) for name, tensor in saved(plain).items())


def test_smaller_rows_change_nothing(parts: Path, plain: Path, tmp_path: Path) -> None:
    train(arguments(parts, tmp_path, **options(parts, max_tokens_per_row=100)))
    assert_same(plain, tmp_path)


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_layouts_train_alike(
    parts: Path, plain: Path, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava.train.run.choose_layout", lambda config: layout)
    train(arguments(parts, tmp_path, **options(parts)))
    assert f'"layout": "{layout}"' in (tmp_path / "provenance.json").read_text()
    assert sum(losses(tmp_path, "shared_tokens")) <= 0 < sum(losses(plain, "shared_tokens"))
    assert_same(plain, tmp_path)


def test_image_grouping_trains_on_every_row(parts: Path, tmp_path: Path) -> None:
    changed = {"image_grouping": "on", "log_row_ids": True, "max_steps": -1, "num_train_epochs": 2}
    train(arguments(parts, tmp_path, **options(parts, **changed)))
    rows = [n for line in (tmp_path / "row_ids-0.jsonl").read_text().splitlines() for n in json.loads(line)["rows"]]
    assert sorted(rows) == sorted(list(range(24)) * 2)
