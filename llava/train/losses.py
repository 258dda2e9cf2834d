"""Loss terms as pure functions of tensors; their names state what is summed.

M targets, E edges (pairs of a sequence and a target), V vocabulary size, G groups
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the float32 log-probabilities [M] of target ids [M] under logits [M, V]."""
    return -F.cross_entropy(logits.float(), targets, reduction="none")


def edge_sum(values: Tensor, edge_target: Tensor, edge_weight: Tensor) -> Tensor:
    """Return the weighted sum of target values over edges.

    Args:
        values: [M] values of the distinct targets.
        edge_target: [E] index of each edge's target; a shared target has several edges.
        edge_weight: [E] weights.

    Returns:
        A scalar; 0 (with an autograd graph) without edges.
    """
    return (values * edge_weight.new_zeros(len(values)).index_add(0, edge_target, edge_weight)).sum()


def edge_sums(values: Tensor, edge_target: Tensor, edge_weight: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Return the sum of `edge_sum` and the sum of the weights for each group of edges.

    Args:
        values: [M] values of the targets.
        edge_target: [E] index of each edge's target.
        edge_weight: [E] weights.
        groups: [E] index of each edge's group.
        num_groups: G, the number of groups.

    Returns:
        [2, G]: weighted sums and sums of weights.
    """
    weighted = torch.stack([values[edge_target] * edge_weight, edge_weight])
    return weighted.new_zeros(2, num_groups).index_add(1, groups, weighted)
