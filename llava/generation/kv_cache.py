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
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from llava.generation.kv_buffers import LayerBuffers

NUM_CHUNKS, MIN_CHUNK = 4, 8
"""Largest number of chunks of slots, each padded to its own longest slot, and smallest number of slots of one."""

MIN_SAVED = 2048
"""Columns that chunks must save over all slots; below this, their operator calls cost more than the padding."""

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


@dataclass(slots=True)
class Stem:
    """Name and length of a stem, and the slots that use it."""

    name: tuple[int, int]
    length: int
    slots: list[int]


class SlotCache:
    """Keys and values of stems and slots, and the attention over both."""

    def __init__(self, *, max_slots: int, max_length: int) -> None:
        """Start without memory; slots are allocated on demand, up to `max_slots` of `max_length` tokens."""
        self.stem_states = LayerBuffers(max_rows=max_slots, max_length=max_length)
        self.slot_states = LayerBuffers(max_rows=max_slots, max_length=max_length)
        self.stems: list[Stem] = []
        self.stem_of: list[int] = []
        self.lengths: list[int] = []
        self._index: StepIndex | None = None

    @property
    def num_running(self) -> int:
        """Number of sequences that hold a slot (B)."""
        return len(self.lengths)

    def join(self, row: CapturedRow, paths: Sequence[Path]) -> None:
        """Move each sequence of a prefilled row to the next free slot."""
        self.stem_states.shape_like(row.keys, row.values)
        self.slot_states.shape_like(row.keys, row.values)
        longest = max(len(path.rest) for path in paths)
        self.slot_states.reserve(self.num_running + len(paths), longest + 1)
        for path in paths:
            slot, stem = self.num_running, self._stem(row, path)
            for first, place, length in _runs(path.rest):
                self.slot_states.write((slot, first), (row.keys, row.values), place, length)
            self.stems[stem].slots.append(slot)
            self.stem_of.append(stem)
            self.lengths.append(len(path.rest))
        self._index = None

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
        self.slot_states.reserve(self.num_running, longest + 1)
        if self._index is None:
            self._index = StepIndex(self.stems, self.stem_of, self.lengths, self.slot_states.device)
        return self._index.positions()

    def end_step(self) -> None:
        """Count the new tokens; before this call a step can be repeated."""
        assert self._index is not None
        self.lengths = [length + 1 for length in self.lengths]
        self._index.advance()

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
        assert self._index is not None
        index = self._index
        batch, heads, _, width = query.shape
        key_heads = key.shape[1]
        places = index.places(key_heads, self.slot_states.length)
        self.slot_states.put(layer, places, key.reshape(-1, width), value.reshape(-1, value.shape[-1]))
        stem_keys, stem_values = self.stem_states.views(layer, slice(len(self.stems)), index.longest_stem)
        scale = width**-0.5 if scaling is None else scaling
        # Query heads that share a key head are rows of one matrix product: [B * Hk, R, D].
        queries = (query * scale).reshape(batch * key_heads, -1, width)
        on_stem = index.alone(torch.bmm(index.grouped(queries, key_heads), stem_keys.mT), key_heads)
        scores = torch.cat([on_stem, self._own_scores(layer, queries, key_heads)], dim=-1)
        masked = scores.float().view(batch, heads, -1) + index.mask(window)
        weights = masked.softmax(dim=-1).to(value.dtype).view(scores.shape)
        to_stem = index.grouped(weights[..., : index.longest_stem], key_heads)
        output = index.alone(torch.bmm(to_stem, stem_values), key_heads)
        for rows, length in index.chunks:
            _, values = self.slot_states.views(layer, rows, length)
            own = _of_heads(rows, key_heads)
            output[own].baddbmm_(weights[own, :, index.longest_stem : index.longest_stem + length], values)
        return output.view(batch, 1, heads, -1)

    def _own_scores(self, layer: int, queries: Tensor, key_heads: int) -> Tensor:
        """Return the scores [B * Hk, R, L] of queries [B * Hk, R, D] against the tokens of their slots."""
        assert self._index is not None
        parts = [
            torch.bmm(queries[_of_heads(rows, key_heads)], self.slot_states.views(layer, rows, length)[0].mT)
            for rows, length in self._index.chunks
        ]
        if len(parts) == 1:
            return parts[0]
        scores = queries.new_zeros(*queries.shape[:2], self._index.longest)
        for (rows, length), part in zip(self._index.chunks, parts, strict=True):
            scores[_of_heads(rows, key_heads), :, :length] = part
        return scores

    def _stem(self, row: CapturedRow, path: Path) -> int:
        """Return the stem of a path, copied from the row unless it is present."""
        name = (row.serial, path.stem)
        for number, stem in enumerate(self.stems):
            if stem.name == name:
                return number
        number = len(self.stems)
        self.stem_states.reserve(number + 1, len(path.shared))
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


