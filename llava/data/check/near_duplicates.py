"""Near-duplicate images: close perceptual hashes, confirmed by the correlation of the pixels.

    hashes --ClosePairs--> candidates --small copies--> likely ones --256 x 256 pixels correlate >= 0.99--> groups

Chest radiographs look alike, so a close hash alone is weak evidence. Images with equal pixels are reported as the same
image and are not candidates here. Images that other pairs already connect are not compared again.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llava.data.check.images import ImageScan, pixel_correlation, small_gray
from llava.data.check.row_index import as_array
from llava.data.check.rules import AGAINST, FILE, CheckFindings
from llava.imaging import decode
from llava.utils.log import progress_bar

MAX_DISTANCE = 4
"""Maximum number of differing bits of a close pair."""

NUM_BANDS = MAX_DISTANCE + 2  # at most 4 differ, so a close pair agrees in at least two bands
BLOCK = 1 << 18
"""Pairs compared per step."""

Pairs = NDArray[np.int64]
Places = NDArray[np.int64]


def band_masks() -> list[int]:
    """Return the bit mask of each band; the bands partition the 64 bits."""
    edges = np.linspace(0, 64, NUM_BANDS + 1).round().astype(int)
    return [(1 << int(stop)) - (1 << int(start)) for start, stop in pairwise(edges)]


class ClosePairs:
    """Iterator over pairs of places whose hashes differ in at most four bits; iterate once.

    Args:
        hashes: [n] hashes.
        max_partners: maximum number of comparisons per hash and choice of bands; limits the cost of many equal hashes.

    Attributes:
        num_skipped: comparisons skipped because of `max_partners`; 0 means that every pair was found.
    """

    def __init__(self, hashes: NDArray[np.uint64], *, max_partners: int = 2000) -> None:
        self.hashes = hashes
        self.max_partners = max_partners
        self.num_skipped = 0

    def __iter__(self) -> Iterator[Pairs]:
        """Yield arrays of pairs of places [n, 2]; each pair once, the lower place first."""
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
        """Yield pairs of places of equal keys in a sorted array, lower first, about `BLOCK` at a time."""
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
    """Return for each pair whether `choice` is the first choice of bands in which it agrees."""
    equal = np.stack([(differing & band) == 0 for band in bands], axis=1)
    earlier = np.zeros(len(differing), dtype=np.bool_)
    for other in combinations(range(NUM_BANDS), 2):
        if other >= choice:
            break
        earlier |= equal[:, other[0]] & equal[:, other[1]]
    return ~earlier


MIN_CORRELATION = 0.99
MIN_SMALL_CORRELATION = 0.97
"""Minimum correlation of 32 x 32 copies to open two files again; noise lowers the correlation of large copies."""

CONFIRM_SIDE = 256
MAX_CONFIRMED = 20_000
"""Maximum number of pairs of files opened again; the report states how many pairs were not compared."""


class DuplicateGroups:
    """Disjoint sets of places (union-find)."""

    def __init__(self, size: int) -> None:
        self._parent = np.arange(size, dtype=np.int32)

    def root(self, place: int) -> int:
        """Return the representative of the group of a place."""
        parent = self._parent
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = int(parent[place])
        return place

    def join(self, first: int, second: int) -> None:
        """Merge the groups of two places."""
        one, other = self.root(first), self.root(second)
        self._parent[max(one, other)] = min(one, other)

    def members(self) -> list[NDArray[np.intp]]:
        """Return the sorted members of every group of two or more, ordered by first member."""
        roots = np.fromiter(map(self.root, range(len(self._parent))), dtype=np.int32, count=len(self._parent))
        order = np.argsort(roots, kind="stable")
        edges = np.flatnonzero(np.diff(roots[order])) + 1
        return [group for group in np.split(order, edges) if len(group) > 1]


def find_near_duplicates(image_scan: ImageScan, findings: CheckFindings) -> int:
    """Report groups of near-duplicate images; return the number of candidates that were not compared."""
    places = _one_of_each(image_scan)
    search = ClosePairs(as_array(image_scan.hashes)[places])
    groups = DuplicateGroups(len(places))
    confirm = _Confirmation(image_scan)
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
    order = np.argsort(as_array(image_scan.pixels), kind="stable")
    found = [_all_of(places[group], as_array(image_scan.pixels), order) for group in groups.members()]
    for group in sorted(found, key=lambda group: not _in_both(group, image_scan)):  # possible leaks first
        _report(group, image_scan, findings)
    return search.num_skipped + num_left


def _one_of_each(image_scan: ImageScan) -> NDArray[np.int64]:
    """Return the place of the first image of every distinct content, without those that did not decode."""
    pixels = as_array(image_scan.pixels)
    _, first = np.unique(pixels, return_index=True)
    first = np.sort(first)
    return np.asarray(first[pixels[first] != 0], dtype=np.int64)


class _Confirmation:
    """Comparison of two images by their pixels."""

    def __init__(self, image_scan: ImageScan) -> None:
        self._image_scan = image_scan
        self._gray = lru_cache(maxsize=512)(self._open)
        self.num_opened = 0

    def _open(self, place: int) -> NDArray[np.uint8]:
        return small_gray(decode.load_image(self._image_scan.name(place), self._image_scan.root(place)), CONFIRM_SIDE)

    def __call__(self, first: int, second: int) -> bool:
        """Return whether two images are near-duplicates."""
        if pixel_correlation(self._image_scan.small(first), self._image_scan.small(second)) < MIN_SMALL_CORRELATION:
            return False
        self.num_opened += 1
        return pixel_correlation(self._gray(first), self._gray(second)) >= MIN_CORRELATION


def _all_of(group: NDArray[np.int64], pixels: NDArray[Any], order: NDArray[np.intp]) -> NDArray[np.intp]:
    """Return the group and all images equal to one of its members; `order` sorts `pixels`."""
    low, high = (np.searchsorted(pixels, pixels[group], side=side, sorter=order) for side in ("left", "right"))
    return np.sort(np.concatenate([order[a:b] for a, b in zip(low, high, strict=True)]))


def _in_both(group: NDArray[np.intp], image_scan: ImageScan) -> bool:
    """Return whether rows of both files name images of a group."""
    return len(image_scan.of_ref) > 1 and all(image_scan.rows(file, group) for file in (FILE, AGAINST))


def _report(group: NDArray[np.intp], image_scan: ImageScan, findings: CheckFindings) -> None:
    """Report one group."""
    rows = [image_scan.rows(file, group) for file in range(len(image_scan.of_ref))]
    own = FILE if rows[FILE] else AGAINST
    others = rows[AGAINST] if own == FILE and len(rows) > 1 else []
    message = f"{len(group)} near-duplicate images" + (", in both files" if others else "")
    findings.add("near-duplicate", own, rows[own], message, images=group[:10].tolist(), other_rows=others)
