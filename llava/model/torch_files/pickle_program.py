"""Interpreter of a torch file's pickle program on inert values; nothing is imported or called.

    program --pickletools--> instructions --Walk--> tables, numbers, text and `BinTensor`s, or ValueError

A real unpickler runs what the program names, and hashes and nests whatever it builds; this one does neither.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import IO, Any

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

MAX_INSTRUCTIONS = 1_000_000
"""About 35,000 tensors; the largest published files have a few thousand."""

MAX_DEPTH = 100
MAX_DIMENSIONS = 64
MAX_SIZE = 2**63 - 1
MAX_NAME_CHARS = 4096
SHOWN_CHARS = 80


class CodeError(Exception):
    """Name that a program imports and that no table of tensors needs."""


@dataclass(frozen=True, slots=True)
class Global:
    """Name that the program imports; it is never imported here."""

    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """Type, key and number of elements of a storage."""

    dtype: str
    key: str
    num_elements: int


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


class Opaque:
    """Result of a call that is not interpreted."""


MARK = object()


def shown(text: Any) -> str:
    """Return text of a file for a message: one line of visible characters, shortened."""
    visible = ascii(str(text)[: SHOWN_CHARS + 1])[1:-1]
    return visible if len(visible) <= SHOWN_CHARS else visible[:SHOWN_CHARS] + "..."


def row_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a tensor that is contiguous in row order."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def bin_tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> BinTensor:
    """Return the description of a tensor.

    Raises:
        ValueError: sizes are not whole numbers from 0, are too many, or need more than the storage holds.
    """
    if not (isinstance(storage, Storage) and isinstance(shape, tuple) and isinstance(strides, tuple)):
        raise ValueError("a tensor without storage, shape or strides")
    if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"a tensor of {len(shape)} sizes and {len(strides)} strides; at most {MAX_DIMENSIONS}")
    if not all(type(number) is int and 0 <= number <= MAX_SIZE for number in (offset, *shape, *strides)):
        raise ValueError(f"a tensor of shape {shown(shape)}; sizes, strides and offset are whole numbers from 0")
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    needed = offset if 0 in shape else offset + last + 1
    # A stride of 0 describes any number of elements by one of them; what is read would be as large as it claims.
    if max(needed, math.prod(shape)) > storage.num_elements:
        raise ValueError(
            f"a tensor of shape {shown(shape)} in a storage of {storage.num_elements} elements, which is too short"
        )
    start = offset * ITEM_SIZES[storage.dtype] if strides == row_strides(shape) else None
    return BinTensor(shape, storage.dtype, storage.key, needed, start)


class Walk:
    """Stack and memo of a pickle program.

    Args:
        only_tensors: reject names and values that a table of tensors does not need; False ignores them, and only
            checks the bounds.
    """

    def __init__(self, *, only_tensors: bool) -> None:
        self.only_tensors = only_tensors
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self._depths: dict[int, int] = {}
        self._containers: list[Any] = []  # keeps ids unique

    def nest(self, container: Any, values: Iterable[Any]) -> None:
        """Note that a container holds values.

        Raises:
            ValueError: they are nested too deep.
        """
        if id(container) not in self._depths:
            self._containers.append(container)
        deepest = max((self._depths.get(id(value), 0) for value in values), default=0)
        self._depths[id(container)] = max(self._depths.get(id(container), 1), deepest + 1)
        if deepest >= MAX_DEPTH:
            raise ValueError(f"values nested deeper than {MAX_DEPTH}")

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
            CodeError: any other name: code, which is neither imported nor run.
        """
        if self.only_tensors and name not in KNOWN:
            raise CodeError(shown(name.replace(" ", ".")))
        return Global(checked_name(name))

    def reduce(self) -> None:
        """Interpret a call, which a real unpickler would execute; nothing is called."""
        arguments, function = self.stack.pop(), self.stack.pop()
        name = getattr(function, "name", None)
        if name == ORDERED_DICT:
            table: dict[Any, Any] = {}
            self.stack.append(table)
            self.set_items([value for pair in (arguments[0] if arguments else ()) for value in _pair(pair)])
        elif name == REBUILD_TENSOR and (self.only_tensors or isinstance(arguments[0], Storage)):
            self.stack.append(bin_tensor(*arguments[:4]))
        elif name == REBUILD_PARAMETER:
            self.stack.append(arguments[0])
        elif name == "torch Size":
            self.stack.append(tuple(arguments[0]))
        elif self.only_tensors:
            raise ValueError(f"a call of {shown(name or type(function).__name__)}")
        else:
            self.stack.append(Opaque())

    def persistent(self) -> None:
        """Interpret a storage: ("storage", type, key, device, number of elements)."""
        kind, storage_type, key, _, num_elements = self.stack.pop()[:5]
        name = getattr(storage_type, "name", None)
        if kind != "storage" or (self.only_tensors and name not in STORAGE_DTYPES):
            raise ValueError("a persistent value that is not a storage of a known type")
        if not isinstance(key, str) or type(num_elements) is not int or not 0 <= num_elements <= MAX_SIZE:
            raise ValueError(f"a storage {shown(key)} of {shown(num_elements)} elements")
        if name not in STORAGE_DTYPES:
            self.stack.append(Opaque())
            return
        storage = Storage(STORAGE_DTYPES[name], checked_name(key), num_elements)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise ValueError(f"storage {shown(key)} described twice, differently")
        self.stack.append(storage)

    def set_items(self, values: list[Any]) -> None:
        """Put keys and values into the table on top of the stack.

        Raises:
            ValueError: a key is neither text nor a number, or is there already.
        """
        table = self.stack[-1]
        self.nest(table, values[1::2])
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, str) and type(key) is not int:  # an optimizer numbers its parameters
                raise ValueError(f"a key of type {type(key).__name__}; expected text")
            if isinstance(table, Opaque):
                continue
            if key in table:
                raise ValueError(f"the key {shown(key)} twice")
            table[checked_name(key) if isinstance(key, str) else key] = value

    def append(self, values: list[Any]) -> None:
        """Append values to the list on top of the stack."""
        self.nest(self.stack[-1], values)
        if not isinstance(self.stack[-1], Opaque):
            self.stack[-1].extend(values)

    def tuple_of(self, values: list[Any]) -> None:
        """Push a tuple of values."""
        made = tuple(values)
        self.nest(made, values)
        self.stack.append(made)

    def last(self, count: int) -> list[Any]:
        """Remove the last `count` values; return them."""
        values = self.stack[-count:]
        if len(values) < count or any(value is MARK for value in values):
            raise IndexError("too few values")
        del self.stack[-count:]
        return values

    def build(self) -> None:
        """Ignore attributes of a table (torch stores module versions there)."""
        self.last(1)
        if self.only_tensors and not isinstance(self.stack[-1], dict):
            raise ValueError("a state for something that is not a table")


