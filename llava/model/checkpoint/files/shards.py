"""List and read the weight files of a folder, tensor by tensor.

    list_tensors(folder)  --> {name: TensorEntry}     headers only, without importing torch
    open_tensors(folder)  --> TensorReader            memory-mapped; a tensor uses memory only while it is referenced

Formats: `model.safetensors`, `pytorch_model.bin`, and the sharded form of either with its index file.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from llava.errors import CheckpointError
from llava.model.checkpoint.files.torch_zip import read_bin_header
from llava.model.torch_files.pickle_program import ITEM_SIZES, MAX_DIMENSIONS, MAX_SIZE, checked_name, shown

if TYPE_CHECKING:
    from torch import Tensor


SAFE_DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8"},
    **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "complex64"},
}


SAFE_FILE = "model.safetensors"
BIN_FILE = "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"
WEIGHT_SOURCES = (SAFE_FILE, SAFE_FILE + INDEX_SUFFIX, BIN_FILE, BIN_FILE + INDEX_SUFFIX)
"""Files in which a folder's weights are looked for, in transformers' order."""

WEIGHT_FILE_PATTERN = re.compile(r"(model(-\d+-of-\d+)?\.safetensors|pytorch_model(-\d+-of-\d+)?\.bin)(\.index\.json)?")
MAX_HEADER_BYTES = 100_000_000
"""Limit of the safetensors format; a larger number is a broken file."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Name, type and place of a tensor in a checkpoint.

    Attributes:
        name: name in the file.
        shape: shape of the tensor.
        dtype: torch's name of the dtype, such as `float16`.
        file: file that contains it.
        num_bytes: size in bytes.
        start: offset of its first byte in the file, if its bytes are stored contiguously; else None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    num_bytes: int
    start: int | None = None


def find_weights(folder: str | Path) -> Path | None:
    """Return the weight file or index that a folder's model is read from, or None."""
    return next((Path(folder) / name for name in WEIGHT_SOURCES if (Path(folder) / name).is_file()), None)


def list_tensors(folder: str | Path) -> dict[str, TensorEntry]:
    """List every tensor of a model folder, or of one weight file, in file order; only headers are read.

    Raises:
        CheckpointError: the folder has no weights, a file is truncated or missing, or a `.bin` file holds code.
    """
    given = Path(folder)
    source = given if given.is_file() else find_weights(given)
    if source is None:
        found = ", ".join(sorted(file.name for file in given.iterdir())[:8]) if given.is_dir() else "no such folder"
        raise CheckpointError(f"{folder} has no weights; expected one of {', '.join(WEIGHT_SOURCES)}; found {found}")
    if not source.name.endswith(INDEX_SUFFIX):
        return _list_file(source)
    entries: dict[str, TensorEntry] = {}
    places = _read_index(source)
    for shard in sorted(set(places.values())):
        if not (source.parent / shard).is_file():
            raise CheckpointError(f"missing shard {source.parent / shard}, which {source.name} names; copy it there")
        for name, entry in _list_file(source.parent / shard).items():
            if name in entries:
                raise CheckpointError(
                    f"{name} is in two files, {entries[name].file} and {entry.file}; expected each tensor once. "
                    f"Remove leftovers of another save, or all but the shards of one {source.name}"
                )
            entries[name] = entry
    if absent := sorted(name for name, shard in places.items() if name not in entries or _file(entries, name) != shard):
        raise CheckpointError(f"{source} places {absent[0]} in {places[absent[0]]}, which does not hold it")
    return entries


def _file(entries: dict[str, TensorEntry], name: str) -> str:
    return entries[name].file.name


