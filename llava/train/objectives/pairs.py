"""Objective of preference training: losses of pairs, which are units of the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llava.data.flat_batch import FlatBatch
from llava.errors import ConfigError
from llava.train.objectives.base import ObjectiveOutput, divided
from llava.train.preference_losses import PAIR_LOSSES, WITHOUT_REFERENCE, Pairs
from llava.train.reference import sequence_logprobs, sequence_tokens
from llava.utils.lookup import lookup

REFERENCE = "reference"
"""Name of the log-probability of a sequence under the reference, in `FlatBatch.sequence_values`."""

Reference = Callable[[FlatBatch], Tensor]
"""Function that returns the log-probabilities [num_sequences] of a row under the reference."""


@dataclass(frozen=True, slots=True)
class PairLossSpec:
    """Losses of preference training.

    Attributes:
        names: names in `PAIR_LOSSES`, whose weighted sum is the loss of a pair.
        weights: weight of each; empty for 1.
        beta: strength of the reference; for `simpo` the scale of the log-probability per token.
        label_smoothing: share of pairs whose sides are assumed to be swapped (`sigmoid`, `robust`, `sigmoid_norm`).
        simpo_gamma: margin that `simpo` asks for.
        orpo_lambda: weight of the odds term of `orpo`.
        anchor_delta: reward that the anchor term of `mdpo` asks for.
    """

    names: tuple[str, ...] = ("sigmoid",)
    weights: tuple[float, ...] = ()
    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 1.0
    orpo_lambda: float = 0.1
    anchor_delta: float = 0.0

    def needs_reference(self) -> bool:
        """Return whether a loss compares with a reference."""
        return not WITHOUT_REFERENCE.issuperset(self.names)

    def functions(self) -> list[tuple[str, float, Callable[[Pairs], Tensor]]]:
        """Return name, weight and function of each loss.

        Raises:
            ConfigError: a name is unknown, or names and weights differ in number.
        """
        weights = self.weights or (1.0,) * len(self.names)
        if len(weights) != len(self.names):
            raise ConfigError(
                f"--pref-loss names {len(self.names)} losses but --pref-loss-weights has {len(weights)} numbers; "
                "expected one weight for each loss"
            )
        beta, smoothing = {"beta": self.beta}, {"label_smoothing": self.label_smoothing}
        settings: dict[str, dict[str, float]] = {
            "sigmoid": beta | smoothing,
            "robust": beta | smoothing,
            "sigmoid_norm": beta | smoothing,
            "hinge": beta,
            "ipo": beta,
            "bco_pair": beta,
            "simpo": beta | {"gamma": self.simpo_gamma},
            "orpo": {"weight": self.orpo_lambda},
            "mdpo": beta | {"anchor": self.anchor_delta},
            "sft": {},
        }
        return [
            (name, weight, partial(lookup(PAIR_LOSSES, name, "preference loss"), **settings[name]))
            for name, weight in zip(self.names, weights, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class _Sides:
    """Values [B, 2 or 3] of each pair's sequences: chosen, rejected, and chosen beside a damaged image."""

    logprobs: Tensor
    tokens: Tensor
    reference: Tensor | None
    weight: Tensor = field(repr=False)

    def pairs(self) -> Pairs:
        """Return the values by name."""
        has_negative = self.logprobs.shape[1] > 2
        ref = None if self.reference is None else self.reference.unbind(1)
        return Pairs(
            chosen=self.logprobs[:, 0],
            rejected=self.logprobs[:, 1],
            chosen_tokens=self.tokens[:, 0],
            rejected_tokens=self.tokens[:, 1],
            ref_chosen=None if ref is None else ref[0],
            ref_rejected=None if ref is None else ref[1],
            negative=self.logprobs[:, 2] if has_negative else None,
            ref_negative=ref[2] if ref is not None and has_negative else None,
        )


