"""Who attends to whom inside one prefix tree: a token sees its own node up to itself, and every node above."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ancestors(parents: Tensor) -> Tensor:
    """[S, S] bool: node j is node i or stands above it. Parents stand before their children."""
    num_nodes = len(parents)
    above = torch.eye(num_nodes, dtype=torch.bool)
    for node, parent in enumerate(parents.tolist()):
        if parent >= 0:
            above[node] |= above[parent]
    return above


def tree_masks(tree_lengths: Sequence[int], segment_ids: Tensor, parents: Tensor) -> tuple[Tensor | None, ...]:
    """One [t, t] bool mask a tree (True: attend), or None for a tree that is a single chain and needs only causality.

    A mask over the whole row is never built: the cost of a row is the sum over its trees.
    """
    masks: list[Tensor | None] = []
    row_parents = parents.cpu()
    for segments in torch.split(segment_ids, list(tree_lengths)):
        first, last = int(segments[0]), int(segments[-1])
        if first == last:
            masks.append(None)
            continue
        local = row_parents[first : last + 1]
        above = ancestors(torch.where(local >= 0, local - first, local)).to(segments.device)
        nodes = segments - first
        masks.append(above[nodes[:, None], nodes[None, :]].tril_())
    return tuple(masks)
