"""Read names, shapes and dtypes of a torch `.bin` file without torch and without running its pickle.

A `.bin` file is a zip archive: `NAME/data.pkl` describes the tensors, `NAME/data/KEY` holds the bytes of one storage.
The description is a pickle program. It is interpreted instruction by instruction on inert values: a name outside
`KNOWN` stops it before anything is called.
"""

from __future__ import annotations

import math
import pickletools
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from llava.errors import CheckpointError

STORAGE_DTYPES = {
    "torch DoubleStorage": "float64",
    "torch FloatStorage": "float32",
    "torch HalfStorage": "float16",
    "torch BFloat16Storage": "bfloat16",
    "torch LongStorage": "int64",
    "torch IntStorage": "int32",
    "torch ShortStorage": "int16",
    "torch CharStorage": "int8",
    "torch ByteStorage": "uint8",
    "torch BoolStorage": "bool",
}
ITEM_SIZES = {
    **{"float64": 8, "int64": 8, "uint64": 8, "float32": 4, "int32": 4, "uint32": 4},
    **{"float16": 2, "bfloat16": 2, "int16": 2, "uint16": 2, "int8": 1, "uint8": 1, "bool": 1},
    **{"float8_e4m3fn": 1, "float8_e5m2": 1, "complex64": 8},
}
REBUILD_TENSOR = "torch._utils _rebuild_tensor_v2"
REBUILD_PARAMETER = "torch._utils _rebuild_parameter"
ORDERED_DICT = "collections OrderedDict"
KNOWN = frozenset({REBUILD_TENSOR, REBUILD_PARAMETER, ORDERED_DICT, "torch Size", *STORAGE_DTYPES})


@dataclass(frozen=True, slots=True)
class Global:
    """Name that the program imports; it is never imported here."""

    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """Type and key of a storage in the archive."""

    dtype: str
    key: str


@dataclass(frozen=True, slots=True)
class BinTensor:
    """Description of a tensor of a `.bin` file.

    Attributes:
        shape: shape of the tensor.
        dtype: torch's name of the dtype.
        storage_key: member of the archive that holds it.
        num_elements_needed: elements its storage must hold, from the first to the last one the tensor uses.
        start: offset of its first byte in the file, if its bytes are contiguous and in row order; else None.
    """

    shape: tuple[int, ...]
    dtype: str
    storage_key: str
    num_elements_needed: int
    start: int | None = None


MARK = object()

MAX_DESCRIPTION_BYTES = 100_000_000
"""Same limit as in the safetensors format; a compressed archive can claim any size."""

UNREADABLE_ARCHIVE = (zipfile.BadZipFile, zlib.error, NotImplementedError, OSError, EOFError, struct.error)
"""Exceptions for a file that is not a zip archive, damaged, or compressed in an unsupported way."""


