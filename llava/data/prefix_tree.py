"""Prefix trees of token sequences: a shared prefix is laid out, and computed, once.

    sequences -> sorted -> nodes (runs of tokens that the same sequences share) -> trees, depth first, in one row

Two sequences share a node as long as their tokens and the images before them are equal (`docs/architecture.md`).
Labels do not matter here: they belong to the edges of `FlatBatch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from llava.data.attention_plan import chain_cost
from llava.data.encode import Encoded

Identities = npt.NDArray[np.int64]

TOKEN_COST = 2048
"""Cost of one more token in a row, in query-key pairs: a token costs about 24 d^2, a pair 4 d, for d of some hundreds.

Sharing a prefix of one or two tokens would save little, and every branch would copy it in every layer, so sequences
are put in one tree only where that is cheaper.
"""


@dataclass(slots=True)
class Node:
    """Run of tokens, `sequences[0][start:stop]`, at `offset` in the row, below node `parent` (-1: a root)."""

    start: int
    stop: int
    parent: int
    sequences: list[int]
    children: list[Node] = field(default_factory=list)
    index: int = -1
    offset: int = -1

    @property
    def length(self) -> int:
        """Return the number of tokens of this node, without its children."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Forest:
    """Consecutive trees, each laid out depth first.

    Attributes:
        nodes: all nodes in row order; `nodes[i].index == i`.
        tree_lengths: number of tokens of each tree; their sum is the length of the row.
        paths: for each sequence, the nodes from its root to its end.
    """

    nodes: list[Node]
    tree_lengths: tuple[int, ...]
    paths: tuple[tuple[Node, ...], ...]


def token_identities(sequences: Sequence[Encoded]) -> list[Identities]:
    """Return one number per token, equal exactly where sharing is allowed: its id, or -1 - image index."""
    numbers: dict[str, int] = {}
    result = []
    for sequence in sequences:
        values = np.asarray(sequence.input_ids, dtype=np.int64)
        for (start, stop), key in zip(sequence.image_spans, sequence.images, strict=True):
            values[start:stop] = -1 - numbers.setdefault(key, len(numbers))
        result.append(values)
    return result


def _common_prefix(first: Identities, second: Identities) -> int:
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length


def _grow(order: list[int], common: list[int], lengths: list[int], depth: int) -> Node:
    """Return the tree of sorted sequences that share `depth` tokens; i and i + 1 share `common[i]`."""
    stop = min([lengths[order[0]], *common]) if common else lengths[order[0]]
    node = Node(depth, stop, -1, order)
    first = 0
    for position in range(len(order)):
        is_last = position == len(order) - 1
        if is_last or common[position] == stop:
            members = order[first : position + 1]
            if lengths[members[0]] > stop:
                node.children.append(_grow(members, common[first:position], lengths, stop))
            first = position + 1
    return node


def _cost(node: Node, num_above: int = 0) -> int:
    """Return the cost of a subtree whose nodes attend separately, in query-key pairs."""
    below = sum(_cost(child, num_above + node.length) for child in node.children)
    return TOKEN_COST * node.length + chain_cost(node.length, num_above) + below


def _divide(root: Node) -> list[Node]:
    """Return the cheapest trees of the sequences of `root`: one, or one per child that repeats the prefix."""
    if not root.children or len(root.sequences) == 1:
        return [root]
    apart: list[Node] = []
    branches = {sequence for child in root.children for sequence in child.sequences}
    ended = [sequence for sequence in root.sequences if sequence not in branches]
    if ended:
        apart.append(Node(root.start, root.stop, -1, ended))
    for child in root.children:
        apart.extend(_divide(Node(root.start, child.stop, -1, child.sequences, child.children)))
    if _cost(root) <= sum(map(_cost, apart)):
        return [root]
    return apart


def _number(trees: Sequence[Node], num_sequences: int) -> Forest:
    nodes: list[Node] = []
    paths: list[list[Node]] = [[] for _ in range(num_sequences)]
    lengths = []
    offset = 0
    for tree in trees:
        first = offset
        stack = [tree]
        while stack:
            node = stack.pop()
            node.index, node.offset = len(nodes), offset
            offset += node.length
            nodes.append(node)
            for sequence in node.sequences:
                paths[sequence].append(node)
            for child in sorted(node.children, key=lambda child: min(child.sequences), reverse=True):
                child.parent = node.index
                stack.append(child)
        lengths.append(offset - first)
    return Forest(nodes, tuple(lengths), tuple(map(tuple, paths)))


def build_forest(sequences: Sequence[Encoded], *, share: bool = True) -> Forest:
    """Return sequences laid out as prefix trees.

    Args:
        sequences: at least one, none empty.
        share: whether to share prefixes; False makes each sequence a tree, in the given order.

    Returns:
        The forest; trees, and branches of a node, are ordered by their first sequence.
    """
    if not share:
        alone = [Node(0, len(sequence.input_ids), -1, [index]) for index, sequence in enumerate(sequences)]
        return _number(alone, len(sequences))
    values = token_identities(sequences)
    lengths = [len(value) for value in values]
    # Big-endian bytes sort sequences with a common prefix next to each other, the shorter one first.
    order = sorted(range(len(values)), key=lambda index: values[index].astype(">i8").tobytes())
    common = [_common_prefix(values[a], values[b]) for a, b in pairwise(order)]
    trees: list[Node] = []
    first = 0
    for position in range(len(order)):
        if position == len(order) - 1 or common[position] == 0:
            trees.extend(_divide(_grow(order[first : position + 1], common[first:position], lengths, 0)))
            first = position + 1
    return _number(sorted(trees, key=lambda tree: min(tree.sequences)), len(sequences))
