"""Index of the rows of a file: 64-bit digests and row numbers, with image names in a temporary file.

    row --RowIndex.add--> digests in flat arrays, about 60 bytes per row without a comparison

Memory is linear in the number of rows, as neither texts nor names are kept in memory.
"""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from llava.constants import IMAGE_TOKEN
from llava.data.check.rows import CheckedRow
from llava.data.groups import field_key, image_name_key, is_known_name, written_name
from llava.scoring.decisions import words_of

NOTHING = 0
"""Digest of a missing value; no text has this digest."""


def digest_bytes(content: bytes) -> int:
    """Return a 64-bit digest of bytes, never 0."""
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little") or 1


def digest(text: str) -> int:
    """Return a 64-bit digest of a text, never 0."""
    return digest_bytes(text.encode("utf-8", "surrogatepass"))


def question_digest(text: str) -> int:
    """Return a digest of the lower-case words of a question without placeholders; 0 without words."""
    found = words_of(text.replace(IMAGE_TOKEN, " "))
    return digest(" ".join(found)) if found else NOTHING


def uint64_array() -> array[int]:
    """Return an empty array of unsigned 64-bit integers."""
    return array("Q")


def uint32_array() -> array[int]:
    """Return an empty array of unsigned 32-bit integers."""
    return array("I")


def as_array(values: array[int]) -> NDArray[np.unsignedinteger]:
    """Return a NumPy view of an array."""
    kind = np.uint64 if values.typecode == "Q" else np.uint32
    return np.frombuffer(values, dtype=kind) if values else np.empty(0, dtype=kind)


@dataclass(slots=True)
class KeyedDigests:
    """Digests with the row number of each."""

    digests: array[int] = field(default_factory=uint64_array)
    rows: array[int] = field(default_factory=uint32_array)

    def add(self, digest_: int, row: int) -> None:
        """Append a digest."""
        self.digests.append(digest_)
        self.rows.append(row)


class NameStore:
    """Image names in a temporary file; a name is identified by its offset there."""

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the store
        self._end = 0

    def add(self, name: str) -> int:
        """Append a name and return its offset."""
        content = name.encode("utf-8", "surrogatepass")
        place = self._end
        self._file.write(len(content).to_bytes(4, "little") + content)
        self._end += 4 + len(content)
        return place

    def get(self, place: int) -> str:
        """Return the name at an offset."""
        self._file.flush()
        length = int.from_bytes(os.pread(self._file.fileno(), 4, place), "little")
        return os.pread(self._file.fileno(), length, place + 4).decode("utf-8", "surrogatepass")


class RowIndex:
    """Digests for comparing the rows of one file.

    Args:
        group_fields: fields with patient or study ids.
        names: receives the image names.
        root: number of the image folder; the same name in another folder is another image.
        opens: whether images will be opened and compared by content; otherwise their names are compared as paths.
        compares: whether the file is compared with another one; questions and groups are kept only then.

    Attributes:
        num_rows: number of rows.
        contents: digest of images and conversation by row; 0 for a row that cannot be read.
        ids: digest of the id by row; 0 for a row without one.
        refs: digest of folder and name of every image reference, with its offset in `names` in `places`.
        questions: digest of the words of every question.
        groups: digests of the values, by field.
    """

    def __init__(
        self, group_fields: Sequence[str], names: NameStore, *, root: int, compares: bool, opens: bool = False
    ) -> None:
        self.names = names
        self.root = root
        self.opens = opens
        self.compares = compares
        self.num_rows = 0
        self.contents, self.ids = uint64_array(), uint64_array()
        self.refs, self.places = KeyedDigests(), uint64_array()
        self.questions = KeyedDigests()
        self.groups: dict[str, KeyedDigests] = {field_key(name): KeyedDigests() for name in group_fields}

    def add(self, row: int, seen: CheckedRow) -> None:
        """Add a row."""
        self.num_rows = row + 1
        images, sample = seen.images, seen.sample
        keys = list(map(image_name_key, images))
        for name, key in zip(images, keys, strict=True):
            self.refs.add(digest(f"{self.root}\0{name if self.opens else key}"), row)
            self.places.append(self.names.add(name))
        if sample is None:
            self.contents.append(NOTHING)
            self.ids.append(NOTHING)
            return
        turns = "\0".join(
            f"{turn.role} {turn.text.strip()}" for side in seen.sides() for turn in side.conversation.turns
        )
        self.contents.append(digest("\0".join([str(len(keys)), *keys, turns])))
        self.ids.append(digest(sample.id) if seen.has_id else NOTHING)
        if not self.compares:
            return
        for turn in sample.conversation.turns:
            if turn.role == "human" and (number := question_digest(turn.text)):
                self.questions.add(number, row)

    def add_groups(self, row: int, value: Mapping[str, Any]) -> None:
        """Add the patients and studies in the fields of a row."""
        for name, part in value.items():
            group = self.groups.get(field_key(name))
            if group is not None and is_known_name(person := written_name(part)):
                group.add(digest(person), row)


BLOCK = 1 << 18
"""Values per step, which bounds the temporary memory."""

Values = NDArray[Any]


def is_in(values: Values, wanted: Values) -> NDArray[np.bool_]:
    """Return a mask of the values that are in `wanted` (sorted)."""
    found = np.zeros(len(values), dtype=np.bool_)
    if len(wanted) == 0:
        return found
    for low in range(0, len(values), BLOCK):
        part = values[low : low + BLOCK]
        places = np.minimum(np.searchsorted(wanted, part), len(wanted) - 1)
        found[low : low + BLOCK] = wanted[places] == part
    return found


def common_values(first: Values, second: Values) -> Values:
    """Return the sorted distinct values, other than 0, that are in both arrays."""
    wanted = np.unique(second)
    wanted = wanted[wanted != 0]
    return np.unique(first[is_in(first, wanted)])


def group_items(keys: Values, items: Values, wanted: Values) -> Iterator[tuple[int, Values]]:
    """Yield each key of `wanted` (sorted) that occurs, with its items in order."""
    chosen = is_in(keys, wanted)
    keys, items = keys[chosen], items[chosen]
    order = np.argsort(keys, kind="stable")
    keys, items = keys[order], items[order]
    edges = np.flatnonzero(keys[1:] != keys[:-1]) + 1
    for part_keys, part in zip(np.split(keys, edges), np.split(items, edges), strict=True):
        if len(part):
            yield int(part_keys[0]), part


def repeated_places(keys: Values) -> tuple[Values, Values]:
    """Return the places of repeated keys (other than 0), in order, and the place of the first for each."""
    order = np.argsort(keys, kind="stable")
    same = np.zeros(len(keys), dtype=np.bool_)
    for low in range(1, len(order), BLOCK):
        here = keys[order[low : low + BLOCK]]
        same[low : low + BLOCK] = (here == keys[order[low - 1 : low - 1 + len(here)]]) & (here != 0)
    again = np.flatnonzero(same)
    heads = np.flatnonzero(~same)
    firsts = heads[np.searchsorted(heads, again) - 1]
    by_place = np.argsort(order[again], kind="stable")
    return order[again][by_place], order[firsts][by_place]
