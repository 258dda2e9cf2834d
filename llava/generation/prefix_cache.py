"""Cache of keys and values of earlier prompts and answers, for prompts with the same prefix.

    tokens of a prompt, images by their key --match--> longest known beginning, computed once
    prompt that was read, answer that ended  --insert--> branches of a radix tree
                                             --evict---> least recently used leaves, when they exceed a number of bytes

Each caller has a tree of its own: how soon an answer begins would otherwise tell whether another caller has shown an
image before.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from llava.data.encode import Encoded

Identity: TypeAlias = "int | str"
"""What a token is: its id, or the key of the image that it stands for."""


@dataclass(slots=True, eq=False)
class KeyValues:
    """Keys and values [1, H, n, D] of n tokens in each layer."""

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def length(self) -> int:
        """Number of tokens (n)."""
        return int(self.keys[0].shape[2])

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        return sum(states.numel() * states.element_size() for states in (*self.keys, *self.values))

    def part(self, start: int, stop: int) -> KeyValues:
        """Return some of the tokens as views."""
        return KeyValues(
            [states[:, :, start:stop] for states in self.keys], [states[:, :, start:stop] for states in self.values]
        )

    def copied(self) -> KeyValues:
        """Return a copy that shares no memory."""
        return KeyValues(
            [states.clone(memory_format=torch.contiguous_format) for states in self.keys],
            [states.clone(memory_format=torch.contiguous_format) for states in self.values],
        )


def parts_between(parts: Sequence[KeyValues], start: int, stop: int) -> list[KeyValues]:
    """Return the tokens from `start` to `stop` of consecutive parts as views."""
    found, first = [], 0
    for part in parts:
        low, high = max(start - first, 0), min(stop - first, part.length)
        if low < high:
            found.append(part.part(low, high))
        first += part.length
    return found


def joined(parts: Sequence[KeyValues]) -> KeyValues:
    """Return consecutive parts as one copy."""
    if len(parts) == 1:
        return parts[0].copied()
    return KeyValues(
        [torch.cat(states, dim=2) for states in zip(*(part.keys for part in parts), strict=True)],
        [torch.cat(states, dim=2) for states in zip(*(part.values for part in parts), strict=True)],
    )


def identities_of(encoded: Encoded) -> tuple[Identity, ...]:
    """Return an identity per token; image placeholders are identified by the image's content."""
    identities: list[Identity] = list(encoded.input_ids)
    for (start, stop), key in zip(encoded.image_spans, encoded.images, strict=True):
        identities[start:stop] = [key] * (stop - start)
    return tuple(identities)


def whole_images(length: int, encoded: Encoded) -> int:
    """Return the largest number of tokens up to `length` that does not end inside an image."""
    return next((start for start, stop in encoded.image_spans if start < length < stop), length)


def num_common(first: Sequence[Identity], second: Sequence[Identity], start: int = 0) -> int:
    """Return how many tokens of `first` equal those of `second` from its token `start` on."""
    stop = min(len(first), len(second) - start)
    if first[:stop] == second[start : start + stop]:
        return stop
    return next(place for place in range(stop) if first[place] != second[start + place])


@dataclass(slots=True, eq=False)
class CacheNode:
    """Run of tokens below its parent; in use while `num_users` prompts are prefilled on top of it."""

    tokens: tuple[Identity, ...]
    states: KeyValues
    parent: CacheNode | None
    children: dict[Identity, CacheNode] = field(default_factory=dict)
    num_users: int = 0


@dataclass(slots=True, eq=False)
class Match:
    """Cached prefix of a prompt: length, keys and values, and last node, in use until released."""

    length: int
    parts: list[KeyValues]
    node: CacheNode | None


