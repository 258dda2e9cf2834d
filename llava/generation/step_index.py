"""Index tensors of a decoding step: which slot uses which stem, masks, and places of new tokens."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_CHUNKS, MIN_CHUNK = 4, 8
"""Largest number of chunks of slots, each padded to its own longest slot, and smallest number of slots of one."""

MIN_SAVED = 2048
"""Columns that chunks must save over all slots; below this, their operator calls cost more than the padding."""


@dataclass(slots=True)
class Stem:
    """Name and length of a stem, and the slots that use it."""

    name: Hashable
    length: int
    slots: list[int]


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
        self.masks: dict[tuple[int | None, int], Tensor] = {}
        # In this case no column is padding.
        self._is_even = len(set(lengths)) == 1 and len({stems[stem].length for stem in stem_of}) == 1
        self._is_plain = list(stem_of) == list(range(len(stem_of)))
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

    def mask(self, window: int | None, heads: int) -> Tensor | None:
        """Return the additive mask [B * heads, 1, P + L] of 0 and -inf; None if every column is visible."""
        if window is None and self._is_even:
            return None
        if (window, heads) not in self.masks:
            columns = torch.arange(self.longest, device=self.rows.device)
            on_stem = self.stem_columns < self.stem_lengths[:, None]
            on_own = columns <= self.lengths[:, None]
            if window is not None:
                first = self.positions() - window
                on_stem = on_stem & (self.stem_columns > first)
                on_own = on_own & (columns + self.stem_lengths[:, None] > first)
            allowed = torch.cat([on_stem, on_own], dim=1)
            bias = torch.where(allowed, 0.0, float("-inf"))
            self.masks[window, heads] = bias.repeat_interleave(heads, dim=0)[:, None]
        return self.masks[window, heads]

    def grouped(self, states: Tensor, heads: int) -> Tensor:
        """Group the sequences of each stem: [B * H, R, X] to [S * H, G * R, X], G the largest number of them."""
        if self._is_plain:
            return states
        gathered = states.index_select(0, self._orders(heads)[0])
        return gathered.view(self.num_stems * heads, -1, states.shape[2])

    def alone(self, states: Tensor, heads: int) -> Tensor:
        """Undo `grouped`: [S * H, G * R, X] to [B * H, R, X]."""
        if self._is_plain:
            return states
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


def of_heads(rows: slice, heads: int) -> slice:
    """Return the rows of the heads of these sequences."""
    return slice(rows.start * heads, rows.stop * heads)
