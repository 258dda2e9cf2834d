"""Which rows belong to which number: lookups in flat arrays that hold no Python object per row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 1 << 18

Values = NDArray[Any]


def is_in(values: Values, wanted: Values) -> NDArray[np.bool_]:
    """Say which values are among `wanted` (sorted), in blocks, so that little memory is needed beside the answer."""
    found = np.zeros(len(values), dtype=np.bool_)
    if len(wanted) == 0:
        return found
    for low in range(0, len(values), BLOCK):
        part = values[low : low + BLOCK]
        places = np.minimum(np.searchsorted(wanted, part), len(wanted) - 1)
        found[low : low + BLOCK] = wanted[places] == part
    return found


def common(first: Values, second: Values) -> Values:
    """Return the numbers other than 0 that are in both arrays, sorted, each once."""
    wanted = np.unique(second)
    wanted = wanted[wanted != 0]
    return np.unique(first[is_in(first, wanted)])


def grouped(keys: Values, items: Values, wanted: Values) -> Iterator[tuple[int, Values]]:
    """Yield each key of `wanted` (sorted) that occurs, with the items that have it, in their order."""
    chosen = is_in(keys, wanted)
    keys, items = keys[chosen], items[chosen]
    order = np.argsort(keys, kind="stable")
    keys, items = keys[order], items[order]
    edges = np.flatnonzero(keys[1:] != keys[:-1]) + 1
    for part_keys, part in zip(np.split(keys, edges), np.split(items, edges), strict=True):
        if len(part):
            yield int(part_keys[0]), part


def repeats(keys: Values) -> tuple[Values, Values]:
    """Return the places of numbers (0 aside) that occurred before, in order, and for each the place of the first."""
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
