"""One `.bin` file while it is written: the layout that torch has written since 1.6, tensor by tensor.

    archive/data/0, archive/data/1, ...    bytes of the tensors, as they come
    archive/data.pkl                       names, dtypes and shapes of all, at the end

torch's own writer wants every tensor at once and so holds a whole shard; this one holds none. The description is a
pickle program of the few instructions that `bin_header` reads. Nothing else can come into it.
"""

from __future__ import annotations

import struct
import sys
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llava.errors import CheckpointError
from llava.model.checkpoint.files.torch_zip import ORDERED_DICT, REBUILD_TENSOR, STORAGE_DTYPES
from llava.model.shard_files import flat_bytes

if TYPE_CHECKING:
    from torch import Tensor

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
