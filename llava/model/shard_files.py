"""One safetensors file while it is written, tensor by tensor; see `bin_shard` for `.bin`."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llava.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

SAFE_DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8"},
    **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "complex64"},
}
SAFE_NAMES = {dtype: name for name, dtype in SAFE_DTYPES.items()}

STREAM_FROM_BYTES = 32 * 2**20
"""A shard this large is written as tensors come; a smaller one at once, with an exact header."""

HEADER_ROOM_BYTES = 256 * 2**10
"""Kept free for the header of a shard that is written as tensors come (padded with spaces, as the format allows)."""


class SafeShard:
    """One safetensors file: tensors are held while small, then written as they come behind a reserved header."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._header: dict[str, Any] = {}
        self._end = 0
        self._held: list[Tensor] = []
        self._stream: Any = None
        self._header_bytes = 64  # estimate, to see when the reserved room is used up
        self._room = HEADER_ROOM_BYTES

    def has_room(self, name: str, tensor: Tensor) -> bool:
        """Whether the header can describe one more tensor."""
        return self._header_bytes + _described_bytes(name, tensor) <= self._room

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; once the shard is large it is written at once."""
        start, self._end = self._end, self._end + tensor.numel() * tensor.element_size()
        dtype = SAFE_NAMES[str(tensor.dtype).removeprefix("torch.")]
        self._header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, self._end]}
        self._header_bytes += _described_bytes(name, tensor)
        if self._stream is not None:
            _write_tensor(self._stream, tensor)
            return
        self._held.append(tensor)
        if self._end >= STREAM_FROM_BYTES:
            self._start(max(self._room, -(-self._header_bytes // 8) * 8))  # one tensor's name alone may be longer

    def _start(self, header_bytes: int) -> None:
        self._room = header_bytes
        self._stream = self.file.open("wb")
        self._stream.write(struct.pack("<Q", header_bytes) + b" " * header_bytes)
        for tensor in self._held:
            _write_tensor(self._stream, tensor)
        self._held = []

    def finish(self) -> None:
        """Write what is held, and the header.

        Raises:
            CheckpointError: the header does not fit before the tensors.
        """
        text = json.dumps({"__metadata__": {"format": "pt"}, **self._header}, separators=(",", ":")).encode()
        if self._stream is None:
            self._start(-(-len(text) // 8) * 8)
        if len(text) > self._room:
            raise CheckpointError(
                f"{self.file}: a header of {len(text)} bytes, room for {self._room}; give the tensors shorter names"
            )
        self._stream.seek(8)
        self._stream.write(text)
        self._stream.close()

    def drop(self) -> None:
        """Let go of tensors and file."""
        self._held = []
        if self._stream is not None:
            self._stream.close()


def _described_bytes(name: str, tensor: Tensor) -> int:
    """More than what one tensor takes in a header."""
    return len(json.dumps(name)) + 100 + 12 * tensor.dim()


def _write_tensor(stream: Any, tensor: Tensor) -> None:
    stream.write(flat_bytes(tensor))


def flat_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes without a copy in memory (but for one that is not contiguous or not on the CPU)."""
    import torch

    flat = tensor.cpu().contiguous().reshape(-1)
    return cast(memoryview, cast(Any, flat.view(torch.uint8).numpy()).data) if flat.numel() else memoryview(b"")