class PrefixCache:
    """Radix trees of keys and values, one per caller, of bounded total size."""

    def __init__(self, max_bytes: int) -> None:
        """Create a cache of at most `max_bytes`; 0 disables it."""
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._roots: dict[str, CacheNode] = {}
        # Least recently used first; a node is always used after its children.
        self._recent: OrderedDict[CacheNode, str] = OrderedDict()

    def match(self, tree: str, encoded: Encoded, identities: Sequence[Identity]) -> Match:
        """Return the longest cached prefix, without the prompt's last token; call `release` after use."""
        node, nodes, parts, length = self._roots.get(tree), [], [], 0
        limit = len(identities) - 1
        while node is not None and length < limit:
            child = node.children.get(identities[length])
            if child is None:
                break
            num = min(num_common(child.tokens, identities, length), limit - length)
            nodes.append(child)
            parts.append(child.states.part(0, num))
            length += num
            node = child if num == len(child.tokens) else None
        length = whole_images(length, encoded)
        for used in reversed(nodes):
            self._recent.move_to_end(used)
        for used in nodes[-1:]:  # ancestors have children, so they are not evicted either
            used.num_users += 1
        return Match(length, parts_between(parts, 0, length), nodes[-1] if nodes else None)

    def release(self, match: Match) -> None:
        """Make the nodes of a match evictable again."""
        if match.node is not None:
            match.node.num_users -= 1
        match.node = None

    def insert(
        self, tree: str, encoded: Encoded, identities: Sequence[Identity], copy: Callable[[int, int], KeyValues]
    ) -> None:
        """Store the tokens of a prompt and, if given, its answer.

        Args:
            tree: name of the tree.
            encoded: the prompt, whose images are kept whole or not at all.
            identities: its tokens and those of an answer, as far as their keys and values are known.
            copy: returns a copy of the keys and values from one token to another; called for unknown tokens only.
        """
        if not self.max_bytes or not identities:
            return
        root = self._roots.setdefault(tree, CacheNode((), KeyValues([], []), None))
        node, start = root, 0
        while start < len(identities) and (child := node.children.get(identities[start])) is not None:
            num = num_common(child.tokens, identities, start)
            start += num
            node = child if num == len(child.tokens) else self._divided(tree, child, num)
            if num < len(child.tokens):
                break
        node.num_users += 1
        if start < len(identities):
            self._add(tree, node, start, (encoded, identities, copy))
        node.num_users -= 1
        while node.parent is not None:
            self._recent.move_to_end(node)
            node = node.parent
        self._forget_empty(tree)

    def clear(self) -> None:
        """Evict everything that is not in use."""
        self._evict(self.max_bytes)

    def _add(
        self,
        tree: str,
        node: CacheNode,
        start: int,
        given: tuple[Encoded, Sequence[Identity], Callable[[int, int], KeyValues]],
    ) -> None:
        encoded, identities, copy = given
        # One token is copied first to know the size of the others.
        size = copy(start, start + 1).num_bytes
        self._evict(size * (len(identities) - start))
        room = (self.max_bytes - self.num_bytes) // size
        stop = whole_images(min(len(identities), start + room), encoded)
        if stop <= start:
            return
        child = CacheNode(tuple(identities[start:stop]), copy(start, stop), node)
        node.children[child.tokens[0]] = child
        self._recent[child] = tree
        self.num_bytes += child.states.num_bytes

    def _divided(self, tree: str, node: CacheNode, length: int) -> CacheNode:
        """Divide a node after some tokens; return the upper part, a new node."""
        assert node.parent is not None
        # Copies, so that the memory of one part is free when only the other is evicted.
        upper = CacheNode(node.tokens[:length], node.states.part(0, length).copied(), node.parent)
        node.parent.children[upper.tokens[0]] = upper
        node.states = node.states.part(length, len(node.tokens)).copied()
        node.tokens, node.parent = node.tokens[length:], upper
        upper.children[node.tokens[0]] = node
        self._recent[upper] = tree
        return upper

    def _evict(self, num_bytes: int) -> None:
        """Evict least recently used leaves until `num_bytes` more fit, or all others are in use."""
        while self.num_bytes + num_bytes > self.max_bytes:
            leaf = next((node for node in self._recent if not node.children and not node.num_users), None)
            if leaf is None:
                return
            tree = self._recent.pop(leaf)
            assert leaf.parent is not None
            del leaf.parent.children[leaf.tokens[0]]
            self.num_bytes -= leaf.states.num_bytes
            self._forget_empty(tree)

    def _forget_empty(self, tree: str) -> None:
        root = self._roots.get(tree)
        if root is not None and not root.children:
            del self._roots[tree]
