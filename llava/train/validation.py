"""Validation while training: the loss per supervised token on held-out rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from llava.data.collator import Collator, matched_rows
from llava.data.samplers import SequentialSampler
from llava.train.objectives.base import Objective


@contextmanager
def dropout_off(model: nn.Module) -> Iterator[None]:
    """Switch every module but the quantized layers to evaluation.

    A 4-bit layer on the CPU that runs once in evaluation mode without gradients loses its gradients for good. All
    others change, not only dropout layers: attention dropout and stochastic depth ask their own module's mode.
    """
    switched = [m for m in model.modules() if m.training and not type(m).__module__.startswith("bitsandbytes")]
    for module in switched:
        module.training = False
    try:
        yield
    finally:
        for module in switched:
            module.training = True


class HeldOutLoss:
    """Callable that returns `{"eval_loss": ...}`: the objective's mean over all supervised tokens of all ranks.

    Args:
        collator: of the held-out data set.
        objective: what is measured.
        batch_size: sequences per forward pass and rank.
        rank: this process.
        world_size: number of processes; each takes a share of the rows.
        sharded: ranks share weights, so all run the tower if any does.
    """

    def __init__(
        self,
        collator: Collator,
        objective: Objective,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        sharded: bool = False,
    ) -> None:
        self.collator = collator
        self.objective = objective
        self.sharded = sharded
        self.sampler = SequentialSampler(len(collator.dataset), batch_size, rank=rank, world_size=world_size)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Run every held-out row once."""
        device = next(model.parameters()).device
        one = torch.ones((), device=device)
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        with dropout_off(model):
            for rows in self.sampler:
                step = self.collator([(row, self.collator.dataset[row]) for row in rows])
                for batch in matched_rows(step.rows, self.collator, device=device, with_images=self.sharded):
                    sums[0] += self.objective(model, batch.to(device), num_items=one).loss.double()
                sums[1] += step.num_supervised
        if dist.is_initialized():
            dist.all_reduce(sums)
        return {"eval_loss": float(sums[0] / sums[1].clamp(min=1.0))}
