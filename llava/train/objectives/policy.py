"""Objective of reinforcement learning: clipped policy loss on action tokens, and optional value loss.

Rows carry columns of their action tokens: `advantage`, and where they are known before the update `old` and
`reference` log-probabilities, `engine` log-probabilities, `return` and `value`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava.data.flat_batch import FlatBatch
from llava.train import losses
from llava.train.objectives.base import ObjectiveOutput, divided
from llava.train.reference import sequence_tokens
from llava.train.target_logprobs import consumed_logprobs_and_entropies

LENGTH = "length"
"""Name of the padded length of a sequence, in `FlatBatch.sequence_values`."""


@dataclass(frozen=True, slots=True)
class PolicyLossSpec:
    """Losses of reinforcement learning.

    Attributes:
        ratio: `token`, or `sequence` for the ratio of the probabilities of whole dialogues.
        aggregation: mean of the token losses, see `losses.edge_weights`.
        max_length: tokens of the longest dialogue, for the aggregation `constant`.
        clip_low: largest decrease of a ratio.
        clip_high: largest increase of a ratio.
        kl_coef: weight of the KL estimate in the loss.
        kl_estimator: `k1` or `k3`.
        value_coef: weight of the value loss; None without a value model.
        clip_value: largest change of a value.
        temperature: divisor of the logits.
        counts_padding: divide by the padded lengths of the sequences.
        old_is_sampler: whether a server sampled, whose log-probabilities are the old ones.
    """

    ratio: str = "token"
    aggregation: str = "token"
    max_length: int | None = None
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    value_coef: float | None = None
    clip_value: float = 0.2
    temperature: float = 1.0
    counts_padding: bool = False
    old_is_sampler: bool = False


@dataclass(frozen=True, slots=True)
class _Actions:
    """Columns [E] of the action tokens of a row."""

    logprobs: Tensor
    old: Tensor
    advantage: Tensor
    columns: Mapping[str, Tensor]


class PolicyLoss:
    """Mean policy loss over the action tokens, or the dialogues, of the step on all ranks.

    Args:
        spec: the losses.
        without: id of a token that is never sampled, and so has probability 0.
    """

    metric_names = ("policy_loss", "value_loss", "kl", "entropy", "clip_share", "engine_difference")

    def __init__(self, spec: PolicyLossSpec, *, without: int | None) -> None:
        self.spec = spec
        self.without = without
        counts_sequences = spec.ratio == "sequence" or spec.aggregation != "token"
        self.denominators = ("sequences",) if counts_sequences else ("tokens",)

    def count(self, batch: FlatBatch) -> Tensor:
        """Return the number of dialogues or action tokens of a row, [1]; an idle row has none."""
        if not batch.num_units:
            return torch.zeros(1, dtype=torch.float64)
        if self.spec.counts_padding:
            return batch.sequence_values[LENGTH].sum()[None].cpu()
        if self.denominators == ("sequences",):
            return (sequence_tokens(batch) > 0).sum().double()[None].cpu()
        return torch.tensor([float(len(batch.edge_sequence))], dtype=torch.float64)

    def __call__(self, model: Callable[..., Any], batch: FlatBatch, *, num_items: Tensor) -> ObjectiveOutput:
        """Return the losses of the action tokens of this row, divided by the denominator of the step."""
        output = model(**batch.model_inputs())
        target_logprobs, entropy = consumed_logprobs_and_entropies(
            at_targets(output.logits, batch), batch.target_ids, without=self.without, temperature=self.spec.temperature
        )
        logprobs = target_logprobs[batch.edge_target]
        columns = batch.edge_values
        old = columns.get("old", logprobs.detach())
        actions = _Actions(logprobs, old, columns.get("advantage", torch.zeros_like(logprobs)), columns)
        weights, policy = self._policy(batch, actions)
        total = (weights * policy).sum()
        metrics = {"policy_loss": _pair(policy.detach(), batch)}
        if self.spec.value_coef is not None:
            values = at_targets(output.values, batch)[batch.edge_target]
            value_loss = self._value_loss(values, columns)
            total = total + self.spec.value_coef * (batch.edge_weight * value_loss).sum()
            metrics["value_loss"] = _pair(value_loss.detach(), batch)
        with torch.no_grad():
            metrics |= self._measured(batch, actions) | {"entropy": _pair(entropy[batch.edge_target], batch)}
        return divided(total[None], num_items, metrics)

    def _policy(self, batch: FlatBatch, actions: _Actions) -> tuple[Tensor, Tensor]:
        """Return weights [E] and policy losses [E], with the KL term."""
        spec = self.spec
        logprobs, old, advantage = actions.logprobs, actions.old, actions.advantage
        clip = {"clip_low": spec.clip_low, "clip_high": spec.clip_high}
        tokens = sequence_tokens(batch).float().clamp(min=1)[batch.edge_sequence]
        if spec.ratio == "sequence":
            ratios = _sums(logprobs - old, batch)[batch.edge_sequence]
            policy = losses.clipped_policy_losses(ratios, torch.zeros_like(ratios), advantage, **clip)
            return batch.edge_weight / tokens, policy
        policy = losses.clipped_policy_losses(logprobs, old, advantage, **clip)
        if spec.kl_coef and "reference" in actions.columns:
            reference = actions.columns["reference"]
            policy = policy + spec.kl_coef * losses.kl_estimate(logprobs, reference, spec.kl_estimator)
        weights, _ = losses.edge_weights(batch.edge_sequence, spec.aggregation, max_length=spec.max_length)
        return weights * batch.edge_weight, policy

    def _value_loss(self, values: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
        zeros = torch.zeros_like(values)
        old, returns = columns.get("value", zeros), columns.get("return", zeros)
        return losses.clipped_value_losses(values, old, returns, clip=self.spec.clip_value)

    def _measured(self, batch: FlatBatch, actions: _Actions) -> dict[str, Tensor]:
        """Return KL from the reference, share of clipped ratios, and difference between engine and policy."""
        spec, columns, found = self.spec, actions.columns, {}
        difference = actions.logprobs - actions.old
        if spec.ratio == "sequence":
            difference = _sums(difference, batch)[batch.edge_sequence]
        ratio = difference.exp()
        is_low = (ratio < 1 - spec.clip_low) & (actions.advantage < 0)
        is_high = (ratio > 1 + spec.clip_high) & (actions.advantage > 0)
        found["clip_share"] = _pair((is_low | is_high).float(), batch)
        if "reference" in columns:
            found["kl"] = _pair(losses.kl_estimate(actions.logprobs, columns["reference"], "k3"), batch)
        if "engine" in columns:
            own = actions.logprobs.detach() if spec.old_is_sampler else actions.old
            found["engine_difference"] = _pair((own - columns["engine"]).abs(), batch)
        return found


def at_targets(outputs: Tensor, batch: FlatBatch) -> Tensor:
    """Return a model's values for each target, [M, ...], from its outputs for a row."""
    return outputs.flatten(0, 1)[batch.predictor] if batch.layout == "padded" else outputs[0]


def _sums(values: Tensor, batch: FlatBatch) -> Tensor:
    """Return the sum over the action tokens of each sequence, [K]."""
    return values.new_zeros(batch.num_sequences).index_add(0, batch.edge_sequence, values)


def _pair(values: Tensor, batch: FlatBatch) -> Tensor:
    """Return sum and count [2] of values [E] over the action tokens that count."""
    counted = batch.edge_weight > 0
    return torch.stack([torch.where(counted, values, torch.zeros_like(values)).double().sum(), counted.double().sum()])
