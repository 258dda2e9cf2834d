"""Pickle programs written instruction by instruction, and torch archives around them; none of it is ever run."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def _number(item: int) -> bytes:
    if -(2**31) <= item < 2**31:
        return b"J" + struct.pack("<i", item)
    data = item.to_bytes(item.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


BUILDERS: dict[type, Callable[[Any], bytes]] = {
    bytes: lambda item: item,
    type(None): lambda _: b"N",
    bool: lambda item: b"\x88" if item else b"\x89",
    int: _number,
    float: lambda item: b"G" + struct.pack(">d", item),
    str: lambda item: b"X" + struct.pack("<I", len(item.encode())) + item.encode(),
    tuple: lambda item: b"(" + b"".join(map(value, item)) + b"t",
    list: lambda item: b"](" + b"".join(map(value, item)) + b"e",
    dict: lambda item: b"}(" + b"".join(value(key) + value(entry) for key, entry in item.items()) + b"u",
}


def value(item: Any) -> bytes:
    """Return the instructions that build a plain value; bytes are taken as instructions."""
    return BUILDERS[type(item)](item)


def imported(name: str) -> bytes:
    """Return the instruction that imports `module.name`, given as two words."""
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def storage(key: Any = "0", num_elements: Any = 4, kind: str = "torch FloatStorage") -> bytes:
    """Return the instructions for a storage."""
    return b"(" + b"".join(map(value, ("storage", imported(kind), key, "cpu", num_elements))) + b"tQ"


def tensor(shape: Any, strides: Any, *, offset: Any = 0, held: bytes | None = None) -> bytes:
    """Return the instructions for a tensor; its storage has four float32 elements by default."""
    hooks = imported("collections OrderedDict") + b")R"
    arguments = [storage() if held is None else held, offset, shape, strides, False, hooks]
    return imported("torch._utils _rebuild_tensor_v2") + b"(" + b"".join(map(value, arguments)) + b"tR"


def table(*entries: tuple[Any, Any]) -> bytes:
    """Return a whole program whose result is a table."""
    return b"\x80\x02}(" + b"".join(value(key) + value(entry) for key, entry in entries) + b"u."


def write_archive(
    file: Path, program: bytes, *, storages: Sequence[int] = (16,), compression: int = zipfile.ZIP_STORED
) -> Path:
    """Write a torch archive with a description and storages of so many bytes."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", "3\n")
        for key, num_bytes in enumerate(storages):
            archive.writestr(f"archive/data/{key}", b"\x00" * num_bytes)
    file.write_bytes(content.getvalue())
    return file


def write_legacy(file: Path, program: bytes, *, num_bytes: int = 16) -> Path:
    """Write a file as torch before 1.6: magic number, version, system, content, keys, storages."""
    magic = b"\x80\x02" + value(0x1950A86A20F9469CFC6C) + b"."
    version = b"\x80\x02" + value(1001) + b"."
    system = b"\x80\x02" + value({"little_endian": True, "protocol_version": 1001}) + b"."
    file.write_bytes(magic + version + system + program + b"\x80\x02" + value(["0"]) + b"." + b"\x00" * num_bytes)
    return file
