"""Objective of a reward model: the preferred side of a pair has the higher reward.

The reward is a number of the last token of a sequence, from the head of `model.value_head`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.data.flat_batch import FlatBatch
from llava.errors import ConfigError
from llava.train.objectives.base import ObjectiveOutput, divided


class PairwiseReward:
    """Mean of `-log sigmoid(chosen - rejected)` over the pairs of the step on all ranks.

    Args:
        centering: weight of the squared sum of both rewards, which keeps their mean at 0.
    """

    denominators = ("pairs",)
    metric_names = ("accuracy", "margin", "reward/chosen", "reward/rejected")

    def __init__(self, *, centering: float = 1e-3) -> None:
        self.centering = centering

    def count(self, batch: FlatBatch) -> Tensor:
        """Return the number of pairs of a row, [1]."""
        return torch.tensor([float(batch.num_units)], dtype=torch.float64)

    def __call__(self, model: Callable[..., Any], batch: FlatBatch, *, num_items: Tensor) -> ObjectiveOutput:
        """Return the losses of the pairs of this row, divided by the number of pairs of the step."""
        rewards = last_rewards(model, batch)
        if not batch.num_units:
            return divided((rewards.sum() * 0.0)[None], num_items)
        if len(rewards) != 2 * batch.num_units:
            raise ConfigError(f"a reward model compares pairs, got {len(rewards)} sequences in {batch.num_units} units")
        order = torch.argsort(batch.sequence_unit * 2 + batch.sequence_place)
        chosen, rejected = rewards[order].view(-1, 2).unbind(1)
        weight = batch.sequence_values["weight"][order].view(-1, 2)[:, 0].to(rewards)
        losses = -F.logsigmoid(chosen - rejected) + self.centering * (chosen + rejected) ** 2
        measured = {
            "accuracy": (chosen > rejected).float(),
            "margin": chosen - rejected,
            "reward/chosen": chosen,
            "reward/rejected": rejected,
        }
        metrics = {
            name: torch.stack([values.detach().double().sum(), values.new_tensor(len(values)).double()])
            for name, values in measured.items()
        }
        return divided((weight * losses).sum()[None], num_items, metrics)


def last_rewards(model: Callable[..., Any], batch: FlatBatch) -> Tensor:
    """Return the reward of each sequence of a row, [K], of its last token."""
    last = torch.stack([path[-1] for path in batch.paths()]).to(batch.input_ids.device)
    inputs = batch.model_inputs()
    if batch.layout == "padded":
        padded: Tensor = model(**inputs)
        return padded.flatten()[last]
    found: Tensor = model(**{**inputs, "logits_to_keep": last})
    return found[0]
