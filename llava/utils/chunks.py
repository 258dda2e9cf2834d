"""How a list of questions is divided between processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from llava.errors import ConfigError

T = TypeVar("T")


def chunk(items: Sequence[T], num_chunks: int, index: int) -> list[T]:
    """Return part `index` of `num_chunks` consecutive parts of ceil(n / num_chunks) items each.

    The last parts may be short or empty (9 items in 8 parts fill five of them); joined in order, the parts are `items`.

    Raises:
        ConfigError: `num_chunks` is below 1, or `index` names no part.
    """
    if num_chunks < 1:
        raise ConfigError(f"the number of chunks must be at least 1, got {num_chunks}")
    if not 0 <= index < num_chunks:
        raise ConfigError(f"the chunk index must be between 0 and {num_chunks - 1}, got {index}")
    size = -(-len(items) // num_chunks)
    return list(items[index * size : (index + 1) * size])
