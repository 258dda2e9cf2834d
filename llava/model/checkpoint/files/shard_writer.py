"""One `.bin` file while it is written: the layout that torch has written since 1.6, tensor by tensor.

    archive/data/0, archive/data/1, ...    bytes of the tensors, as they come
    archive/data.pkl                       names, dtypes and shapes of all, at the end

torch's own writer wants every tensor at once and so holds a whole shard; this one holds none. The description is a
pickle program of the few instructions that `bin_header` reads. Nothing else can come into it.
"""

from __future__ import annotations

import json
import struct
import sys
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llava.errors import CheckpointError
from llava.model.checkpoint.files.torch_zip import ORDERED_DICT, REBUILD_TENSOR, STORAGE_DTYPES

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


STORAGES = {dtype: name for name, dtype in STORAGE_DTYPES.items()}
ARCHIVE = "archive"
FORMAT_VERSION = b"3\n"

ALIGNMENT = 64
"""A tensor's bytes begin at a multiple of this, as torch writes them: they can be used where they are mapped."""

PADDING = struct.Struct("<HH")
PADDING_ID = int.from_bytes(b"FB", "little")
"""An extra field of the archive's format, of torch's own kind: filled with blanks up to the alignment."""

WIDE_BYTES = 2**30
"""Members this large get 8-byte sizes in their headers."""

LARGEST_INT32 = 2**31 - 1


class BinShard:
    """One `.bin` file; every tensor is written when it comes."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._stored: dict[str, _Stored] = {}
        self._archive: zipfile.ZipFile | None = None

    def has_room(self, name: str, tensor: Tensor) -> bool:
        """Always."""
        return True

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor.

        Raises:
            CheckpointError: the format has no place for its dtype.
        """
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in STORAGES:
            raise CheckpointError(f"a .bin file has no place for {name}, which is {dtype}; write safetensors")
        key = str(len(self._stored))
        self._stored[name] = _Stored(STORAGES[dtype], key, tuple(tensor.shape))
        self._write(f"data/{key}", flat_bytes(tensor))

    def _write(self, name: str, content: bytes | memoryview) -> None:
        """Write one member of the archive, its content aligned."""
        if self._archive is None:
            self._archive = zipfile.ZipFile(self.file, "w", zipfile.ZIP_STORED)
        member = zipfile.ZipInfo(f"{ARCHIVE}/{name}")
        member.CRC = 0
        is_wide = len(content) > WIDE_BYTES
        header = len(member.FileHeader(is_wide)) + PADDING.size
        room = -(self._archive.start_dir + header) % ALIGNMENT
        member.extra = PADDING.pack(PADDING_ID, room) + b" " * room
        with self._archive.open(member, "w", force_zip64=is_wide) as stream:
            stream.write(content)

    def finish(self) -> None:
        """Write the description, and close the file."""
        self._write("data.pkl", _describe(self._stored))
        self._write("byteorder", sys.byteorder.encode())
        self._write("version", FORMAT_VERSION)
        self.drop()

    def drop(self) -> None:
        """Close the file."""
        if self._archive is not None:
            self._archive.close()
            self._archive = None


@dataclass(frozen=True, slots=True)
class _Stored:
    """A written tensor: the format's word for its dtype, the member that holds it, its shape."""

    storage: str
    key: str
    shape: tuple[int, ...]


def _describe(stored: Mapping[str, _Stored]) -> bytes:
    """A table of tensors as torch's reader wants it."""
    entries = b"".join(_text(name) + _tensor(tensor) for name, tensor in stored.items())
    return b"\x80\x02" + b"}(" + entries + b"u."


def _tensor(tensor: _Stored) -> bytes:
    """Rebuild(storage, offset, shape, strides, needs no gradient, no hooks)."""
    strides: list[int] = []
    size = 1
    for width in reversed(tensor.shape):
        strides.insert(0, size)
        size *= width
    storage = _tuple([_text("storage"), _name(tensor.storage), _text(tensor.key), _text("cpu"), _integer(size)]) + b"Q"
    hooks = _name(ORDERED_DICT) + b")R"
    arguments = [storage, _integer(0), _integers(tensor.shape), _integers(strides), b"\x89", hooks]
    return _name(REBUILD_TENSOR) + _tuple(arguments) + b"R"


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _name(value: str) -> bytes:
    """A module and a name in it, which are two words here."""
    return b"c" + value.replace(" ", "\n").encode() + b"\n"


def _integer(value: int) -> bytes:
    if value <= LARGEST_INT32:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _integers(values: Iterable[int]) -> bytes:
    return _tuple([_integer(value) for value in values])


def _tuple(items: Iterable[bytes]) -> bytes:
    return b"(" + b"".join(items) + b"t"
