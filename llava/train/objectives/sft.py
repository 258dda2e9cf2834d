"""Objective of supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llava.data.flat_batch import FlatBatch, target_logits
from llava.train.losses import edge_sum, edge_sums, token_logprobs
from llava.train.objectives.base import Objective, ObjectiveOutput


class SFT:
    """Mean negative log-likelihood over all supervised tokens of the step on all ranks.

    Args:
        without: id of a token whose logit is excluded, or None. The original trainers have no vocabulary entry for the
            image placeholder; ours would receive a small part of every probability.
        num_sources: number of sources of the mixture; with several, the metric `by_source` [2, sources] holds the sums
            of negative log-likelihoods and of weights over the edges of each source.
    """

    def __init__(self, *, without: int | None = None, num_sources: int = 1) -> None:
        self.without = without
        self.num_sources = num_sources

    def __call__(self, model: Callable[..., Any], batch: FlatBatch, *, num_items: Tensor) -> ObjectiveOutput:
        """Return the sum over the edges of this row, divided by the global number of supervised tokens."""
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
