"""Rows that must stay together: those that share a patient or a picture, directly or by way of other rows.

keys of each row --union--> one group for all rows that are connected --> name of the group: its smallest key
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence


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
