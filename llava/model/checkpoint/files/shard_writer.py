"""Write tensors into sharded weight files, one at a time, without holding a whole shard in memory.

    ShardWriter(folder)   --> shards and their index      moved into place at the end

A `.bin` file has the format that torch has written since 1.6:

    archive/data/0, archive/data/1, ...    bytes of the tensors, in the order they are added
    archive/data.pkl                       names, dtypes and shapes of all, at the end

Its description is a pickle program of the few instructions that `pickle_program` reads, and nothing else.
"""

# The writers of safetensors, huggingface_hub and torch need all tensors of a shard at once. Measured with 640 MiB of
# tensors that are computed one by one: 84 MiB above the start here, 642 (safetensors 0.8), 684 (huggingface_hub 2.4)
# and 641 (torch 2.13) with theirs, at the same speed; a shard has 5 GB.

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from llava.errors import CheckpointError
from llava.model.checkpoint.files.shards import INDEX_SUFFIX, SAFE_DTYPES, WEIGHT_FILE_PATTERN
from llava.model.torch_files.pickle_program import ORDERED_DICT, REBUILD_TENSOR, STORAGE_DTYPES
from llava.utils.provenance import tensor_bytes

if TYPE_CHECKING:
    from torch import Tensor


SAFE_NAMES = {dtype: name for name, dtype in SAFE_DTYPES.items()}

STREAM_FROM_BYTES = 32 * 2**20
"""Size from which a shard is written incrementally; a smaller one is written at once, with an exact header."""

HEADER_ROOM_BYTES = 256 * 2**10
"""Bytes reserved for the header of a shard that is written incrementally (padded with spaces, as the format allows)."""


