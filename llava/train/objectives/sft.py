"""Objective of supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from llava.data.flat_batch import FlatBatch, target_logits
from llava.train.losses import edge_sum, edge_sums, token_logprobs, without_token
from llava.train.objectives.base import Objective, ObjectiveOutput, divided

SPEAKERS = ("question_loss", "answer_loss")
"""Metrics of a template in which the model asks: one for turns with even numbers, one for the others."""


class SFT:
    """Mean negative log-likelihood over all supervised tokens of the step on all ranks.

    Args:
        without: id of a token whose logit is excluded, or None. The original trainers have no vocabulary entry for the
            image placeholder; ours would receive a small part of every probability.
        source_names: names of the sources of a mixture; with several, the metric `loss/NAME` is the mean negative
            log-likelihood over the supervised tokens of each.
        asks: also report the mean over the tokens of questions and of answers, `question_loss` and `answer_loss`.
    """

    denominators = ("tokens",)

    def __init__(self, *, without: int | None = None, source_names: Sequence[str] = (), asks: bool = False) -> None:
        self.without = without
        self.sources = tuple(f"loss/{name}" for name in source_names) if len(source_names) > 1 else ()
        self.asks = asks

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Return the names of the sources' losses, and of those of questions and answers."""
        return self.sources + (SPEAKERS if self.asks else ())

    def count(self, batch: FlatBatch) -> Tensor:
        """Return the number of supervised tokens of a row, [1]."""
        return batch.edge_weight.sum().double()[None]

    def __call__(self, model: Callable[..., Any], batch: FlatBatch, *, num_items: Tensor) -> ObjectiveOutput:
        """Return the sum over the edges of this row, divided by the global number of supervised tokens."""
        logits = without_token(target_logits(model, batch), self.without)
        nll = -token_logprobs(logits, batch.target_ids)
        edges = (batch.edge_target, batch.edge_weight)
        sums = edge_sum(nll, *edges)[None]
        # Turns alternate, questions first.
        groups = {self.sources: batch.edge_source} | ({SPEAKERS: batch.edge_turn % 2} if self.asks else {})
        metrics: dict[str, Tensor] = {}
        for names, group in groups.items():
            if names:
                metrics |= zip(names, edge_sums(nll.detach(), *edges, group, len(names)).T, strict=True)
        return divided(sums, num_items, metrics)


OBJECTIVES: dict[str, Callable[..., Objective]] = {"sft": SFT}
"""Objectives on rows of questions and answers, by the name of `--objective`; called with the arguments of `SFT`."""
