"""Read names, shapes and dtypes of a torch `.bin` file without torch and without running its pickle.

`llava.model.torch_files` opens the archive and interprets the description of its tensors.
"""

from __future__ import annotations

import math
import struct
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from llava.errors import CheckpointError
from llava.model.torch_files.archive import (
    MAX_DESCRIPTION_BYTES,
    check_stored,
    open_archive,
    run_description,
    storage_members,
)
from llava.model.torch_files.pickle_program import ITEM_SIZES, BinTensor, Walk, shown

MAX_SHARED_RATIO = 64
"""Largest ratio of all tensors to the file; modules that share weights are listed once for each use."""


def read_bin_header(file: Path) -> dict[str, BinTensor]:
    """Describe every tensor of a `.bin` (`.pt`, `.pth`) file; no weight is read.

    Raises:
        CheckpointError: the file is truncated, older than torch 1.6, holds code, is not a table of tensors, or states
            sizes that it does not hold.
    """
    with open_archive(file) as archive:
        walk = Walk(only_tensors=True)
        program = archive.read(archive.program, MAX_DESCRIPTION_BYTES)
        tensors = _tensors(file, run_description(file, program, walk))
        members = storage_members(archive, walk.storages)
        order = archive.beside("byteorder")
        is_swapped = order in archive.members and archive.read(order, 16).strip() != sys.byteorder.encode()
        starts = {} if is_swapped else _starts(file, members)
    for name, tensor in tensors.items():
        check_stored(f"{file}: {shown(name)}", tensor.num_elements_needed, tensor.dtype, members[tensor.storage_key])
    for key, storage in walk.storages.items():
        check_stored(f"{file}: storage {shown(key)}", storage.num_elements, storage.dtype, members[key])
    total = sum(math.prod(tensor.shape) * ITEM_SIZES[tensor.dtype] for tensor in tensors.values())
    if total > MAX_SHARED_RATIO * file.stat().st_size:
        raise CheckpointError(
            f"{file} describes {total} bytes of tensors in {file.stat().st_size} bytes; "
            f"expected at most {MAX_SHARED_RATIO} times its size"
        )
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


def _tensors(file: Path, table: Any) -> dict[str, BinTensor]:
    """Return the tensors of a table, or of the table that a training checkpoint has under `state_dict`."""
    if isinstance(table, dict) and isinstance(table.get("state_dict"), dict):
        table = table["state_dict"]
    if not isinstance(table, dict) or not all(isinstance(value, BinTensor) for value in table.values()):
        raise CheckpointError(f"{file} holds no table of tensors; expected a state dictionary")
    if numbers := [name for name in table if not isinstance(name, str)]:
        raise CheckpointError(f"{file} names a tensor {shown(numbers[0])}; expected text as the name of each tensor")
    return dict(table)
