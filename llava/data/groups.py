"""What a field that names a patient or a study says, however a table wrote it."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

GROUP_FIELDS = (
    "patient",
    "patient_id",
    "subject",
    "subject_id",
    "study",
    "study_id",
    "study_instance_uid",
    "mrn",
)
"""Fields whose values name a patient or a study; spelt with or without `_`, in any case."""


def field_key(name: str) -> str:
    """Return the name of a field without case and punctuation: `PatientID` and `patient_id` are one."""
    return "".join(filter(str.isalnum, name.lower()))


NOBODY = frozenset({"", "nan", "none", "null", "unknown", "na", "n/a", "-"})
"""Values that name no one, in lower case."""


def written_name(value: Any) -> str:
    """Return a name as text, empty where the value is no name: `12`, `"12"` and `12.0` are one.

    Tables that hold numbers and gaps turn whole numbers into fractions.
    """
    if isinstance(value, float):
        value = int(value) if math.isfinite(value) and value.is_integer() else None
    return str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else ""


def names_someone(name: str) -> bool:
    """Say whether a text of `written_name` names a person, and not that nobody is known."""
    return name.lower() not in NOBODY


class Groups:
    """Disjoint groups of keys, joined pair by pair."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def join(self, keys: Sequence[str]) -> None:
        """Say that these keys belong together."""
        roots = sorted({self.group(key) for key in keys})
        for other in roots[1:]:
            self._parent[other] = roots[0]

    def group(self, key: str) -> str:
        """Return the name of a key's group: the smallest key in it, whatever the order of the joins was."""
        path = []
        while (parent := self._parent.setdefault(key, key)) != key:
            path.append(key)
            key = parent
        for passed in path:
            self._parent[passed] = key
        return key


def majority(values: Iterable[Hashable]) -> Hashable:
    """Return the most frequent value; of equally frequent ones the smallest by its text."""
    counts: dict[Hashable, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return min(counts, key=lambda value: (-counts[value], str(value)))
