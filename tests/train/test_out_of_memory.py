"""Out of memory: rows are halved once, the loss is unchanged, and the failed row is freed before the retry."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llava.data.flat_batch import FlatBatch
from llava.train.objectives.sft import OBJECTIVES, SFT
from tests.support.runs import arguments, losses, metrics, train


class Failing(SFT):
    """Objective that runs out of memory in some calls."""

    fails_at: tuple[int, ...] = (2,)
    calls = 0
    sizes: list[int]
    failed: list[weakref.ref[Tensor]]

    def __call__(self, model: Callable[..., Any], batch: FlatBatch, *, num_items: Tensor) -> Any:
        type(self).calls += 1
        activation = torch.ones(3)
        if self.failed:
            assert self.failed[0]() is None, "the failed row is still in memory"
        self.sizes.append(batch.num_tokens)
        if self.calls in self.fails_at:
            self.failed.append(weakref.ref(activation))
            raise torch.OutOfMemoryError("simulated")
        return super().__call__(model, batch, num_items=num_items)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> type[Failing]:
    kind = type("FailingOnce", (Failing,), {"calls": 0, "sizes": [], "failed": []})
    monkeypatch.setitem(OBJECTIVES, "sft", kind)
    return kind


def test_losses_of_the_sources_count_no_row_twice(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: type[Failing]
) -> None:
    """The losses of the first row were already added when the second row ran out of memory."""
    for half in "ab":
        (parts / f"{half}.json").write_text((parts / "vqa" / "train.json").read_text())
    listed = "".join(f"  - {{name: {half}, path: {half}.json, images: vqa/images}}\n" for half in "ab")
    (parts / "mixture.yaml").write_text(f"sources:\n{listed}")
    words = {"per_device_train_batch_size": 6, "data_path": parts / "mixture.yaml", "image_folder": None}
    words |= {"max_steps": 1, "max_tokens_per_row": 60}
    train(arguments(parts, tmp_path / "halved", **words))
    monkeypatch.setitem(OBJECTIVES, "sft", SFT)
    train(arguments(parts, tmp_path / "plain", **words))
    weights = []
    for run in ("halved", "plain"):
        row = next(row for row in metrics(tmp_path / run) if "loss" in row)
        weights.append([row["loss"], row["loss/a"], row["loss/b"]])
    assert failing.calls > 2 and weights[0] == pytest.approx(weights[1], rel=1e-5)


def test_same_loss_with_smaller_rows(
    parts: Path, tmp_path: Path, failing: type[Failing], caplog: pytest.LogCaptureFixture
) -> None:
    train(arguments(parts, tmp_path / "halved", per_device_train_batch_size=6))
    OBJECTIVES["sft"] = SFT
    train(arguments(parts, tmp_path / "plain", per_device_train_batch_size=6))
    assert losses(tmp_path / "halved") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    assert caplog.text.count("out of memory") == 1
    largest = max(failing.sizes[:2])  # rows of two images; those of one are slightly longer than half of them
    assert max(failing.sizes[2:]) < 0.6 * largest
    assert f"rows of at most {largest // 2} tokens" in caplog.text
