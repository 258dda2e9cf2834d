"""Pairs of 64-bit hashes that differ in at most four bits, found without comparing all with all.

    hashes --six bands of bits; four changed bits leave two bands untouched--> equal in two bands --> distance <= 4

For each of the fifteen choices of two bands the hashes are sorted by them, and only those that agree in both are
compared: a twenty-one-bit key, where one band would give eleven bits and a thousand times the comparisons.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray

MAX_DISTANCE = 4
NUM_BANDS = MAX_DISTANCE + 2
BLOCK = 1 << 18
"""Pairs compared at a time."""

Pairs = NDArray[np.int64]
Places = NDArray[np.int64]


def band_masks() -> list[int]:
    """Return the bits of each band; together they are all 64, and no two share one."""
    edges = np.linspace(0, 64, NUM_BANDS + 1).round().astype(int)
    return [(1 << int(stop)) - (1 << int(start)) for start, stop in pairwise(edges)]


class ClosePairs:
    """Pairs of places whose hashes differ in at most four bits; iterate once.

    Args:
        hashes: [n] hashes.
        max_partners: most hashes one hash is compared with for each choice of bands, so that thousands of equal ones
            do not cost millions of comparisons.

    Attributes:
        num_skipped: comparisons that `max_partners` left out so far; 0 means that every pair was found.
    """

    def __init__(self, hashes: NDArray[np.uint64], *, max_partners: int = 2000) -> None:
        self.hashes = hashes
        self.max_partners = max_partners
        self.num_skipped = 0

    def __iter__(self) -> Iterator[Pairs]:
        """Yield pairs of places [n, 2], each pair once, the lower place first."""
        bands = [np.uint64(mask) for mask in band_masks()]
        for choice in combinations(range(NUM_BANDS), 2):
            key = self.hashes & (bands[choice[0]] | bands[choice[1]])
            order = np.argsort(key, kind="stable")
            for first, second in self._equal_keys(key[order]):
                left, right = order[first], order[second]
                differing = self.hashes[left] ^ self.hashes[right]
                near = np.bitwise_count(differing) <= MAX_DISTANCE
                left, right, differing = left[near], right[near], differing[near]
                new = _is_first_choice(differing, bands, choice)
                if new.any():
                    yield np.stack([left[new], right[new]], axis=1)

    def _equal_keys(self, key: NDArray[np.uint64]) -> Iterator[tuple[Places, Places]]:
        """Yield the places of pairs of equal keys in a sorted array, the lower first, in blocks of about `BLOCK`."""
        stops = np.append(np.flatnonzero(key[1:] != key[:-1]) + 1, len(key)) if len(key) else np.empty(0, np.int64)
        partners = np.repeat(stops, np.diff(stops, prepend=0)) - np.arange(len(key)) - 1
        places = np.flatnonzero(partners)
        partners = partners[places]
        self.num_skipped += int(np.maximum(partners - self.max_partners, 0).sum())
        partners = np.minimum(partners, self.max_partners)
        total = np.concatenate([[0], np.cumsum(partners)])
        low = 0
        while low < len(places):
            high = max(int(np.searchsorted(total, total[low] + BLOCK, side="right")) - 1, low + 1)
            counts = partners[low:high]
            first = np.repeat(places[low:high], counts)
            offsets = np.arange(len(first)) - np.repeat(np.cumsum(counts) - counts, counts)
            yield first, first + 1 + offsets
            low = high


def _is_first_choice(
    differing: NDArray[np.uint64], bands: list[np.uint64], choice: tuple[int, int]
) -> NDArray[np.bool_]:
    """Say for each pair whether `choice` is the first pair of bands in which it agrees, so that it is yielded once."""
    equal = np.stack([(differing & band) == 0 for band in bands], axis=1)
    earlier = np.zeros(len(differing), dtype=np.bool_)
    for other in combinations(range(NUM_BANDS), 2):
        if other >= choice:
            break
        earlier |= equal[:, other[0]] & equal[:, other[1]]
    return ~earlier