class _Walk:
    """Stack and memo of a pickle program."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def pop_to_mark(self) -> list[Any]:
        """Remove all values above the last mark, and the mark; return the values."""
        for position in range(len(self.stack) - 1, -1, -1):
            if self.stack[position] is MARK:
                values = self.stack[position + 1 :]
                del self.stack[position:]
                return values
        raise IndexError("no mark")

    def known(self, name: str) -> Global:
        """Return a name that the format needs.

        Raises:
            CheckpointError: any other name: code, which is neither imported nor run.
        """
        if name not in KNOWN:
            raise CheckpointError(
                f"{self.file} imports {name.replace(' ', '.')}, so it holds code, not only tensors, and was not "
                "loaded; expected a state dictionary (save it again as safetensors where it was created)"
            )
        return Global(name)

    def reduce(self) -> None:
        """Interpret a call, which a real unpickler would execute; nothing is called."""
        arguments, function = self.stack.pop(), self.stack.pop()
        name = getattr(function, "name", None)
        if name == ORDERED_DICT:
            self.stack.append(dict(arguments[0]) if arguments else {})
        elif name == REBUILD_TENSOR:
            storage, offset, shape, strides = arguments[:4]
            last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
            needed = 0 if 0 in shape else offset + last + 1
            start = offset * ITEM_SIZES[storage.dtype] if tuple(strides) == row_strides(shape) else None
            self.stack.append(BinTensor(tuple(shape), storage.dtype, storage.key, needed, start))
        elif name == REBUILD_PARAMETER:
            self.stack.append(arguments[0])
        elif name == "torch Size":
            self.stack.append(tuple(arguments[0]))
        else:
            raise ValueError(f"a call of {name or type(function).__name__}")

    def persistent(self) -> None:
        """Interpret a storage: ("storage", type, key, device, number of elements)."""
        kind, storage_type, key = self.stack.pop()[:3]
        if kind != "storage" or getattr(storage_type, "name", None) not in STORAGE_DTYPES:
            raise ValueError("a persistent value that is not a storage of a known type")
        self.stack.append(Storage(STORAGE_DTYPES[storage_type.name], key))

    def set_items(self, values: list[Any]) -> None:
        """Put keys and values into the table on top of the stack."""
        self.stack[-1].update(zip(values[::2], values[1::2], strict=True))

    def tuple_of(self, count: int) -> None:
        """Replace the last `count` values by a tuple of them."""
        values = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        self.stack.append(values)


def _append(walk: _Walk, values: list[Any]) -> None:
    walk.stack[-1].extend(values)


def _build(walk: _Walk) -> None:
    """Ignore attributes of a table (torch stores module versions there)."""
    walk.stack.pop()
    if not isinstance(walk.stack[-1], dict):
        raise ValueError("a state for something that is not a table")


def _stack_global(walk: _Walk) -> None:
    name, module = walk.stack.pop(), walk.stack.pop()
    walk.stack.append(walk.known(f"{module} {name}"))


CONSTANTS: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "MARK": lambda: MARK,
}
TEXTS = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES")
VALUES = frozenset((*TEXTS, "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"))
ACTIONS: dict[str, Callable[[_Walk], None]] = {
    "TUPLE": lambda walk: walk.stack.append(tuple(walk.pop_to_mark())),
    "TUPLE1": lambda walk: walk.tuple_of(1),
    "TUPLE2": lambda walk: walk.tuple_of(2),
    "TUPLE3": lambda walk: walk.tuple_of(3),
    "REDUCE": _Walk.reduce,
    "BINPERSID": _Walk.persistent,
    "STACK_GLOBAL": _stack_global,
    "SETITEMS": lambda walk: walk.set_items(walk.pop_to_mark()),
    "SETITEM": lambda walk: walk.set_items([walk.stack.pop(-2), walk.stack.pop()]),
    "APPENDS": lambda walk: _append(walk, walk.pop_to_mark()),
    "APPEND": lambda walk: _append(walk, [walk.stack.pop()]),
    "BUILD": _build,
    "PROTO": lambda walk: None,
    "FRAME": lambda walk: None,
    "STOP": lambda walk: None,
}


def _step(walk: _Walk, name: str, argument: Any) -> None:
    """Execute one instruction."""
    if name in VALUES:
        walk.stack.append(argument)
    elif name in CONSTANTS:
        walk.stack.append(CONSTANTS[name]())
    elif name in ("BINPUT", "LONG_BINPUT"):
        walk.memo[argument] = walk.stack[-1]
    elif name == "MEMOIZE":
        walk.memo[len(walk.memo)] = walk.stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
        walk.stack.append(walk.memo[argument])
    elif name == "GLOBAL":
        walk.stack.append(walk.known(argument))
    elif name in ACTIONS:
        ACTIONS[name](walk)
    else:
        raise ValueError(f"the instruction {name}")


def row_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a tensor that is contiguous in row order."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def read_bin_header(file: Path) -> dict[str, BinTensor]:
    """Describe every tensor of a `.bin` (`.pt`, `.pth`) file; no weight is read.

    Raises:
        CheckpointError: the file is truncated, older than torch 1.6, holds code, or is not a table of tensors.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = {info.filename: info for info in archive.infolist()}
            program = next((name for name in members if name.endswith("/data.pkl")), None)
            if program is None:
                raise CheckpointError(f"{file} is a zip archive without tensors; expected a file written by torch.save")
            if members[program].file_size > MAX_DESCRIPTION_BYTES:
                raise CheckpointError(
                    f"{file} describes its tensors in {members[program].file_size} bytes and was not unpacked; "
                    f"expected at most {MAX_DESCRIPTION_BYTES}"
                )
            tensors = _tensors(file, _walk(file, archive.read(program)))
            storages = {
                tensor.storage_key: members.get(program.replace("data.pkl", f"data/{tensor.storage_key}"))
                for tensor in tensors.values()
            }
            order = program.replace("data.pkl", "byteorder")
            is_swapped = order in members and archive.read(order).strip() != sys.byteorder.encode()
            starts = {} if is_swapped else _starts(file, storages)
    except UNREADABLE_ARCHIVE as error:
        raise CheckpointError(
            f"{file} cannot be read as a torch file ({error}); it is truncated, or older than torch 1.6"
        ) from error
    for name, tensor in tensors.items():
        member = storages[tensor.storage_key]
        needed = tensor.num_elements_needed * ITEM_SIZES[tensor.dtype]
        if member is None or member.file_size < needed:
            stored = 0 if member is None else member.file_size
            raise CheckpointError(f"{file}: {name} needs {needed} bytes, the file holds {stored}; it is truncated")
    return {name: _placed(tensor, starts.get(tensor.storage_key)) for name, tensor in tensors.items()}


LOCAL_HEADER = struct.Struct("<4s22xHH")
LOCAL_HEADER_MARK = b"PK\x03\x04"


def _starts(file: Path, storages: Mapping[str, zipfile.ZipInfo | None]) -> dict[str, int]:
    """Return the offset of each storage in the file, except compressed and truncated ones."""
    starts: dict[str, int] = {}
    size = file.stat().st_size
    with file.open("rb") as stream:
        for key, member in storages.items():
            if member is None or member.compress_type != zipfile.ZIP_STORED:
                continue
            stream.seek(member.header_offset)
            mark, name_bytes, extra_bytes = LOCAL_HEADER.unpack(stream.read(LOCAL_HEADER.size))
            start = member.header_offset + LOCAL_HEADER.size + name_bytes + extra_bytes
            if mark == LOCAL_HEADER_MARK and start + member.file_size <= size:
                starts[key] = start
    return starts


def _placed(tensor: BinTensor, start: int | None) -> BinTensor:
    """Return the tensor with its offset in the file instead of in its storage."""
    known = start is not None and tensor.start is not None
    return replace(tensor, start=cast(int, start) + cast(int, tensor.start) if known else None)


def _walk(file: Path, program: bytes) -> Any:
    walk = _Walk(file)
    try:
        for opcode, argument, _ in pickletools.genops(program):
            _step(walk, opcode.name, argument)
        return walk.stack.pop()
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} holds more than tensors and was not loaded ({error}); expected a state dictionary"
        ) from error


def _tensors(file: Path, table: Any) -> dict[str, BinTensor]:
    """Return the tensors of a table, or of the table that a training checkpoint has under `state_dict`."""
    if isinstance(table, dict) and isinstance(table.get("state_dict"), dict):
        table = table["state_dict"]
    if not isinstance(table, dict) or not all(isinstance(value, BinTensor) for value in table.values()):
        raise CheckpointError(f"{file} holds no table of tensors; expected a state dictionary")
    return {str(name): value for name, value in table.items()}
