"""Preallocated keys and values of all layers: rows of tokens that grow by doubling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FIRST_LENGTH = 32
"""Smallest length of a new row in tokens."""


class LayerBuffers:
    """Buffers of keys and values [rows, H, length, D] for each layer."""

    def __init__(self, *, max_rows: int, max_length: int) -> None:
        """Start empty; growth by doubling stops at `max_rows` and `max_length`, requests do not."""
        self.max_rows = max_rows
        self.max_length = max_length
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    @property
    def device(self) -> torch.device:
        """Device of the buffers."""
        return self.keys[0].device

    @property
    def length(self) -> int:
        """Capacity of a row in tokens."""
        return self.keys[0].shape[2]

    def shape_like(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Take heads, width and dtype from [1, H, T, D] of each layer."""
        if not self.keys:
            self.keys = [states.new_empty(0, states.shape[1], 0, states.shape[3]) for states in keys]
            self.values = [states.new_empty(0, states.shape[1], 0, states.shape[3]) for states in values]

    def reserve(self, num_rows: int, length: int) -> None:
        """Make room for `num_rows` rows of `length` tokens; contents are kept."""
        for kept in (self.keys, self.values):
            for layer, buffer in enumerate(kept):
                kept[layer] = self._grown(buffer, num_rows, length)

    def shrink(self, num_rows: int, max_rows: int) -> None:
        """Keep the first `num_rows` rows only, and grow to at most `max_rows` from now on."""
        self.max_rows = max_rows
        for kept in (self.keys, self.values):
            kept[:] = [buffer[:num_rows].clone() for buffer in kept]

    def rearrange(self, parents: Tensor, length: int) -> None:
        """Copy the first tokens of row `parents[i]` to row i."""
        for kept in (self.keys, self.values):
            for buffer in kept:
                buffer[: len(parents), :, :length] = buffer[parents, :, :length]

    def views(self, layer: int, rows: slice, length: int) -> tuple[Tensor, Tensor]:
        """Return the first tokens of some rows as views [rows * H, length, D]."""
        # Rows and heads are adjacent in memory, so they merge without a copy.
        keys, values = self.keys[layer][rows, :, :length], self.values[layer][rows, :, :length]
        return keys.flatten(0, 1), values.flatten(0, 1)

    def put(self, layer: int, places: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write one token of each head [B * H, D] at flat indices `places` over rows, heads and tokens."""
        for buffer, states in ((self.keys[layer], keys), (self.values[layer], values)):
            buffer.view(-1, buffer.shape[-1]).index_copy_(0, places, states)

    def write(
        self, target: tuple[int, int], states: tuple[Sequence[Tensor], Sequence[Tensor]], place: int, length: int
    ) -> None:
        """Copy tokens of every layer.

        Args:
            target: row and its first token to write.
            states: keys and values [1, H, T, D] of each layer.
            place: first token of the states to copy.
            length: number of tokens.
        """
        row, first = target
        for kept, given in zip((self.keys, self.values), states, strict=True):
            for buffer, source in zip(kept, given, strict=True):
                buffer[row, :, first : first + length] = source[0, :, place : place + length]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first tokens of a row over another row."""
        for buffer in (*self.keys, *self.values):
            buffer[target, :, :length] = buffer[source, :, :length]

    def _grown(self, buffer: Tensor, num_rows: int, length: int) -> Tensor:
        rows, heads, tokens, width = buffer.shape
        if rows >= num_rows and tokens >= length:
            return buffer
        if rows < num_rows:
            num_rows = max(num_rows, min(2 * rows, self.max_rows))
        if tokens < length:
            length = max(length, min(max(2 * tokens, FIRST_LENGTH), self.max_length))
        # Zeros, because masked values must be finite.
        grown = buffer.new_zeros(max(num_rows, rows), heads, max(length, tokens), width)
        grown[:rows, :, :tokens] = buffer
        return grown