class StepIndex:
    """Index tensors of a decoding step; valid until a sequence joins or leaves."""

    def __init__(
        self, stems: Sequence[Stem], stem_of: Sequence[int], lengths: Sequence[int], device: torch.device
    ) -> None:
        self.num_stems = len(stems)
        self.group = max(len(stem.slots) for stem in stems)
        self.longest_stem = max(stem.length for stem in stems)
        self.longest = max(lengths) + 1
        self.chunks = self._chunks(lengths)
        place = [0] * len(stem_of)
        for stem in stems:
            for number, slot in enumerate(stem.slots):
                place[slot] = number
        self.rows = torch.arange(len(stem_of), device=device)
        self.lengths = torch.tensor(lengths, device=device)
        self.stem_of = torch.tensor(stem_of, device=device)
        self.place = torch.tensor(place, device=device)
        self.stem_lengths = torch.tensor([stems[stem].length for stem in stem_of], device=device)
        self.stem_columns = torch.arange(self.longest_stem, device=device)
        self.masks: dict[int | None, Tensor] = {}
        # By number of key heads, because layers may differ in it.
        self._places: dict[int, Tensor] = {}
        self._grouping: dict[int, tuple[Tensor, Tensor]] = {}

    def positions(self) -> Tensor:
        """Return the position [B, 1] of the new token."""
        return (self.stem_lengths + self.lengths)[:, None]

    def advance(self) -> None:
        """Count the new tokens as cached."""
        self.lengths = self.lengths + 1
        self.longest += 1
        self.chunks = [(rows, length + 1) for rows, length in self.chunks]
        self.masks.clear()
        self._places.clear()

    def _chunks(self, lengths: Sequence[int]) -> list[tuple[slice, int]]:
        """Return a few chunks of slots with the length of their longest; sequences joined sorted by length."""
        size = max(MIN_CHUNK, -(-len(lengths) // NUM_CHUNKS))
        parts = [slice(first, min(first + size, len(lengths))) for first in range(0, len(lengths), size)]
        chunks = [(rows, max(lengths[rows]) + 1) for rows in parts]
        num_columns = sum((rows.stop - rows.start) * length for rows, length in chunks)
        if len(lengths) * self.longest - num_columns < MIN_SAVED:
            return [(slice(0, len(lengths)), self.longest)]
        return chunks

    def places(self, heads: int, room: int) -> Tensor:
        """Return the flat index [B * heads] of each head's new token in a buffer [rows, heads, room, D]."""
        if heads not in self._places:
            rows = self.rows[:, None] * heads + torch.arange(heads, device=self.rows.device)
            self._places[heads] = (rows * room + self.lengths[:, None]).flatten()
        return self._places[heads]

    def mask(self, window: int | None) -> Tensor:
        """Return the additive mask [B, 1, P + L]: 0 where the new token may attend, else minus infinity."""
        if window not in self.masks:
            columns = torch.arange(self.longest, device=self.rows.device)
            on_stem = self.stem_columns < self.stem_lengths[:, None]
            on_own = columns <= self.lengths[:, None]
            if window is not None:
                first = self.positions() - window
                on_stem = on_stem & (self.stem_columns > first)
                on_own = on_own & (columns + self.stem_lengths[:, None] > first)
            allowed = torch.cat([on_stem, on_own], dim=1)
            self.masks[window] = torch.where(allowed, 0.0, float("-inf"))[:, None]
        return self.masks[window]

    def grouped(self, states: Tensor, heads: int) -> Tensor:
        """Group the sequences of each stem: [B * H, R, X] to [S * H, G * R, X], G the largest number of them."""
        gathered = states.index_select(0, self._orders(heads)[0])
        return gathered.view(self.num_stems * heads, -1, states.shape[2])

    def alone(self, states: Tensor, heads: int) -> Tensor:
        """Undo `grouped`: [S * H, G * R, X] to [B * H, R, X]."""
        rows = states.view(self.num_stems * heads * self.group, -1, states.shape[2])
        return rows.index_select(0, self._orders(heads)[1])

    def _orders(self, heads: int) -> tuple[Tensor, Tensor]:
        """Return the rows that `grouped` takes [S * H * G] and those that `alone` takes [B * H]."""
        if heads not in self._grouping:
            # A place without a sequence repeats slot 0; `alone` never reads it.
            slots = self.rows.new_zeros(self.num_stems, 1, self.group)
            slots[self.stem_of, 0, self.place] = self.rows
            head = torch.arange(heads, device=self.rows.device)
            places = (self.stem_of[:, None] * heads + head) * self.group + self.place[:, None]
            self._grouping[heads] = (slots * heads + head[:, None]).flatten(), places.flatten()
        return self._grouping[heads]


def _of_heads(rows: slice, heads: int) -> slice:
    """Return the rows of the heads of these sequences."""
    return slice(rows.start * heads, rows.stop * heads)


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