def _read_index(index: Path) -> dict[str, str]:
    """Return the shard of each tensor.

    Raises:
        CheckpointError: the index is broken, or names files outside its folder.
    """
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        plain = all(isinstance(shard, str) and Path(shard).name == shard for shard in places.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read as an index of shards: {error}") from error
    if not plain:
        raise CheckpointError(f"{index} names shards in other folders; expected file names in its own folder")
    return dict(places)


def _list_file(file: Path) -> dict[str, TensorEntry]:
    if file.suffix == ".safetensors":
        return _list_safetensors(file)
    return {
        name: TensorEntry(
            name,
            tensor.shape,
            tensor.dtype,
            file,
            math.prod(tensor.shape) * ITEM_SIZES[tensor.dtype],
            tensor.start,
        )
        for name, tensor in read_bin_header(file).items()
    }


def _list_safetensors(file: Path) -> dict[str, TensorEntry]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (header_bytes,) = struct.unpack("<Q", stream.read(8))
            if header_bytes > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"a header of {header_bytes} bytes in a file of {size}")
            header = json.loads(stream.read(header_bytes), object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        entries = {}
        end = 0
        for name, described in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = described["data_offsets"]
            dtype, shape = SAFE_DTYPES[described["dtype"]], tuple(described["shape"])
            if len(shape) > MAX_DIMENSIONS or not all(_is_size(number) for number in (start, stop, *shape)):
                raise ValueError(f"{shown(name)} of shape {shown(shape)}; expected whole numbers from 0")
            entries[name] = TensorEntry(name, shape, dtype, file, stop - start, 8 + header_bytes + start)
            if start != end or stop - start != math.prod(shape) * ITEM_SIZES[dtype]:
                raise ValueError(f"{shown(name)} {shown(shape)} at bytes {start} to {stop}")
            end = stop
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise CheckpointError(f"{file} is not a complete safetensors file: {shown(error)}") from error
    if 8 + header_bytes + end != size:
        raise CheckpointError(f"{file} is truncated: {size} bytes, expected {8 + header_bytes + end} by its header")
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        ValueError: a key is there twice, too long, or half of a surrogate pair.
    """
    for name, _ in pairs:
        checked_name(name)
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name twice in its header")
    return found


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number <= MAX_SIZE


class TensorReader:
    """Memory-mapped tensors of a checkpoint by name; pages are read on use and freed with the tensor."""

    def __init__(self, entries: dict[str, TensorEntry]) -> None:
        self.entries = entries
        self._files: dict[Path, Any] = {}
        self._mapped: dict[Path, Any] = {}

    @property
    def names(self) -> list[str]:
        """The names of all tensors, in file order."""
        return list(self.entries)

    def read(self, name: str) -> Tensor:
        """Return one tensor, which must not be modified.

        Raises:
            CheckpointError: the tensor does not exist, or the file cannot be read.
        """
        if name not in self.entries:
            raise CheckpointError(f"no tensor {name!r} of {len(self.entries)}; see `llava checkpoint inspect`")
        entry = self.entries[name]
        if entry.file.suffix != ".safetensors" and is_mappable(entry):
            if entry.file not in self._mapped:
                self._mapped[entry.file] = _map(entry.file)
            return _view(entry, self._mapped[entry.file], entry.shape)
        if entry.file not in self._files:
            self._files[entry.file] = _open(entry.file)
        content = self._files[entry.file]
        tensor: Tensor = content[name] if isinstance(content, dict) else content.get_tensor(name)
        return tensor.detach()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor with its name, in file order."""
        for name in self.entries:
            yield name, self.read(name)

    def close(self) -> None:
        """Release the files; tensors that are still referenced stay valid."""
        self._files.clear()
        self._mapped.clear()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self.close()


def _open(file: Path) -> Any:
    """Return a table of tensors (`.bin`) or an open safetensors file."""
    from safetensors import SafetensorError, safe_open

    from llava.model.torch_files.loading import load_torch_file

    if file.suffix != ".safetensors":
        content = load_torch_file(file, mmap=True)
        return content.get("state_dict", content) if isinstance(content, dict) else content
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error


def open_tensors(folder: str | Path) -> TensorReader:
    """Open the weights of a folder, or one weight file, for reading tensor by tensor.

    Raises:
        CheckpointError: see `list_tensors`.
    """
    return TensorReader(list_tensors(folder))


def read_with_room(entry: TensorEntry, num_rows: int) -> Tensor | None:
    """Return a table with room for more rows, without a copy: a private mapping of it and the next bytes.

    The new rows have arbitrary values and must be written; what is written stays in memory, the file never changes.

    Args:
        entry: a matrix.
        num_rows: number of all rows, including the new ones.

    Returns:
        None if the file does not hold the table contiguously, or ends too early after it.
    """
    num_bytes = entry.num_bytes // max(entry.shape[0], 1) * num_rows
    if not is_mappable(entry) or cast(int, entry.start) + num_bytes > entry.file.stat().st_size:
        return None
    return _view(entry, _map(entry.file), (num_rows, *entry.shape[1:]))


def is_mappable(entry: TensorEntry) -> bool:
    """Return whether a tensor's bytes are contiguous in its file, at an aligned offset."""
    return entry.start is not None and entry.start % ITEM_SIZES[entry.dtype] == 0


def _map(file: Path) -> Any:
    """Return a private mapping of a whole file: what is written into it stays in memory."""
    import torch

    return torch.UntypedStorage.from_file(str(file), shared=False, nbytes=file.stat().st_size)


def _view(entry: TensorEntry, mapped: Any, shape: Sequence[int]) -> Tensor:
    """Return the tensor of an entry, with this shape, in the mapping of its file."""
    import torch

    dtype: torch.dtype = getattr(torch, entry.dtype)
    start = cast(int, entry.start)
    storage: Any = mapped[start : start + math.prod(shape) * dtype.itemsize]
    return torch.empty(0, dtype=dtype).set_(storage).view(tuple(shape))
