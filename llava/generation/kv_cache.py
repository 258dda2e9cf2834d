"""Keys and values of running sequences, and the attention of a decoding step over them.

    prefill: one flat row --CapturedRow--> K, V of the row
    join:    shared part of a path --> a stem [H, P, D], stored once;  the rest of the path --> a slot
    decode:  the new token of each slot attends to its stem and to its slot; a stem is read once for all its sequences

Questions about one image have the image in their stem, which is stored once and read once per step. Slots 0 to B - 1
are running and stems 0 to S - 1 are in use, so a step works on views.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from llava.generation.kv_buffers import LayerBuffers
from llava.generation.prefix_cache import KeyValues, joined, parts_between
from llava.generation.slot_attention import attend
from llava.generation.step_index import Stem, StepIndex

_serial_numbers = itertools.count()


class CapturedRow(Cache):
    """Cache that keeps the keys and values of one forward pass without a prefix."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.serial = next(_serial_numbers)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep [1, H, T, D] of one layer; layers arrive in order."""
        self.keys.append(key_states)
        self.values.append(value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: the row has no prefix."""
        return 0


@dataclass(frozen=True, slots=True)
class Path:
    """Positions of a sequence in a row: those that it shares with others, and the rest.

    Attributes:
        stem: number of the shared part in its row; equal numbers mean equal parts.
        shared: [P] positions of the shared part.
        rest: [n] positions after it.
    """

    stem: int
    shared: Tensor
    rest: Tensor


class SlotCache:
    """Keys and values of stems and slots, and the attention over both."""

    def __init__(self, *, max_slots: int, max_length: int, max_bytes: float = float("inf")) -> None:
        """Create an empty cache; slots are allocated on demand, up to `max_slots` of `max_length` tokens.

        Near `max_bytes` no memory is allocated in advance; more is used only if the sequences themselves need more.
        """
        self.max_bytes = max_bytes
        self.stem_states = LayerBuffers(max_rows=max_slots, max_length=max_length)
        self.slot_states = LayerBuffers(max_rows=max_slots, max_length=max_length)
        self.stems: list[Stem] = []
        self.stem_of: list[int] = []
        self.lengths: list[int] = []
        self._slot_size = 0, 0
        self._index: StepIndex | None = None

    def emptied(self) -> SlotCache:
        """Return a cache with the same limits and without contents."""
        states = self.slot_states
        return SlotCache(max_slots=states.max_rows, max_length=states.max_length, max_bytes=self.max_bytes)

    @property
    def num_bytes(self) -> int:
        """Bytes of stems and slots."""
        return self.stem_states.num_bytes + self.slot_states.num_bytes

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token; 0 before the first sequence joins."""
        return self.slot_states.bytes_per_token

    def num_tokens(self, slot: int) -> int:
        """Return the number of tokens of a running sequence."""
        return self.stems[self.stem_of[slot]].length + self.lengths[slot]

    def copy(self, slot: int, start: int, stop: int) -> KeyValues:
        """Return a copy of the keys and values of some tokens of a running sequence."""
        stem = self.stem_of[slot]
        length = self.stems[stem].length
        parts = []
        if start < length:
            parts.append(self.stem_states.tokens(stem, start, min(stop, length)))
        if stop > length:
            parts.append(self.slot_states.tokens(slot, max(start - length, 0), stop - length))
        return joined(parts)

    @property
    def num_running(self) -> int:
        """Number of sequences that hold a slot (B)."""
        return len(self.lengths)

    def join(self, row: CapturedRow, paths: Sequence[Path]) -> None:
        """Move each sequence of a prefilled row to the next free slot."""
        self.stem_states.shape_like(row.keys, row.values)
        self.slot_states.shape_like(row.keys, row.values)
        longest = max([*(len(path.rest) for path in paths), *self.lengths])
        self._reserve_slots(self.num_running + len(paths), longest + 1)
        for path in paths:
            slot, stem = self.num_running, self._stem(row, path)
            for first, place, length in _runs(path.rest):
                self.slot_states.write((slot, first), (row.keys, row.values), place, length)
            self.stems[stem].slots.append(slot)
            self.stem_of.append(stem)
            self.lengths.append(len(path.rest))
        self._index = None

    def join_parts(self, name: Hashable, stem_length: int, parts: Sequence[KeyValues], num: int) -> None:
        """Copy a sequence to the next `num` free slots; its first tokens go to the stem `name` unless present."""
        for states in (self.stem_states, self.slot_states):
            states.shape_like(parts[0].keys, parts[0].values)
        rest = parts_between(parts, stem_length, sum(part.length for part in parts))
        length = sum(part.length for part in rest)
        self._reserve_slots(self.num_running + num, max([length, *self.lengths]) + 1)
        stem = next((number for number, stem in enumerate(self.stems) if stem.name == name), None)
        if stem is None:
            stem = len(self.stems)
            self._reserve_stems(stem + 1, stem_length)
            self._write(self.stem_states, stem, parts_between(parts, 0, stem_length))
            self.stems.append(Stem(name, stem_length, []))
        for _ in range(num):
            slot = self.num_running
            self._write(self.slot_states, slot, rest)
            self.stems[stem].slots.append(slot)
            self.stem_of.append(stem)
            self.lengths.append(length)
        self._index = None

    def _reserve_slots(self, num: int, length: int) -> None:
        self._slot_size = num, length
        if num * length * self.bytes_per_token + self.stem_states.num_bytes > self.max_bytes:
            self.stem_states.fit(len(self.stems), max((stem.length for stem in self.stems), default=0))
        self.slot_states.max_bytes = self.max_bytes - self.stem_states.num_bytes
        self.slot_states.reserve(num, length)

    def _reserve_stems(self, num: int, length: int) -> None:
        longest = max([length, *(stem.length for stem in self.stems)])
        if num * longest * self.bytes_per_token + self.slot_states.num_bytes > self.max_bytes:
            self.slot_states.fit(*self._slot_size)
        self.stem_states.max_bytes = self.max_bytes - self.slot_states.num_bytes
        self.stem_states.reserve(num, longest)

    def limit(self, max_bytes: float) -> None:
        """Use at most `max_bytes` beyond what running sequences need, from now on."""
        self.max_bytes = max_bytes
        if self.num_running and self.num_bytes > max_bytes:
            self._slot_size = self.num_running, max(self.lengths) + 1
            self.slot_states.fit(*self._slot_size)
            self.stem_states.fit(len(self.stems), max(stem.length for stem in self.stems))

    @staticmethod
    def _write(states: LayerBuffers, row: int, parts: Sequence[KeyValues]) -> None:
        first = 0
        for part in parts:
            states.write((row, first), (part.keys, part.values), 0, part.length)
            first += part.length

    def leave(self, slot: int) -> None:
        """Free a slot, and its stem if no other slot uses it; the last running sequence moves into the slot."""
        stem, last = self.stem_of[slot], self.num_running - 1
        self.stems[stem].slots.remove(slot)
        if slot != last:
            self.slot_states.move(last, slot, self.lengths[last])
            self.lengths[slot], self.stem_of[slot] = self.lengths[last], self.stem_of[last]
            users = self.stems[self.stem_of[slot]].slots
            users[users.index(last)] = slot
        self.lengths.pop()
        self.stem_of.pop()
        if not self.stems[stem].slots:
            self._remove_stem(stem)
        self._index = None

    def rearrange(self, parents: Sequence[int]) -> None:
        """Copy slot `parents[i]` to slot i; all slots have one stem and the same length."""
        if list(parents) != list(range(len(parents))):
            places = torch.tensor(list(parents), device=self.slot_states.device)
            self.slot_states.rearrange(places, self.lengths[0])

    def shrink(self, num_slots: int) -> None:
        """Release the memory of slots from `num_slots` on; they must be free."""
        self.stem_states.shrink(max(len(self.stems), 1), num_slots)
        self.slot_states.shrink(num_slots, num_slots)

    def begin_step(self) -> Tensor:
        """Make room for the next token of each running sequence; return its position [B, 1]."""
        longest = max(self.lengths)
        self._reserve_slots(self.num_running, longest + 1)
        if self._index is None:
            self._index = StepIndex(self.stems, self.stem_of, self.lengths, self.slot_states.device)
        return self._index.positions()

    def end_step(self) -> None:
        """Count the new tokens; before this call a step can be repeated."""
        assert self._index is not None
        self.lengths = [length + 1 for length in self.lengths]
        self._index.advance()

    def begin_extension(self, slots: Sequence[int], num_tokens: Sequence[int]) -> list[SlotExtension]:
        """Make room for new tokens of some slots, which a pass with `ExtensionAttention` writes."""
        longest = max(self.lengths[slot] + num for slot, num in zip(slots, num_tokens, strict=True))
        self._reserve_slots(self.num_running, max([longest, *self.lengths]) + 1)
        return [SlotExtension(self, slot, num) for slot, num in zip(slots, num_tokens, strict=True)]

    def end_extension(self, extensions: Sequence[SlotExtension]) -> None:
        """Count the new tokens; before this call the pass can be repeated."""
        for extension in extensions:
            self.lengths[extension.slot] += extension.length
        self._index = None

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None, window: int | None
    ) -> Tensor:
        """Write the new token of each sequence and attend to its stem and its slot.

        Args:
            layer: index of the layer.
            query: [B, Hq, 1, D]; key, value: [B, Hk, 1, D], Hk divides Hq.
            scaling: factor of the scores; 1 / sqrt(D) when None.
            window: only tokens less than this many positions away are visible.

        Returns:
            [B, 1, Hq, D].
        """
        batch, heads, _, width = query.shape
        scale = width**-0.5 if scaling is None else scaling
        # Query heads that share a key head are rows of one matrix product: [B * Hk, R, D].
        queries = (query * scale).reshape(batch * key.shape[1], -1, width)
        keys, values = key.reshape(-1, width), value.reshape(-1, value.shape[-1])
        return self.attend_heads(layer, queries, keys, values, window).view(batch, 1, heads, -1)

    def attend_heads(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        """Attend as `attend`, with scaled queries [B * Hk, R, D] and new keys and values [B * Hk, D].

        Returns:
            [B * Hk, R, D].
        """
        assert self._index is not None
        places = self._index.places(self.slot_states.keys[layer].shape[1], self.slot_states.length)
        self.slot_states.put(layer, places, keys, values)
        return attend(self._index, self.stem_states, self.slot_states, layer, queries, window=window)

    def _stem(self, row: CapturedRow, path: Path) -> int:
        """Return the stem of a path, copied from the row unless it is present."""
        name = (row.serial, path.stem)
        for number, stem in enumerate(self.stems):
            if stem.name == name:
                return number
        number = len(self.stems)
        self._reserve_stems(number + 1, len(path.shared))
        for first, place, length in _runs(path.shared):
            self.stem_states.write((number, first), (row.keys, row.values), place, length)
        self.stems.append(Stem(name, len(path.shared), []))
        return number

    def _remove_stem(self, number: int) -> None:
        last = self.stems.pop()
        if number < len(self.stems):
            self.stem_states.move(len(self.stems), number, last.length)
            self.stems[number] = last
            for slot in last.slots:
                self.stem_of[slot] = number


class SlotExtension:
    """New tokens of a slot; see `extension.Segment`."""

    def __init__(self, cache: SlotCache, slot: int, length: int) -> None:
        stem = cache.stems[cache.stem_of[slot]]
        self.cache = cache
        self.slot = slot
        self.length = length
        self._stem = cache.stem_of[slot], stem.length
        self._own = cache.lengths[slot]

    @property
    def start(self) -> int:
        """Number of tokens before the new ones."""
        return self._stem[1] + self._own

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append [H, n, D] to the tokens of the slot; return the sequence's keys and values [H, start + n, D]."""
        number, length = self._stem
        states = self.cache.slot_states, self.cache.stem_states
        both = []
        for slots, stems, new in zip(
            (states[0].keys, states[0].values), (states[1].keys, states[1].values), (key, value), strict=True
        ):
            row = slots[layer][self.slot]
            row[:, self._own : self._own + self.length] = new
            both.append(torch.cat([stems[layer][number, :, :length], row[:, : self._own + self.length]], dim=1))
        return both[0], both[1]


def divided_paths(paths: Sequence[Tensor], segment_ids: Tensor) -> tuple[Path, ...]:
    """Divide each path of a row into shared part and rest at the node that saves most.

    Args:
        paths: for each sequence, the positions of its tokens.
        segment_ids: [T] node of each token.
    """
    nodes, ends = [], []
    for path in paths:
        on_path, lengths = torch.unique_consecutive(segment_ids[path], return_counts=True)
        nodes.append(on_path.tolist())
        ends.append(lengths.cumsum(0).tolist())
    num_users = Counter(itertools.chain.from_iterable(nodes))
    divided = []
    for path, on_path, end in zip(paths, nodes, ends, strict=True):
        # Of a part with n users, each one saves (n - 1) / n of the tokens to store and read.
        saved = [length * (1 - 1 / num_users[node]) for node, length in zip(on_path, end, strict=True)]
        best = saved.index(max(saved))
        divided.append(Path(on_path[best], path[: end[best]], path[end[best] :]))
    return tuple(divided)


def _runs(path: Tensor) -> list[tuple[int, int, int]]:
    """Return `(index in the path, position in the row, length)` of the contiguous runs of a path."""
    if not len(path):
        return []
    places = path.numpy()
    breaks = [0, *(np.flatnonzero(np.diff(places) != 1) + 1).tolist(), len(places)]
    return [(first, int(places[first]), last - first) for first, last in pairwise(breaks)]
