"""Losses as pure functions of tensors; what is summed or averaged is in the name."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """[M] float32 log-probability of each target id under logits [M, V]."""
    return -F.cross_entropy(logits.float(), targets, reduction="none")


def weighted_nll_sum(logits: Tensor, targets: Tensor, edge_target: Tensor, edge_weight: Tensor) -> Tensor:
    """Negative log-likelihood summed over edges, each with its weight.

    Args:
        logits: [M, V] of the distinct targets.
        targets: [M] ids.
        edge_target: [E] index of the target that each edge wants; a shared target has several edges.
        edge_weight: [E] weights.

    Returns:
        A scalar; 0 (with a graph) when there is no edge.
    """
    per_target = edge_weight.new_zeros(len(targets)).index_add(0, edge_target, edge_weight)
    return -(token_logprobs(logits, targets) * per_target).sum()