def _pair(pair: Any) -> tuple[Any, Any]:
    key, value = pair
    return key, value


def checked_name(text: str) -> str:
    """Return the name of a tensor or of a storage.

    Raises:
        ValueError: it is too long, or half of a surrogate pair, which no output can show.
    """
    if len(text) > MAX_NAME_CHARS:
        raise ValueError(f"a name of {len(text)} characters; at most {MAX_NAME_CHARS}")
    text.encode("utf-8")
    return text


def _stack_global(walk: Walk) -> None:
    module, name = walk.last(2)
    walk.stack.append(walk.known(f"{module} {name}"))


def _new_object(walk: Walk) -> None:
    walk.last(2)
    walk.stack.append(Opaque())


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
ACTIONS: dict[str, Callable[[Walk], None]] = {
    "TUPLE": lambda walk: walk.tuple_of(walk.pop_to_mark()),
    "TUPLE1": lambda walk: walk.tuple_of(walk.last(1)),
    "TUPLE2": lambda walk: walk.tuple_of(walk.last(2)),
    "TUPLE3": lambda walk: walk.tuple_of(walk.last(3)),
    "REDUCE": Walk.reduce,
    "BINPERSID": Walk.persistent,
    "STACK_GLOBAL": _stack_global,
    "SETITEMS": lambda walk: walk.set_items(walk.pop_to_mark()),
    "SETITEM": lambda walk: walk.set_items(walk.last(2)),
    "APPENDS": lambda walk: walk.append(walk.pop_to_mark()),
    "APPEND": lambda walk: walk.append(walk.last(1)),
    "BUILD": Walk.build,
    "PROTO": lambda walk: None,
    "FRAME": lambda walk: None,
    "STOP": lambda walk: None,
}
OTHER_ACTIONS: dict[str, Callable[[Walk], None]] = {
    "NEWOBJ": _new_object,
    "EMPTY_SET": lambda walk: walk.stack.append(Opaque()),
    "ADDITEMS": lambda walk: walk.append(walk.pop_to_mark()),
    "POP": lambda walk: walk.stack.pop() and None,
}
"""More instructions of what torch reads as plain values: random states, sets, data types."""


def _step(walk: Walk, name: str, argument: Any) -> None:
    """Execute one instruction."""
    if name in VALUES or (name == "SHORT_BINSTRING" and not walk.only_tensors):
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
    elif name in OTHER_ACTIONS and not walk.only_tensors:
        OTHER_ACTIONS[name](walk)
    else:
        raise ValueError(f"the instruction {name}")


def run_program(program: bytes | IO[bytes], walk: Walk) -> Any:
    """Interpret one program, up to its end mark; return what it builds.

    Raises:
        CodeError: it imports a name that no table of tensors needs.
        ValueError: it is broken, holds more than tensors and plain values, or exceeds a bound.
    """
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(program)):
            if number >= MAX_INSTRUCTIONS:
                raise ValueError(f"more than {MAX_INSTRUCTIONS} instructions")
            _step(walk, opcode.name, argument)
        return walk.stack.pop()
    except (IndexError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"broken instructions: {type(error).__name__}") from error
