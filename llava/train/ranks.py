"""Errors that concern several ranks: non-finite steps and weights, and ranks that have ended."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llava.errors import LlavaError
from llava.model.checkpoint.finite import nonfinite_names

SIGNS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""Messages of gloo, which has no error class, when a process has ended."""


def check_finite(loss: Tensor, grad_norm: Any, *, step: int, rows: Callable[[], str] = str) -> None:
    """Check that loss and gradient norm of a step are finite on every rank; a collective operation.

    Args:
        loss: loss of the step on this rank, a scalar.
        grad_norm: gradient norm, a scalar tensor or a number; None to check the loss only.
        step: number of the optimizer step, counted from 1.
        rows: returns the rows of the step on this rank, for the message.

    Raises:
        LlavaError: a value is not finite on some rank; every rank raises the same message.
    """
    norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
    own = torch.stack(
        [loss.detach().float(), torch.as_tensor(0.0 if norm is None else norm, device=loss.device).float()]
    )
    values = [own]
    if dist.is_initialized():
        values = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(values, own)
    table = torch.stack(values).tolist()  # the only transfer from the GPU
    # Gradients are summed over ranks, so one non-finite loss makes every norm non-finite: losses are reported first.
    for column, name in enumerate(("loss", "gradient norm")):
        wrong = [rank for rank, row in enumerate(table) if not math.isfinite(row[column])]
        if wrong:
            named = of_ranks(rows())
            shown = [f"rank {rank}: {named[rank]}" for rank in wrong if named[rank]]
            raise LlavaError(
                f"step {step}, rank {wrong[0]}: the {name} is {table[wrong[0]][column]}; expected a finite value. "
                "The optimizer step was not taken, and saved checkpoints are kept. Lower --learning-rate, or check the "
                f"rows of this step{': ' if shown else ''}{'; '.join(shown)}"
            )


def of_ranks(text: str) -> list[str]:
    """Return the texts of all ranks; a collective operation."""
    if not dist.is_initialized():
        return [text]
    texts = [""] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    return texts


def _own_part(weight: Tensor) -> Tensor:
    """Return the part of a weight that this rank holds."""
    part = getattr(weight, "ds_tensor", weight)  # ZeRO-3
    return part.to_local() if isinstance(part, DTensor) else part


def check_finite_weights(model: nn.Module, where: str) -> None:
    """Check that all trained weights are finite on every rank; a collective operation.

    Args:
        model: the model.
        where: what the message begins with.

    Raises:
        LlavaError: a weight is not finite on some rank; every rank raises the same message.
    """
    trained = ((name, _own_part(weight)) for name, weight in model.named_parameters() if weight.requires_grad)
    for rank, name in enumerate(of_ranks(next(nonfinite_names(trained), ""))):
        if name:
            raise LlavaError(
                f"{where}, rank {rank}: weight {name} is not finite. These weights are not saved, and saved "
                "checkpoints are kept. Lower --learning-rate"
            )


def checked_together(check: Callable[[], None], *, here: bool) -> None:
    """Run a check on some ranks; raise its error on all of them; a collective operation.

    Args:
        check: raises a `LlavaError`.
        here: whether this rank runs it.

    Raises:
        LlavaError: the check failed on some rank.
    """
    found: LlavaError | None = None
    if here:
        try:
            check()
        except LlavaError as error:
            found = error
    messages = [None if found is None else str(found)]
    if dist.is_initialized():
        messages = [None] * dist.get_world_size()
        dist.all_gather_object(messages, None if found is None else str(found))
    if found is not None:
        raise found
    if failed := [text for text in messages if text is not None]:
        raise LlavaError(failed[0])


@contextmanager
def lost_ranks_in_one_line() -> Iterator[None]:
    """Turn communication errors into one line that says that another rank has ended.

    Raises:
        LlavaError: another rank has ended.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(sign in str(error) for sign in SIGNS):
            raise
        raise LlavaError(
            "another rank of this run has ended, so this rank ends too; see the message of that rank for the reason"
        ) from error