class SafeShard:
    """Writer of one safetensors file; a small file is held in memory, a larger one written incrementally."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._header: dict[str, Any] = {}
        self._end = 0
        self._held: list[Tensor] = []
        self._stream: Any = None
        self._header_bytes = 64  # estimate, to detect when the reserved room is used up
        self._room = HEADER_ROOM_BYTES

    def has_room(self, name: str, tensor: Tensor) -> bool:
        """Return whether the header has room for one more tensor."""
        return self._header_bytes + _described_bytes(name, tensor) <= self._room

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor; once the shard is large, tensors are written immediately."""
        start, self._end = self._end, self._end + tensor.numel() * tensor.element_size()
        dtype = SAFE_NAMES[str(tensor.dtype).removeprefix("torch.")]
        self._header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, self._end]}
        self._header_bytes += _described_bytes(name, tensor)
        if self._stream is not None:
            self._stream.write(tensor_bytes(tensor))
            return
        self._held.append(tensor)
        if self._end >= STREAM_FROM_BYTES:
            self._start(max(self._room, -(-self._header_bytes // 8) * 8))  # one tensor's name alone may be longer

    def _start(self, header_bytes: int) -> None:
        self._room = header_bytes
        self._stream = self.file.open("wb")
        self._stream.write(struct.pack("<Q", header_bytes) + b" " * header_bytes)
        for tensor in self._held:
            self._stream.write(tensor_bytes(tensor))
        self._held = []

    def finish(self) -> None:
        """Write the tensors that are held, and the header.

        Raises:
            CheckpointError: the header does not fit before the tensors.
        """
        text = json.dumps({"__metadata__": {"format": "pt"}, **self._header}, separators=(",", ":")).encode()
        if self._stream is None:
            self._start(-(-len(text) // 8) * 8)
        if len(text) > self._room:
            raise CheckpointError(
                f"{self.file}: the header has {len(text)} bytes and room for {self._room}; use shorter tensor names"
            )
        self._stream.seek(8)
        self._stream.write(text)
        self._stream.close()

    def drop(self) -> None:
        """Release tensors and file."""
        self._held = []
        if self._stream is not None:
            self._stream.close()


def _described_bytes(name: str, tensor: Tensor) -> int:
    """Return an upper bound of the bytes that one tensor needs in a header."""
    return len(json.dumps(name)) + 100 + 12 * tensor.dim()


STORAGES = {dtype: name for name, dtype in STORAGE_DTYPES.items()}
ARCHIVE = "archive"
FORMAT_VERSION = b"3\n"

ALIGNMENT = 64
"""A tensor's bytes start at a multiple of this, as torch writes them, so that they can be used memory-mapped."""

PADDING = struct.Struct("<HH")
PADDING_ID = int.from_bytes(b"FB", "little")
"""Extra field of the zip format that torch defines: filled with spaces up to the alignment."""

WIDE_BYTES = 2**30
"""Members of at least this size get 8-byte sizes in their headers."""

LARGEST_INT32 = 2**31 - 1


class BinShard:
    """Writer of one `.bin` file; every tensor is written when it is added."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._stored: dict[str, _Stored] = {}
        self._archive: zipfile.ZipFile | None = None

    def has_room(self, name: str, tensor: Tensor) -> bool:
        """Return True: the description is written at the end, and may be of any size."""
        return True

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor.

        Raises:
            CheckpointError: the format does not support its dtype.
        """
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in STORAGES:
            raise CheckpointError(f"a .bin file cannot hold {name}, which is {dtype}; write safetensors")
        key = str(len(self._stored))
        self._stored[name] = _Stored(STORAGES[dtype], key, tuple(tensor.shape))
        self._write(f"data/{key}", tensor_bytes(tensor))

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
    """Written tensor: the format's name of its dtype, the member that holds it, its shape."""

    storage: str
    key: str
    shape: tuple[int, ...]


def _describe(stored: Mapping[str, _Stored]) -> bytes:
    """Return the pickle program of a table of tensors, as torch's reader expects it."""
    entries = b"".join(_text(name) + _tensor(tensor) for name, tensor in stored.items())
    return b"\x80\x02" + b"}(" + entries + b"u."


def _tensor(tensor: _Stored) -> bytes:
    """Return the instructions for Rebuild(storage, offset, shape, strides, needs no gradient, no hooks)."""
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
    """Return the instruction for a module and a name in it, given as two words."""
    return b"c" + value.replace(" ", "\n").encode() + b"\n"


def _integer(value: int) -> bytes:
    if value <= LARGEST_INT32:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _integers(values: Iterable[int]) -> bytes:
    return _tuple([_integer(value) for value in values])


def _tuple(items: Iterable[bytes]) -> bytes:
    return b"(" + b"".join(items) + b"t"


DEFAULT_SHARD_BYTES = 5 * 10**9


class ShardWriter:
    """Writer of tensors into shards as they are added; the folder changes only when `close` succeeds.

    Use it in a `with` block: after an error inside, nothing is left. Older weight files of the folder are replaced.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        safe: bool = True,
        name: str | None = None,
    ) -> None:
        """Start writing.

        Args:
            folder: created if needed.
            max_shard_bytes: a shard is closed before it grows beyond this; a larger tensor gets its own shard.
            safe: safetensors; False writes `.bin` files.
            name: stem of the files; `model` or `pytorch_model` by default.
        """
        self.folder = Path(folder)
        self.max_shard_bytes = max_shard_bytes
        self.safe = safe
        self.suffix = ".safetensors" if safe else ".bin"
        self.stem = name or ("model" if safe else "pytorch_model")
        self._shards: list[SafeShard | BinShard] = []
        self._places: dict[str, int] = {}
        self._num_bytes = 0
        self._open_bytes = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        self._temporary = Path(tempfile.mkdtemp(dir=self.folder, prefix=".saving-"))

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; it must not change afterwards, since it may be held until its shard is complete.

        Raises:
            CheckpointError: the name was added before.
        """
        if name in self._places:
            raise CheckpointError(f"tensor {name!r} was added twice; expected each name once")
        num_bytes = tensor.numel() * tensor.element_size()
        current = self._shards[-1] if self._shards else None
        if current is None or self._open_bytes + num_bytes > self.max_shard_bytes or not current.has_room(name, tensor):
            if current is not None:
                current.finish()
            number = len(self._shards)
            file = self._temporary / f"{number}{self.suffix}"
            current = SafeShard(file) if self.safe else BinShard(file)
            self._shards.append(current)
            self._open_bytes = 0
        current.add(name, tensor.detach())
        self._places[name] = len(self._shards) - 1
        self._open_bytes += num_bytes
        self._num_bytes += num_bytes

    def close(self) -> None:
        """Finish the last shard, write the index if there are several, and move everything into place."""
        try:
            if not self._shards:
                self._shards.append((SafeShard if self.safe else BinShard)(self._temporary / f"0{self.suffix}"))
            self._shards[-1].finish()
            names = self._final_names()
            if len(names) > 1:
                index = {
                    "metadata": {"total_size": self._num_bytes},
                    "weight_map": {name: names[shard] for name, shard in self._places.items()},
                }
                text = json.dumps(index, indent=2) + "\n"
                (self._temporary / "index").write_text(text, encoding="utf-8")
            for shard, name in zip(self._shards, names, strict=True):
                os.replace(shard.file, self.folder / name)
            if len(names) > 1:
                names.append(f"{self.stem}{self.suffix}{INDEX_SUFFIX}")
                os.replace(self._temporary / "index", self.folder / names[-1])
            self._drop_older(set(names))
        finally:
            self.abort()

    def _final_names(self) -> list[str]:
        total = len(self._shards)
        if total == 1:
            return [self.stem + self.suffix]
        return [f"{self.stem}-{number + 1:05d}-of-{total:05d}{self.suffix}" for number in range(total)]

    def _drop_older(self, new: set[str]) -> None:
        """Remove older weights of another sharding or format, which a reader would find first or mix in."""
        if self.stem not in ("model", "pytorch_model"):
            return
        for file in list(self.folder.iterdir()):
            if WEIGHT_FILE_PATTERN.fullmatch(file.name) and file.name not in new:
                file.unlink()

    def abort(self) -> None:
        """Remove everything that was written under temporary names."""
        for shard in self._shards:
            shard.drop()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()
