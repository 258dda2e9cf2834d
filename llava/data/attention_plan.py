"""Attention plan of a row of prefix trees: pieces that attend to their ancestors and themselves.

    node lengths, parents --> pieces (runs of the row) --> for each piece: its keys, and a mask or plain causality

In depth-first order a subtree is one run of the row, so token q sees token k exactly when
`k <= q < end of the subtree of k's node`. No tensor of size [T, T] is created: a piece of q tokens below A others costs
at most q * (A + q), and pieces are cut to keep the sum small (a dense mask of a whole tree cost three times as much
on eight questions per image).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

COPY_COST = 16
"""Cost, in query-key pairs, of copying the query, key and value of one token next to others (forward and backward)."""

PIECE_COST = 2048
"""Cost, in query-key pairs, of one more call of the attention kernel."""


@dataclass(frozen=True, slots=True)
class RowPiece:
    """Run of `length` tokens of the row that attends to the pieces `above` it and to itself.

    Attributes:
        start: first token in the row.
        length: number of tokens.
        above: ancestor pieces from the root down; each holds one whole node.
        num_above: number of tokens in those pieces.
        is_chain: whether every token sees all earlier tokens of the piece.
        is_causal: whether it is cheapest to recompute the queries above, which allows the kernel's causal form.
    """

    start: int
    length: int
    above: tuple[int, ...]
    num_above: int
    is_chain: bool
    is_causal: bool


def chain_cost(length: int, num_above: int) -> int:
    """Return the cost of a chain below `num_above` tokens, in query-key pairs."""
    total = num_above + length
    copies = COPY_COST * total if num_above else 0
    # The causal form computes half of the square.
    return min(length * total, total * total // 2) + copies + PIECE_COST


def _block_cost(length: int, num_above: int) -> int:
    """Return the cost of several branches in one masked piece."""
    return (length + COPY_COST) * (num_above + length) + PIECE_COST


@dataclass(slots=True)
class _Subtree:
    """Cheapest way to run a subtree: as one masked block, or the node first and then groups of children."""

    node: int
    size: int
    depth: int
    length: int
    groups: list[list[_Subtree]]
    cost: int
    is_block: bool


def _group(children: Sequence[_Subtree], num_above: int) -> tuple[list[list[_Subtree]], int]:
    """Return adjacent small branches grouped into blocks where that costs less, and the total cost."""
    groups: list[list[_Subtree]] = []
    costs: list[int] = []
    for child in children:
        can_join = bool(groups) and all(member.is_block or not member.groups for member in (child, *groups[-1]))
        joined = _block_cost(child.size + sum(member.size for member in groups[-1]), num_above) if can_join else 0
        if can_join and joined < costs[-1] + child.cost:
            groups[-1].append(child)
            costs[-1] = joined
        else:
            groups.append([child])
            costs.append(child.cost)
    return groups, sum(costs)


def _subtrees(lengths: Sequence[int], parents: Sequence[int]) -> list[_Subtree]:
    """Return the planned roots; costs are computed from the leaves up."""
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + lengths[parent])
    children: list[list[_Subtree]] = [[] for _ in parents]
    roots: list[_Subtree] = []
    for node in range(len(parents) - 1, -1, -1):
        length, depth = lengths[node], depths[node]
        below = children[node][::-1]
        groups, cost = _group(below, depth + length)
        cost += chain_cost(length, depth)
        size = length + sum(child.size for child in below)
        as_block = _block_cost(size, depth)
        is_block = bool(below) and as_block <= cost
        subtree = _Subtree(node, size, depth, length, groups, min(cost, as_block) if below else cost, is_block)
        (roots if parents[node] < 0 else children[parents[node]]).append(subtree)
    return roots[::-1]


def pieces_of(lengths: Sequence[int], parents: Sequence[int]) -> tuple[RowPiece, ...]:
    """Return the pieces of a row.

    Args:
        lengths: number of tokens of each node, in depth-first order.
        parents: parent of each node, -1 for a root.
    """
    pieces: list[RowPiece] = []
    start = 0
    stack: list[tuple[list[_Subtree], tuple[int, ...]]] = [
        ([root], ()) for root in reversed(_subtrees(lengths, parents))
    ]
    while stack:
        group, above = stack.pop()
        first = group[0]
        has_groups = len(group) == 1 and bool(first.groups) and not first.is_block
        is_chain = len(group) == 1 and (has_groups or not first.groups)
        length = first.length if has_groups else sum(member.size for member in group)
        is_causal = is_chain and first.depth < length
        pieces.append(RowPiece(start, length, above, first.depth, is_chain, is_causal))
        start += length
        if has_groups:
            path = (*above, len(pieces) - 1)
            stack.extend((members, path) for members in reversed(first.groups))
    return tuple(pieces)


def subtree_stops(lengths: Sequence[int], parents: Sequence[int]) -> list[int]:
    """Return the end of each node's subtree, as an index into the row."""
    stops: list[int] = []
    for length in lengths:
        stops.append((stops[-1] if stops else 0) + length)
    for node in range(len(parents) - 1, -1, -1):
        if parents[node] >= 0:
            stops[parents[node]] = max(stops[parents[node]], stops[node])
    return stops


