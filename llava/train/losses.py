"""Losses as pure functions of tensors; what is summed or averaged is in the name."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """[M] float32 log-probability of each target id under logits [M, V]."""
    return -F.cross_entropy(logits.float(), targets, reduction="none")


def edge_sum(values: Tensor, edge_target: Tensor, edge_weight: Tensor) -> Tensor:
    """Values of targets summed over the edges that want them, each with its weight.

    Args:
        values: [M] of the distinct targets.
        edge_target: [E] index of the target that each edge wants; a shared target has several edges.
        edge_weight: [E] weights.

    Returns:
        A scalar; 0 (with a graph) when there is no edge.
    """
    return (values * edge_weight.new_zeros(len(values)).index_add(0, edge_target, edge_weight)).sum()


def edge_sums(values: Tensor, edge_target: Tensor, edge_weight: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """The sum of `edge_sum` and the sum of the weights, for each group of edges.

    Args:
        values: [M] of the targets.
        edge_target: [E] index of the target that each edge wants.
        edge_weight: [E] weights.
        groups: [E] number of each edge's group.
        num_groups: G.

    Returns:
        [2, G] sums, weights.
    """
    weighted = torch.stack([values[edge_target] * edge_weight, edge_weight])
    return weighted.new_zeros(2, num_groups).index_add(1, groups, weighted)