class PairLoss:
    """Mean preference loss over the step's pairs on all ranks; `sft` is a mean over its chosen tokens.

    Args:
        spec: the losses.
        reference: computes the log-probabilities under the reference; None reads them from the batch, where the data
            set put them (`numbers["reference"]`).
        without: id of a token whose logit is excluded, or None; see `SFT`.
    """

    def __init__(self, spec: PairLossSpec, *, reference: Reference | None = None, without: int | None = None) -> None:
        self.spec = spec
        self.losses = spec.functions()
        self.reference = reference
        self.without = without
        self.denominators: tuple[str, ...] = ("pairs", "chosen_tokens") if "sft" in spec.names else ("pairs",)
        self.metric_names = (*_REWARDS, *_LOGPS, *(_RATIOS if spec.needs_reference() else ()))

    def count(self, batch: FlatBatch) -> Tensor:
        """Return the numbers of pairs and, with the loss `sft`, of chosen tokens of a row."""
        counts = [torch.tensor(float(batch.num_units), dtype=torch.float64)]
        if len(self.denominators) > 1:
            is_chosen = (batch.sequence_unit >= 0) & (batch.sequence_place == 0)
            counts.append(sequence_tokens(batch)[is_chosen].sum().cpu())
        return torch.stack(counts)

    def __call__(self, model: Callable[..., Any], batch: FlatBatch, *, num_items: Tensor) -> ObjectiveOutput:
        """Return the losses of the pairs of this row, divided by the denominators of the step."""
        reference = self._reference(batch)
        logprobs = sequence_logprobs(model, batch, without=self.without)
        if not batch.num_units:
            return divided(logprobs.sum() * torch.zeros(len(self.denominators), device=logprobs.device), num_items)
        sides = _by_pair(batch, logprobs, reference)
        pairs = sides.pairs()
        sums = [logprobs.new_zeros(()) for _ in self.denominators]
        for name, weight, loss in self.losses:
            sums[name == "sft"] = sums[name == "sft"] + weight * (sides.weight * loss(pairs)).sum()
        return divided(torch.stack(sums), num_items, pair_metrics(pairs, self.spec.beta))

    def _reference(self, batch: FlatBatch) -> Tensor | None:
        """Return the log-probabilities of the sequences of a row under the reference, [num_sequences]."""
        if not self.spec.needs_reference():
            return None
        if self.reference is not None:
            with torch.no_grad():
                return self.reference(batch).detach()
        if REFERENCE not in batch.sequence_values:
            raise ConfigError("the rows have no log-probabilities under a reference; set --ref-mode")
        return batch.sequence_values[REFERENCE]


def _by_pair(batch: FlatBatch, logprobs: Tensor, reference: Tensor | None) -> _Sides:
    """Return the values of the sequences of a row, ordered by pair and place."""
    found = batch.sequence_unit >= 0
    units, places = batch.sequence_unit[found], batch.sequence_place[found]
    size = int(places.max()) + 1
    if size not in (2, 3) or len(units) != batch.num_units * size:
        raise ConfigError(
            f"a preference loss needs units of 2 or 3 sequences, got {len(units)} sequences in {batch.num_units} units"
        )
    order = torch.argsort(units * size + places)

    def by_pair(values: Tensor) -> Tensor:
        return values[found][order].view(-1, size)

    return _Sides(
        by_pair(logprobs),
        by_pair(sequence_tokens(batch)),
        None if reference is None else by_pair(reference.to(logprobs.device)),
        by_pair(batch.sequence_values["weight"])[:, 0],
    )


_REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
            "rewards/accuracies_chosen_shorter")  # fmt: skip
_LOGPS = ("logps/chosen", "logps/rejected")
_RATIOS = ("logratio/chosen", "logratio/rejected", "chosen_below_reference")


def pair_metrics(pairs: Pairs, beta: float) -> dict[str, Tensor]:
    """Return [2] sum and count of each metric over the pairs of a row.

    Without a reference, rewards are `beta` times the log-probability per token, as in SimPO. `logps` are sums over the
    trained tokens, `logratio` is per token.
    """
    chosen, rejected = (pairs.chosen.detach(), pairs.rejected.detach())
    values = {"logps/chosen": chosen, "logps/rejected": rejected}
    if pairs.ref_chosen is None or pairs.ref_rejected is None:
        rewards = [beta * mean.detach() for mean in pairs.means()]
    else:
        ratios = [chosen - pairs.ref_chosen, rejected - pairs.ref_rejected]
        rewards = [beta * ratio for ratio in ratios]
        values["logratio/chosen"] = ratios[0] / pairs.chosen_tokens.clamp(min=1)
        values["logratio/rejected"] = ratios[1] / pairs.rejected_tokens.clamp(min=1)
        values["chosen_below_reference"] = (ratios[0] < 0).double()
    is_right = (rewards[0] > rewards[1]).double()
    values |= {"rewards/chosen": rewards[0], "rewards/rejected": rewards[1], "rewards/margins": rewards[0] - rewards[1],
               "rewards/accuracies": is_right}  # fmt: skip
    shorter = (pairs.chosen_tokens < pairs.rejected_tokens).double()
    found = {name: torch.stack([value.sum(), value.new_tensor(float(len(value)))]) for name, value in values.items()}
    return {**found, "rewards/accuracies_chosen_shorter": torch.stack([(is_right * shorter).sum(), shorter.sum()])}
