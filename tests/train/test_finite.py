"""A non-finite loss or gradient norm stops every rank before the optimizer step."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llava.errors import LlavaError
from llava.train.objectives.base import ObjectiveOutput
from llava.train.objectives.sft import OBJECTIVES, SFT
from llava.train.ranks import check_finite
from tests.support.ranks import run_ranks
from tests.support.runs import arguments, train, write_parts

STEP = 2
"""Step whose loss or gradients are not finite; a step is one row, hence one call of the objective."""


class NonFinite(SFT):
    """Objective with a non-finite loss, or gradient of a finite loss, in the second step of one rank."""

    name = "loss"
    rank = 0
    num_calls = 0
    model: nn.Module

    def __call__(self, model: Any, batch: Any, *, num_items: Tensor) -> ObjectiveOutput:
        output = super().__call__(model, batch, num_items=num_items)
        type(self).num_calls += 1
        type(self).model = model
        if self.num_calls != STEP or self.rank != int(os.environ.get("RANK", "0")):
            return output
        if self.name == "loss":
            return ObjectiveOutput(output.loss * float("inf"))
        weight = next(parameter for parameter in model.parameters() if parameter.requires_grad)
        return ObjectiveOutput(output.loss + (weight.sum() * 0.0).sqrt())  # 0, whose gradient is infinity times 0


def stopped(argv: list[str], name: str, rank: int) -> tuple[str, bool, int]:
    """Job: a run that stops; return its message, whether all weights are finite, and the number of computed steps."""
    kind = type("Chosen", (NonFinite,), {"name": name, "rank": rank})
    usual, OBJECTIVES["sft"] = OBJECTIVES["sft"], kind
    try:
        with pytest.raises(LlavaError) as caught:
            train(argv)
    finally:
        OBJECTIVES["sft"] = usual
    is_finite = all(bool(weight.isfinite().all()) for weight in kind.model.parameters())  # type: ignore[attr-defined]
    return str(caught.value), is_finite, kind.num_calls  # type: ignore[attr-defined]


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0], ids=["clipped", "unclipped"])
@pytest.mark.parametrize(("name", "value"), [("loss", "inf"), ("gradient norm", "nan")])
def test_one_rank_stops(parts: Path, tmp_path: Path, name: str, value: str, max_grad_norm: float) -> None:
    argv = arguments(parts, tmp_path, max_grad_norm=max_grad_norm)
    message, is_finite, num_calls = stopped(argv, name, 0)
    assert message.startswith(f"step {STEP}, rank 0: the {name} is {value}; expected a finite value")
    assert is_finite and num_calls == STEP


def test_two_ranks_stop_with_the_message_of_one(tmp_path: Path) -> None:
    argv = arguments(write_parts(tmp_path / "parts"), tmp_path / "run", per_device_train_batch_size=2)
    first, second = run_ranks(2, stopped, argv, "loss", 1)
    assert first == second
    message, is_finite, num_calls = first
    assert message.startswith(f"step {STEP}, rank 1: the loss is inf")
    assert is_finite and num_calls == STEP


def test_finite_values_pass() -> None:
    check_finite(torch.tensor(3.0), torch.tensor(0.0), step=1)
    check_finite(torch.tensor(3.0), None, step=1)


def test_the_loss_alone_is_checked_without_a_norm() -> None:
    with pytest.raises(LlavaError, match="step 7, rank 0: the loss is nan"):
        check_finite(torch.tensor(float("nan")), None, step=7)
