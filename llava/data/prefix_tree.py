"""Prefix trees of token sequences: what several sequences begin with is laid out, and computed, once.

    sequences -> sorted -> nodes (runs of tokens that the same sequences share) -> trees, depth first, in one row

Two sequences share a node as long as their tokens and the images above them are equal (architecture, the flat batch).
Trained or not does not matter here: labels live on edges.
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
"""Price of one more token in a row, in query-key pairs: a token costs about 24 d^2, a pair 4 d, at d of some hundreds.

Sharing an opening of a token or two would save little, and every branch would have to fetch it in every layer, so
sequences are put in one tree only where that is cheaper.
"""


@dataclass(slots=True)
class Node:
    """A run of tokens, `sequences[0][start:stop]`, at `offset` in the row, below node `parent` (-1: a root)."""

    start: int
    stop: int
    parent: int
    sequences: list[int]
    children: list[Node] = field(default_factory=list)
    index: int = -1
    offset: int = -1

    @property
    def length(self) -> int:
        """Tokens of this node alone."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Forest:
    """Trees laid out depth first, one after the other.

    Attributes:
        nodes: every node in row order; `nodes[i].index == i`.
        tree_lengths: tokens of each tree; they sum to the length of the row.
        paths: for each sequence the nodes from its root to its end.
    """

    nodes: list[Node]
    tree_lengths: tuple[int, ...]
    paths: tuple[tuple[Node, ...], ...]


def identities(sequences: Sequence[Encoded]) -> list[Identities]:
    """One number a token, equal exactly where sharing is allowed: a text id, or a negative number for an image."""
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
    """The tree of sorted sequences that share `depth` tokens; `common[i]` tokens join number i and i + 1."""
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
    """Price of a node and all below it, each node attending on its own."""
    below = sum(_cost(child, num_above + node.length) for child in node.children)
    return TOKEN_COST * node.length + chain_cost(node.length, num_above) + below


def _divide(root: Node) -> list[Node]:
    """The cheapest trees for the sequences of `root`: one, or its children's, each with a copy of the opening."""
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


def build(sequences: Sequence[Encoded], *, share: bool = True) -> Forest:
    """Lay sequences out as prefix trees.

    Args:
        sequences: at least one, none empty.
        share: False makes every sequence a tree of its own, in the given order.

    Returns:
        The forest; trees, and branches of a node, stand in the order in which their first sequence was given.
    """
    if not share:
        alone = [Node(0, len(sequence.input_ids), -1, [index]) for index, sequence in enumerate(sequences)]
        return _number(alone, len(sequences))
    values = identities(sequences)
    lengths = [len(value) for value in values]
    # Big-endian bytes sort sequences with a common beginning next to each other, the shorter one first.
    order = sorted(range(len(values)), key=lambda index: values[index].astype(">i8").tobytes())
    common = [_common_prefix(values[a], values[b]) for a, b in pairwise(order)]
    trees: list[Node] = []
    first = 0
    for position in range(len(order)):
        if position == len(order) - 1 or common[position] == 0:
            trees.extend(_divide(_grow(order[first : position + 1], common[first:position], lengths, 0)))
            first = position + 1
    return _number(sorted(trees, key=lambda tree: min(tree.sequences)), len(sequences))
