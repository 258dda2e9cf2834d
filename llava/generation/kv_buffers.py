"""Preallocated keys and values of all layers: rows of tokens that grow by doubling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llava.generation.prefix_cache import KeyValues
from llava.utils.memory import available_memory

DEFAULT_CONTEXT = 2048
"""Context length of a model whose configuration does not name one."""

FIRST_LENGTH = 32
"""Smallest length of a new row in tokens."""

EXCESS, KEPT_BYTES = 4, 1 << 26
"""Buffers this many times larger than needed are cut, if they are larger than this many bytes."""


def context_length(model: Any) -> int:
    """Return the context length of a model in tokens."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or DEFAULT_CONTEXT)


def bytes_per_token(model: Any) -> int:
    """Return the bytes of the keys and values of one token, from the configuration of a language model."""
    text = model.config.get_text_config()
    num_heads = getattr(text, "num_attention_heads", 1)
    width = getattr(text, "head_dim", None) or text.hidden_size // num_heads
    heads = getattr(text, "num_key_value_heads", None) or num_heads
    return 2 * int(text.num_hidden_layers * heads * width * model.dtype.itemsize)


def quarter_of_free_memory(model: Any) -> int:
    """Return a quarter of the free memory, in bytes, on a model's device."""
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
        return int(free) // 4
    return available_memory() // 4


class LayerBuffers:
    """Buffers of keys and values [rows, H, length, D] for each layer."""

    def __init__(self, *, max_rows: int, max_length: int, max_bytes: float = float("inf")) -> None:
        """Create empty buffers.

        Growth by doubling stops at `max_rows`, `max_length` and `max_bytes`; explicit requests do not.
        """
        self.max_rows = max_rows
        self.max_bytes = max_bytes
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

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        return sum(buffer.numel() * buffer.element_size() for buffer in (*self.keys, *self.values))

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in all layers; 0 before `shape_like`."""
        sizes = (buffer.shape[1] * buffer.shape[3] * buffer.element_size() for buffer in (*self.keys, *self.values))
        return sum(sizes)

    def tokens(self, row: int, start: int, stop: int) -> KeyValues:
        """Return some tokens of a row as views."""
        rows = slice(row, row + 1)
        return KeyValues(
            [buffer[rows, :, start:stop] for buffer in self.keys],
            [buffer[rows, :, start:stop] for buffer in self.values],
        )

    def shape_like(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Set heads, width and dtype from [1, H, T, D] of each layer."""
        if not self.keys:
            self.keys = [states.new_empty(0, states.shape[1], 0, states.shape[3]) for states in keys]
            self.values = [states.new_empty(0, states.shape[1], 0, states.shape[3]) for states in values]

    def reserve(self, num_rows: int, length: int) -> None:
        """Make room for `num_rows` rows of `length` tokens, which must hold all that is kept.

        Growth doubles rows and tokens, unless that exceeds `max_bytes`; far more than what is needed is released.
        """
        rows, _, tokens, _ = self.keys[0].shape
        needed = num_rows * length * self.bytes_per_token
        if rows >= num_rows and tokens >= length and not self._is_excessive(rows * tokens, num_rows * length):
            return
        more_rows = rows if rows >= num_rows else max(num_rows, min(2 * rows, self.max_rows))
        more_tokens = tokens if tokens >= length else max(length, min(max(2 * tokens, FIRST_LENGTH), self.max_length))
        size = more_rows * more_tokens * self.bytes_per_token
        if size > max(needed, self.max_bytes) or self._is_excessive(more_rows * more_tokens, num_rows * length):
            more_rows, more_tokens = num_rows, length
        self.fit(more_rows, more_tokens)

    def fit(self, num_rows: int, length: int) -> None:
        """Release all memory but `num_rows` rows of `length` tokens."""
        for kept in (self.keys, self.values):
            for layer, buffer in enumerate(kept):
                kept[layer] = _resized(buffer, num_rows, length)

    def _is_excessive(self, num_tokens: int, needed: int) -> bool:
        return num_tokens > EXCESS * needed and num_tokens * self.bytes_per_token > KEPT_BYTES

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
        """Return views of some rows' first tokens: keys [rows * H, D, length], values [rows * H, length, D]."""
        # Rows and heads are adjacent in memory. One call each instead of slices, a merge and a transposition.
        keys, values = self.keys[layer], self.values[layer]
        _, heads, room, width = keys.shape
        of_values = values.shape[-1]
        start, num = rows.start * heads * room, (rows.stop - rows.start) * heads
        return (
            keys.as_strided((num, width, length), (room * width, 1, width), start * width),
            values.as_strided((num, length, of_values), (room * of_values, of_values, 1), start * of_values),
        )

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


def _resized(buffer: Tensor, num_rows: int, length: int) -> Tensor:
    rows, heads, tokens, width = buffer.shape
    if (rows, tokens) == (num_rows, length):
        return buffer
    # Zeros, because masked values must be finite.
    resized = buffer.new_zeros(num_rows, heads, length, width)
    rows, tokens = min(rows, num_rows), min(tokens, length)
    resized[:rows, :, :tokens] = buffer[:rows, :, :tokens]
    return resized
