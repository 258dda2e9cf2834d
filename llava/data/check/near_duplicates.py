"""Pictures that are nearly the same: close perceptual hashes, confirmed by the pixels themselves.

    hashes --ClosePairs--> candidates --small copies--> likely ones --256 x 256 pixels correlate >= 0.99--> groups

Chest films look alike, so a close hash alone says little. Pictures with equal pixels are no candidates: they are
reported as the same picture. Pictures that are joined by others already are not compared again.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llava.data.check.findings import AGAINST, FILE, Findings
from llava.data.check.images import Pictures
from llava.data.check.neighbours import ClosePairs
from llava.data.check.phash import correlation, small_grey
from llava.data.check.row_index import view
from llava.imaging import decode
from llava.utils.log import progress_bar

MIN_CORRELATION = 0.99
MIN_SMALL_CORRELATION = 0.97
"""What the 32 x 32 copies must reach before two files are opened again; noise makes large copies correlate less."""

CONFIRM_SIDE = 256
MAX_CONFIRMED = 20_000
"""Pairs of files opened again; beyond them a set is full of look-alikes, and its report says that the search ended."""


class Groups:
    """Places that belong together, by way of others too (disjoint sets)."""

    def __init__(self, size: int) -> None:
        self._parent = np.arange(size, dtype=np.int32)

    def root(self, place: int) -> int:
        """Return the member that stands for the group of a place."""
        parent = self._parent
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = int(parent[place])
        return place

    def join(self, first: int, second: int) -> None:
        """Make one group of two."""
        one, other = self.root(first), self.root(second)
        self._parent[max(one, other)] = min(one, other)

    def members(self) -> list[NDArray[np.intp]]:
        """Return the members of every group of two or more, each sorted, by first member."""
        roots = np.fromiter(map(self.root, range(len(self._parent))), dtype=np.int32, count=len(self._parent))
        order = np.argsort(roots, kind="stable")
        edges = np.flatnonzero(np.diff(roots[order])) + 1
        return [group for group in np.split(order, edges) if len(group) > 1]


def find_near_duplicates(pictures: Pictures, findings: Findings) -> int:
    """Report groups of pictures that are nearly the same; returns how many candidates were not compared."""
    places = _one_of_each(pictures)
    search = ClosePairs(view(pictures.hashes)[places])
    groups = Groups(len(places))
    confirm = _Confirmation(pictures)
    num_left = 0
    with progress_bar(0, title="look-alikes", unit="pair") as bar:
        for block in search:
            for first, second in block:
                if groups.root(int(first)) == groups.root(int(second)):
                    continue
                if confirm.num_opened >= MAX_CONFIRMED:
                    num_left += 1
                elif confirm(int(places[first]), int(places[second])):
                    groups.join(int(first), int(second))
                bar.update()
    order = np.argsort(view(pictures.pixels), kind="stable")
    found = [_all_of(places[group], view(pictures.pixels), order) for group in groups.members()]
    for group in sorted(found, key=lambda group: not _in_both(group, pictures)):  # a leak is what to look at first
        _report(group, pictures, findings)
    return search.num_skipped + num_left


def _one_of_each(pictures: Pictures) -> NDArray[np.int64]:
    """Return the places of the first picture of every content; what did not decode is left out."""
    pixels = view(pictures.pixels)
    _, first = np.unique(pixels, return_index=True)
    first = np.sort(first)
    return np.asarray(first[pixels[first] != 0], dtype=np.int64)


class _Confirmation:
    """Compares two pictures by their pixels."""

    def __init__(self, pictures: Pictures) -> None:
        self._pictures = pictures
        self._grey = lru_cache(maxsize=512)(self._open)
        self.num_opened = 0

    def _open(self, place: int) -> NDArray[np.uint8]:
        return small_grey(decode.load(self._pictures.name(place), self._pictures.root(place)), CONFIRM_SIDE)

    def __call__(self, first: int, second: int) -> bool:
        """Say whether two pictures are nearly the same."""
        if correlation(self._pictures.small(first), self._pictures.small(second)) < MIN_SMALL_CORRELATION:
            return False
        self.num_opened += 1
        return correlation(self._grey(first), self._grey(second)) >= MIN_CORRELATION


def _all_of(group: NDArray[np.int64], pixels: NDArray[Any], order: NDArray[np.intp]) -> NDArray[np.intp]:
    """Return the group with the pictures that are the same as one of its members; `order` sorts `pixels`."""
    low, high = (np.searchsorted(pixels, pixels[group], side=side, sorter=order) for side in ("left", "right"))
    return np.sort(np.concatenate([order[a:b] for a, b in zip(low, high, strict=True)]))


def _in_both(group: NDArray[np.intp], pictures: Pictures) -> bool:
    """Say whether rows of both files name pictures of a group."""
    return len(pictures.of_ref) > 1 and all(pictures.rows(file, group) for file in (FILE, AGAINST))


def _report(group: NDArray[np.intp], pictures: Pictures, findings: Findings) -> None:
    """Report one group."""
    rows = [pictures.rows(file, group) for file in range(len(pictures.of_ref))]
    own = FILE if rows[FILE] else AGAINST
    others = rows[AGAINST] if own == FILE and len(rows) > 1 else []
    message = f"{len(group)} pictures that are nearly the same" + (", in both files" if others else "")
    findings.add("near-duplicate", own, rows[own], message, images=group[:10].tolist(), other_rows=others)
