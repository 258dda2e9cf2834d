"""Errors that concern several ranks: non-finite steps, and ranks that have ended."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from llava.errors import LlavaError

SIGNS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""Messages of gloo, which has no error class, when a process has ended."""


def check_finite(loss: Tensor, grad_norm: Any, *, step: int) -> None:
    """Check that loss and gradient norm of a step are finite on every rank; a collective operation.

    Args:
        loss: loss of the step on this rank, a scalar.
        grad_norm: gradient norm, a scalar tensor or a number; None to check the loss only.
        step: number of the optimizer step, counted from 1.

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
        for rank, row in enumerate(table):
            if not math.isfinite(row[column]):
                raise LlavaError(
                    f"step {step}, rank {rank}: the {name} is {row[column]}; expected a finite value. Lower "
                    "--learning-rate, or check the rows of this step (--log-row-ids True)"
                )


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
