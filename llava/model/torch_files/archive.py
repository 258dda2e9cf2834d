"""Open a torch file within bounds, without torch: every count that it states is checked before use.

A file is a zip archive: `NAME/data.pkl` describes the tensors, `NAME/data/KEY` holds the bytes of one storage. Before
torch 1.6 it was a sequence of pickles, followed by the storages.
"""

from __future__ import annotations

import io
import json
import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from llava.errors import CheckpointError
from llava.model.torch_files.pickle_program import ITEM_SIZES, CodeError, Storage, Walk, run_program, shown

MAX_DESCRIPTION_BYTES = 16_000_000
"""About 80,000 tensors; a compressed archive can claim any size."""

MAX_DIRECTORY_BYTES = 8_000_000
"""Longest list of members, about 100,000 storages."""

MAX_UNPACKED_RATIO = 100
UNPACKED_ROOM_BYTES = 64_000_000
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PARTS = 5
"""Pickles of a file that torch before 1.6 wrote: magic number, version, system, content, keys of the storages."""

UNREADABLE_ARCHIVE = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, NotImplementedError, OSError, EOFError, RuntimeError, ValueError,
    struct.error, OverflowError,
)  # fmt: skip
"""Exceptions for a file that is not a zip archive, damaged, encrypted, or compressed in an unsupported way."""


class _BoundedFile(io.FileIO):
    """File of which no more is read at once than the list of members may be long."""

    def read(self, size: int | None = -1, /) -> Any:
        """Read bytes.

        Raises:
            BadZipFile: more are requested, as for a list of members of absurd length.
        """
        if size is not None and size > max(MAX_DIRECTORY_BYTES, MAX_DESCRIPTION_BYTES):
            raise zipfile.BadZipFile(f"a list of members of {size} bytes")
        return super().read(size)


@dataclass(frozen=True, slots=True)
class TorchArchive:
    """Open archive, its members, and the name of the description."""

    file: Path
    zip: zipfile.ZipFile
    members: Mapping[str, zipfile.ZipInfo]
    program: str

    def beside(self, name: str) -> str:
        """Return the name of a member in the folder of the description."""
        return self.program.removesuffix("data.pkl") + name

    def read(self, name: str, limit: int) -> bytes:
        """Return a member.

        Raises:
            CheckpointError: it is longer than `limit` when unpacked.
        """
        member = self.members[name]
        if member.file_size > limit:
            raise CheckpointError(
                f"{self.file}: {shown(name)} unpacks to {member.file_size} bytes and was not unpacked; "
                f"expected at most {limit}"
            )
        return self.zip.read(member)


def is_archive(file: Path) -> bool:
    """Return whether a file begins as a zip archive.

    torch decides by the same bytes, so both read the same.
    """
    with file.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


@contextmanager
def open_archive(file: Path) -> Iterator[TorchArchive]:
    """Open a torch archive.

    Raises:
        CheckpointError: it is broken, has two members of one name, or unpacks to far more than its size.
    """
    try:
        if not is_archive(file):
            raise zipfile.BadZipFile("it does not begin as a zip file")
        with _BoundedFile(file) as stream, zipfile.ZipFile(stream) as archive:
            infos = archive.infolist()
            members = {info.filename: info for info in infos}
            programs = [info.filename for info in infos if info.filename.endswith("/data.pkl")]
            if not programs:
                raise CheckpointError(f"{file} is a zip archive without tensors; expected a file written by torch.save")
            if len(members) < len(infos) or len(programs) > 1:
                raise CheckpointError(f"{file} has two members of one name; expected a file written by torch.save")
            unpacked = sum(info.file_size for info in infos)
            if unpacked > MAX_UNPACKED_RATIO * file.stat().st_size + UNPACKED_ROOM_BYTES:
                raise CheckpointError(
                    f"{file} has {file.stat().st_size} bytes, unpacks to {unpacked} and was not unpacked; "
                    f"expected at most {MAX_UNPACKED_RATIO} times its size"
                )
            yield TorchArchive(file, archive, members, programs[0])
    except CheckpointError:
        raise
    except UNREADABLE_ARCHIVE as error:
        reason = shown(error) or type(error).__name__
        raise CheckpointError(
            f"{file} cannot be read as a torch file ({reason}); it is truncated, or older than torch 1.6"
        ) from error


def check_torch_file(file: Path) -> None:
    """Check the bounds of any torch file, also of an old format or other content, before torch reads it.

    Whether its content may be read at all (`weights_only`) is left to torch.

    Raises:
        CheckpointError: the file is broken, or exceeds a bound.
    """
    if not is_archive(file):
        _check_legacy(file)
        return
    with open_archive(file) as archive:
        walk = Walk(only_tensors=False)
        run_description(file, archive.read(archive.program, MAX_DESCRIPTION_BYTES), walk)
        for key, member in storage_members(archive, walk.storages).items():
            storage = walk.storages[key]
            check_stored(f"{file}: storage {shown(key)}", storage.num_elements, storage.dtype, member)


def _check_legacy(file: Path) -> None:
    """Check the bounds of a file that torch before 1.6 wrote: a sequence of pickles, then the storages."""
    try:
        with file.open("rb") as stream:
            start = stream.read(MAX_DESCRIPTION_BYTES)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    programs = io.BytesIO(start)
    walk = Walk(only_tensors=False)
    for part in range(LEGACY_PARTS):
        value = run_description(file, programs, walk)
        if part == 0 and value != LEGACY_MAGIC:
            raise CheckpointError(
                f"{file} is not a file of torch.save, or holds more than tensors and plain values, and was not loaded"
            )
    stored = sum(storage.num_elements * ITEM_SIZES[storage.dtype] for storage in walk.storages.values())
    if stored > file.stat().st_size:
        raise CheckpointError(f"{file} describes {stored} bytes, the file holds {file.stat().st_size}; it is truncated")


def run_description(file: Path, program: bytes | IO[bytes], walk: Walk) -> Any:
    """Return what a program builds.

    Raises:
        CheckpointError: it holds code, is broken, or exceeds a bound.
    """
    try:
        return run_program(program, walk)
    except CodeError as error:
        raise CheckpointError(
            f"{file} imports {error}, so it holds code, not only tensors, and was not loaded; "
            "expected a state dictionary (save it again as safetensors where it was created)"
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"{file} holds more than tensors and was not loaded ({shown(error)}); expected a state dictionary"
        ) from error


def check_stored(what: str, num_elements: int, dtype: str, member: zipfile.ZipInfo | None) -> None:
    needed = num_elements * ITEM_SIZES[dtype]
    stored = 0 if member is None else member.file_size
    if member is None or stored < needed:
        raise CheckpointError(f"{what} needs {needed} bytes, the file holds {stored}; it is truncated")


def storage_members(archive: TorchArchive, storages: Mapping[str, Storage]) -> dict[str, zipfile.ZipInfo | None]:
    return {key: archive.members.get(archive.beside(f"data/{key}")) for key in storages}


def check_torch_weights(folder: Path) -> None:
    """Check the bounds of the `.bin` weights of a model folder, if transformers would read them.

    Raises:
        CheckpointError: a file is broken, or exceeds a bound.
    """
    if any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        return
    try:
        named = json.loads((folder / "pytorch_model.bin.index.json").read_text(encoding="utf-8"))["weight_map"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # reported by what reads it
        named = ()
    for name in sorted({"pytorch_model.bin", *(name for name in named if isinstance(name, str))}):
        if (folder / name).is_file():
            check_torch_file(folder / name)
