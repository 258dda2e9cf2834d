"""One streamed row: its JSON object and the pictures that a shard holds beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llava.errors import DataError
from llava.utils.jsonl import NOT_JSON

Numbered = tuple[int, "StreamRow | DataError"]
"""The number of a row in its shard, and the row, or why it cannot be used."""


@dataclass(frozen=True, slots=True)
class StreamRow:
    """One row.

    Attributes:
        value: the JSON object; `image` is left out where the shard holds the pictures itself.
        pictures: file bytes of the pictures in their order; empty where `value` names files.
    """

    value: Mapping[str, Any]
    pictures: tuple[bytes, ...] = field(default=(), repr=False)


def row_of(text: bytes, pictures: tuple[bytes, ...] = ()) -> StreamRow | DataError:
    """Return the row of a JSON text, or what is wrong with the text."""
    try:
        value = json.loads(text)
    except NOT_JSON as error:
        return DataError(f"not JSON: {error}; expected one JSON object")
    if not isinstance(value, dict):
        return DataError(f"a row must be a JSON object, got {type(value).__name__}")
    return StreamRow({name: part for name, part in value.items() if not (pictures and name == "image")}, pictures)
