"""Objective of KTO: single good or bad answers against an estimate over the step's mismatched answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llava.data.flat_batch import FlatBatch
from llava.data.labeled import GOOD, KIND, MISMATCHED
from llava.errors import ConfigError
from llava.train.objectives.base import ObjectiveOutput, divided
from llava.train.objectives.pairs import Reference
from llava.train.preference_losses import kto
from llava.train.reference import sequence_logprobs, sequence_tokens

METRICS = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "logratio/chosen",
           "logratio/rejected", "chosen_below_reference", "mismatched_logratio")  # fmt: skip


class KtoLoss:
    """Mean KTO loss over the answers of the step on all ranks.

    Args:
        reference: computes log-probabilities under the reference; mismatched answers change with the step, so no file
            can hold them.
        beta: strength of the reference.
        weights: weights of good and of bad answers.

    Attributes:
        estimate: mean log-ratio of the mismatched answers of the step on all ranks, at least 0; None takes that of
            each row, as validation does.
    """

    denominators = ("answers",)
    metric_names = METRICS

    def __init__(self, reference: Reference, *, beta: float, weights: tuple[float, float] = (1.0, 1.0)) -> None:
        self.reference = reference
        self.beta = beta
        self.weights = weights
        self.estimate: Tensor | None = None

    def count(self, batch: FlatBatch) -> Tensor:
        """Return the number of labeled answers of a row, [1]."""
        return _is_answer(batch).sum().double()[None].cpu()

    @torch.no_grad()
    def step_share(self, model: Callable[..., Any], batch: FlatBatch) -> Tensor:
        """Return the sum of the log-ratios of the mismatched answers of a row and their number, [2] float64."""
        found = _is_kind(batch, MISMATCHED)
        ratios = sequence_logprobs(model, batch) - self.reference(batch)
        return torch.stack([ratios[found].sum(), found.sum().double()])

    def begin_step(self, sums: Tensor | None) -> None:
        """Estimate the divergence from the sum of the log-ratios of a step and their number; None for no step."""
        self.estimate = None if sums is None else (sums[0] / sums[1].clamp(min=1.0)).clamp(min=0.0)

    def __call__(self, model: Callable[..., Any], batch: FlatBatch, *, num_items: Tensor) -> ObjectiveOutput:
        """Return the losses of the answers of this row, divided by the number of answers of the step."""
        with torch.no_grad():  # first, since the reference may exchange weights that the graph of the policy holds
            reference = self.reference(batch).detach()
        logps = sequence_logprobs(model, batch)
        found = _is_answer(batch)
        ratios = (logps - reference).detach()
        strange = ratios[_is_kind(batch, MISMATCHED)]
        estimate = self.estimate
        if estimate is None:
            estimate = strange.mean().clamp(min=0.0) if len(strange) else ratios.new_zeros(())
        good = batch.sequence_values[KIND][found] == GOOD if found.any() else found[found]
        losses = kto(
            logps[found],
            reference[found],
            good,
            estimate,
            beta=self.beta,
            desirable_weight=self.weights[0],
            undesirable_weight=self.weights[1],
        )
        total = (losses * batch.sequence_values["weight"][found]).sum() + 0.0 * logps.sum()
        metrics = _metrics(logps.detach()[found], ratios[found], sequence_tokens(batch)[found], good, self.beta)
        metrics["mismatched_logratio"] = torch.stack([strange.sum(), strange.new_tensor(float(len(strange)))])
        return divided(total[None], num_items, metrics)


def _is_kind(batch: FlatBatch, kind: float) -> Tensor:
    if KIND not in batch.sequence_values:
        if bool((batch.sequence_unit >= 0).any()):
            raise ConfigError("KTO needs answers with a label; the rows have none")
        return torch.zeros_like(batch.sequence_unit, dtype=torch.bool)
    return (batch.sequence_unit >= 0) & (batch.sequence_values[KIND] == kind)


def _is_answer(batch: FlatBatch) -> Tensor:
    """Return which sequences are labeled answers, [num_sequences]."""
    return _is_kind(batch, 1.0) | _is_kind(batch, 0.0)


def _metrics(logps: Tensor, ratios: Tensor, tokens: Tensor, good: Tensor, beta: float) -> dict[str, Tensor]:
    """Return [2] sum and count of each metric; good answers are called chosen, bad ones rejected."""
    found: dict[str, Tensor] = {}
    for name, rows in (("chosen", good), ("rejected", ~good)):
        count = rows.sum().double()
        per_token = ratios[rows] / tokens[rows].clamp(min=1)
        values = {"rewards": beta * ratios[rows], "logps": logps[rows], "logratio": per_token}
        found |= {f"{title}/{name}": torch.stack([value.sum().double(), count]) for title, value in values.items()}
    found["chosen_below_reference"] = torch.stack([(ratios[good] < 0).sum().double(), good.sum().double()])
    return found
