"""Weights sharded over two ranks (torch's fully_shard, DeepSpeed ZeRO-2 and ZeRO-3) train as unsharded ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llava.model.loading import load
from tests.ranks import run
from tests.runs import arguments, losses, saved, train, write_parts, write_uneven

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_parts(tmp_path_factory.mktemp("parts"))
    write_uneven(folder)
    return folder


def options(parts: Path, **changed: object) -> dict[str, Any]:
    data = {"data_path": parts / "uneven.json", "image_folder": parts / "images"}
    return {**data, "per_device_train_batch_size": 2, "num_train_epochs": 2, **changed}


@pytest.fixture(scope="module")
def plain(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on two ranks without sharding."""
    folder = tmp_path_factory.mktemp("plain")
    run(2, train, arguments(parts, folder, **options(parts)))
    return folder


def train_zero(argv: list[str]) -> tuple[str, int, str]:
    """Job: a training run; returns what wrapped the model, the stage, and the optimizer."""
    from llava.train import run as story

    kept: dict[str, Any] = {}
    make = story.make_trainer

    def keep(*values: Any) -> Any:
        kept["trainer"] = make(*values)
        return kept["trainer"]

    story.make_trainer = keep
    train(argv)
    engine = kept["trainer"].model_wrapped
    return (
        f"{type(engine).__module__}.{type(engine).__name__}",
        engine.zero_optimization_stage(),
        str(type(engine.optimizer)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_equals_plain(parts: Path, plain: Path, tmp_path: Path, stage: int) -> None:
    config = ROOT / "scripts" / f"zero{stage}.json"
    found = run(2, train_zero, arguments(parts, tmp_path, **options(parts, deepspeed=config)))
    assert all(name == "deepspeed.runtime.engine.DeepSpeedEngine" and at == stage for name, at, _ in found), found
    assert losses(tmp_path) == pytest.approx(losses(plain), rel=1e-4)
    first, second = saved(plain), saved(tmp_path)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], atol=3e-4, rtol=1e-3, msg=name)
    load(tmp_path)