@dataclass(slots=True)
class AttentionPlan:
    """Pieces of a row and their masks, computed once per batch and shared by all layers.

    Attributes:
        pieces: pieces in row order, without gaps.
        stops: [T] end of the subtree of each token's node.
        positions: [T] depth of each token.
    """

    pieces: tuple[RowPiece, ...]
    stops: Tensor
    positions: Tensor
    _masks: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict)
    _biases: dict[tuple[int, int | None, torch.dtype], Tensor] = field(default_factory=dict)
    _blocks: dict[int | None, BlockMask] = field(default_factory=dict)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each piece."""
        return [piece.length for piece in self.pieces]

    def sees(self, query: Tensor, key: Tensor, window: int | None = None) -> Tensor:
        """Return whether the token at row index `query` sees the one at `key`; broadcasts.

        `window` counts positions, so a branch sees as far up as its unshared sequence would.
        """
        seen = (key <= query) & (query < self.stops[key])
        return seen if window is None else seen & (self.positions[query] - self.positions[key] < window)

    def mask(self, index: int, window: int | None = None) -> Tensor | None:
        """Return the [q, A + q] mask of a piece, or None if it runs causally with the queries above prepended."""
        name = (index, window)
        if name not in self._masks:
            self._masks[name] = self._make_mask(self.pieces[index], window)
        return self._masks[name]

    def _make_mask(self, piece: RowPiece, window: int | None) -> Tensor | None:
        if piece.is_causal and (window is None or piece.num_above + piece.length <= window):
            return None
        return self._sees_of(piece, window)

    def bias(self, index: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return the additive [q, A + q] mask of a piece: 0 where a query sees a key, -inf elsewhere."""
        name = (index, window, dtype)
        if name not in self._biases:
            seen = self._sees_of(self.pieces[index], window)
            self._biases[name] = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, -math.inf)
        return self._biases[name]

    def _sees_of(self, piece: RowPiece, window: int | None) -> Tensor:
        device = self.stops.device
        runs = [self.pieces[index] for index in piece.above] + [piece]
        keys = torch.cat([torch.arange(run.start, run.start + run.length, device=device) for run in runs])
        return self.sees(keys[piece.num_above :, None], keys[None, :], window)

    def block_mask(self, window: int | None = None) -> BlockMask:
        """Return the FlexAttention mask of the whole row; blocks that no query sees are skipped."""
        if window not in self._blocks:
            num_tokens, device = len(self.stops), self.stops.device
            make: Callable[..., BlockMask] = create_block_mask
            if device.type == "cuda":  # compiled, it does not create a tensor of size [T, T] either
                make = torch.compile(create_block_mask)

            def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return self.sees(query, key, window)

            self._blocks[window] = make(visible, None, None, num_tokens, num_tokens, device=device)
        return self._blocks[window]


def attention_plan(segment_ids: Tensor, parents: Tensor, positions: Tensor) -> AttentionPlan:
    """Return the attention plan of a row.

    Args:
        segment_ids: [T] node of each token.
        parents: [S] parent of each node, -1 for a root.
        positions: [T] depth of each token in its tree.
    """
    above = parents.tolist()
    lengths = torch.bincount(segment_ids, minlength=len(above)).tolist()
    stops = torch.tensor(subtree_stops(lengths, above), device=segment_ids.device)[segment_ids]
    return AttentionPlan(pieces_of(lengths, above), stops, positions)
