"""Attention of runs of new tokens, each on top of the keys and values that its own sequence holds.

row [1, T] = new tokens of extension 0 | of extension 1 | ...
each token attends to what its sequence held before, and to the new tokens up to itself
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.generation.prefix_cache import KeyValues
from llava.model.attention import MATMUL_PAIRS, matmul_attention


class Extension(Protocol):
    """New tokens of one sequence."""

    @property
    def length(self) -> int:
        """Number of new tokens."""
        ...

    @property
    def start(self) -> int:
        """Number of tokens before them, which is the position of the first."""
        ...

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values [H, n, D] of new tokens; return all [H, start + n, D] of the sequence."""
        ...


class ExtensionAttention:
    """`model.attention.KeyValueSlots` for one pass over extensions."""

    def __init__(self, extensions: Sequence[Extension]) -> None:
        """Attend in these extensions, in the order in which their tokens are in the row."""
        self.extensions = extensions
        self._stops = list(accumulate(extension.length for extension in extensions))
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def positions(self) -> Tensor:
        """Return the position [T] of each new token."""
        return torch.cat(
            [torch.arange(extension.start, extension.start + extension.length) for extension in self.extensions]
        )

    def last_places(self) -> Tensor:
        """Return the place [K] of the last token of each extension in the row."""
        return torch.tensor(self._stops) - 1

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None, window: int | None
    ) -> Tensor:
        """Attend to all earlier tokens of each sequence.

        Args:
            layer: index of the layer.
            query: [1, Hq, T, D]; key, value: [1, Hk, T, D], Hk divides Hq.
            scaling: factor of the scores; 1 / sqrt(D) when None.
            window: only tokens less than this many positions away are visible.

        Returns:
            [1, T, Hq, D].
        """
        outputs = []
        for number, (extension, stop) in enumerate(zip(self.extensions, self._stops, strict=True)):
            new = slice(stop - extension.length, stop)
            keys, values = extension.extend(layer, key[0, :, new], value[0, :, new])
            mask = self._mask(number, window, query.device)
            outputs.append(_attend(query[:, :, new], keys[None], values[None], mask, scaling))
        return torch.cat(outputs, dim=2).transpose(1, 2)

    def _mask(self, number: int, window: int | None, device: torch.device) -> Tensor:
        """Return whether each new token of a extension [n, 1] sees each token of its sequence [1, start + n]."""
        if (number, window) not in self._masks:
            extension = self.extensions[number]
            columns = torch.arange(extension.start + extension.length, device=device)
            own = columns[extension.start :, None]
            sees = columns <= own
            self._masks[number, window] = sees if window is None else sees & (columns > own - window)
        return self._masks[number, window]


def _attend(query: Tensor, key: Tensor, value: Tensor, sees: Tensor, scaling: float | None) -> Tensor:
    """Return attention [1, Hq, n, D] of queries [1, Hq, n, D] to keys, values [1, Hk, m, D], mask [n, m]."""
    if sees.numel() <= MATMUL_PAIRS:
        bias = torch.where(sees, 0.0, -torch.inf).to(query.dtype)
        return matmul_attention(query, key, value, bias, scaling)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=sees, scale=scaling)


class PartsExtension:
    """New tokens on top of kept parts, for a sequence that has no slot yet; see `Extension`."""

    def __init__(self, parts: Sequence[KeyValues], start: int, length: int) -> None:
        """Read `length` tokens after the `start` tokens of consecutive parts."""
        self.parts = parts
        self.start = start
        self.length = length
        self._new = KeyValues([], [])

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store [H, n, D]; return those of the whole sequence [H, start + n, D]. Layers arrive in order."""
        self._new.keys.append(key[None])
        self._new.values.append(value[None])
        if not self.start:
            return key, value
        keys = torch.cat([*(part.keys[layer][0] for part in self.parts), key], dim=1)
        return keys, torch.cat([*(part.values[layer][0] for part in self.parts), value], dim=1)

    def states(self) -> KeyValues:
        """Return the keys and values of the new tokens."""
        return self._new.copied()
