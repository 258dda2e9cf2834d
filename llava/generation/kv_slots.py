"""Keys and values of running sequences: one slot each, every slot with a length of its own.

    prefill: one flat row --CapturedRow--> K, V of the row --gather the positions of a path--> slot
    decode:  token of each slot --SlotCache.update--> K, V of slots [B, H, L, D], masked beyond each slot's length

Slots 0 to B - 1 are the running ones, so a decoding step works on views and never gathers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

FULL, SLIDING = "full_attention", "sliding_attention"
"""transformers' names of the two kinds of attention layers."""

FIRST_LENGTH = 128
"""Tokens that a fresh slot holds at least; slots grow by doubling."""


class CapturedRow(Cache):
    """Keeps the keys and values of one forward pass, which attends to nothing but itself."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep [1, H, T, D] of one layer; layers come in order."""
        self.keys.append(key_states)
        self.values.append(value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing stands before the row."""
        return 0


class SlotCache(Cache):
    """Keys and values [slots, H, length, D] of every layer, and how much of each slot is filled."""

    def __init__(self, *, max_slots: int, max_length: int) -> None:
        """Start without memory; slots are made as they are needed, up to `max_slots` of `max_length` tokens."""
        super().__init__(layers=[])
        self.max_slots = max_slots
        self.max_length = max_length
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.lengths: list[int] = []
        self._places = torch.empty(0, dtype=torch.long)
        self._rows = torch.empty(0, dtype=torch.long)
        self._columns = torch.empty(0, dtype=torch.long)

    @property
    def num_running(self) -> int:
        """B: sequences that hold a slot."""
        return len(self.lengths)

    def join(self, row: CapturedRow, paths: Sequence[Tensor]) -> None:
        """Give each path of a prefilled row the next free slot.

        Args:
            row: keys and values of the row.
            paths: for each sequence the positions of its tokens in the row.
        """
        lengths = [len(path) for path in paths]
        start = self.num_running
        self._reserve(row, start + len(paths), max(lengths) + 1)
        for slot, path in enumerate(paths, start):
            for first, place, length in _runs(path):
                for kept, captured in ((self.keys, row.keys), (self.values, row.values)):
                    for buffer, states in zip(kept, captured, strict=True):
                        buffer[slot, :, first : first + length] = states[0, :, place : place + length]
        self.lengths.extend(lengths)
        self._moved()

    def leave(self, slot: int) -> None:
        """Free a slot; the last running sequence moves into it."""
        last = self.num_running - 1
        if slot != last:
            length = self.lengths[last]
            for buffer in (*self.keys, *self.values):
                buffer[slot, :, :length] = buffer[last, :, :length]
            self.lengths[slot] = self.lengths[last]
        self.lengths.pop()
        self._moved()

    def release(self) -> None:
        """Give all memory back; nothing may be running."""
        self.keys.clear()
        self.values.clear()

    def shrink(self, num_slots: int) -> None:
        """Give the memory of slots from `num_slots` on back; they must be free."""
        for kept in (self.keys, self.values):
            kept[:] = [buffer[:num_slots].clone() for buffer in kept]

    def positions(self) -> Tensor:
        """[B, 1] position of the next token of each running sequence; makes room for it."""
        self._reserve(None, self.num_running, max(self.lengths) + 1)
        return self._places[:, None]

    def mask(self, sliding_window: int | None = None) -> Tensor:
        """[B, 1, 1, L] True where the next token of each sequence may look: itself, and what is before it."""
        columns, places = self._columns[: max(self.lengths) + 1], self._places[:, None]
        allowed = columns <= places
        if sliding_window is not None:
            allowed &= columns > places - sliding_window
        return allowed[:, None, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one token [B, H, 1, D] of each running sequence and return all [B, H, L, D]."""
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys[self._rows, :, self._places] = key_states[:, :, 0]
        values[self._rows, :, self._places] = value_states[:, :, 0]
        num, longest = len(self.lengths), max(self.lengths) + 1
        return keys[:num, :, :longest], values[:num, :, :longest]

    def advance(self) -> None:
        """Count the tokens that `update` wrote; before this call a step can be repeated."""
        self.lengths = [length + 1 for length in self.lengths]
        self._places = self._places + 1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the longest sequence; models that are given positions do not use it."""
        return max(self.lengths, default=0)

    def _moved(self) -> None:
        """Renew the index tensors after slots changed."""
        device = self.keys[0].device
        self._places = torch.tensor(self.lengths, dtype=torch.long, device=device)
        self._rows = torch.arange(self.num_running, device=device)

    def _reserve(self, row: CapturedRow | None, num_slots: int, length: int) -> None:
        """Make room for so many slots of so many tokens; each grows by doubling, contents are kept.

        Args:
            row: tells the shapes when there is no buffer yet.
            num_slots: slots needed.
            length: tokens needed in the longest one.
        """
        if not self.keys and row is not None:
            for kept, captured in ((self.keys, row.keys), (self.values, row.values)):
                kept.extend(states.new_empty(0, states.shape[1], 0, states.shape[3]) for states in captured)
        for kept in (self.keys, self.values):
            for layer, buffer in enumerate(kept):
                kept[layer] = self._grown(buffer, num_slots, length)
        if self.keys and len(self._columns) < self.keys[0].shape[2]:
            self._columns = torch.arange(self.keys[0].shape[2], device=self.keys[0].device)

    def _grown(self, buffer: Tensor, num_slots: int, length: int) -> Tensor:
        slots, heads, tokens, width = buffer.shape
        if slots >= num_slots and tokens >= length:
            return buffer
        if slots < num_slots:
            num_slots = max(num_slots, min(2 * slots, self.max_slots))
        if tokens < length:
            length = max(length, min(max(2 * tokens, FIRST_LENGTH), self.max_length))
        # Zeros: what is masked must still be finite.
        grown = buffer.new_zeros(max(num_slots, slots), heads, max(length, tokens), width)
        grown[:slots, :, :tokens] = buffer
        return grown


def _runs(path: Tensor) -> list[tuple[int, int, int]]:
    """`(index in the path, position in the row, length)` of the stretches in which a path is contiguous."""
    places = path.numpy()
    breaks = [0, *(np.flatnonzero(np.diff(places) != 1) + 1).tolist(), len(places)]
    return [(first, int(places[first]), last - first) for first, last in pairwise(breaks)]


def decoding_masks(cache: SlotCache, config: Any) -> Tensor | dict[str, Tensor]:
    """The mask that a language model of `config` (a text config) takes for one decoding step.

    Returns:
        [B, 1, 1, L], or one for each kind of layer where a model has more than one.
    """
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if FULL in kinds and SLIDING in kinds:
        return {FULL: cache.mask(), SLIDING: cache.mask(window)}
    return cache.mask(None if kinds == {FULL} else window)
