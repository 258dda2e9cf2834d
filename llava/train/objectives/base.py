"""What is minimised. The trainer never asks which objective it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from llava.data.flat_batch import FlatBatch, target_logits
from llava.train.losses import edge_sum, edge_sums, token_logprobs


@dataclass(frozen=True, slots=True)
class ObjectiveOutput:
    """Loss of one row (its share of the global loss) and numbers to log, summed over the row."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """Turns a model and one row into this row's share of the loss."""

    def __call__(self, model: Callable[..., Any], batch: FlatBatch, *, num_items: Tensor) -> ObjectiveOutput:
        """Return the loss; `num_items` is the global sum of edge weights of the optimiser step."""
        ...


class SFT:
    """Supervised fine-tuning: mean negative log-likelihood over all supervised tokens of the step, on every rank.

    Args:
        without: id of a token that can never follow and whose logit takes no part, or None. The published trainers have
            no word for an image's place holder; ours has one, and it would take a little of every probability.
        num_sources: sources of the mixture that rows are from; with several, `by_source` [2, sources] is reported: the
            negative log-likelihoods and the weights of each one's edges, summed.
    """

    def __init__(self, *, without: int | None = None, num_sources: int = 1) -> None:
        self.without = without
        self.num_sources = num_sources

    def __call__(self, model: Callable[..., Any], batch: FlatBatch, *, num_items: Tensor) -> ObjectiveOutput:
        """Sum over this row's edges, divided by the global number of supervised tokens."""
        logits = target_logits(model, batch)
        if self.without is not None:
            absent = torch.tensor(self.without, device=logits.device)
            logits = logits.index_fill(-1, absent, float("-inf"))
        nll = -token_logprobs(logits, batch.target_ids)
        edges = (batch.edge_target, batch.edge_weight)
        loss = edge_sum(nll, *edges) / num_items
        if self.num_sources == 1:
            return ObjectiveOutput(loss)
        by_source = edge_sums(nll.detach(), *edges, batch.edge_source, self.num_sources)
        return ObjectiveOutput(loss, {"by_source": by_source})


OBJECTIVES: dict[str, Callable[..., Objective]] = {"sft": SFT}
