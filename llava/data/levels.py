"""Whole-number pictures by their levels: a film of 16 bits has 4 million pixels and at most 65,536 different values.

    values [H, W] --levels_of--> every level from the smallest to the largest, and the place of each pixel in them

What is computed value by value is computed once a level and looked up: the same bits, a fraction of the time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_LEVELS = 1 << 16


class Levels(NamedTuple):
    """`values` [N] ascending, in the picture's own type, and `places` [H, W]: the picture is `values[places]`."""

    values: NDArray[Any]
    places: NDArray[Any]


def levels_of(picture: NDArray[Any]) -> Levels | None:
    """Return the levels of a picture of whole numbers; None where looking up would not be faster.

    Args:
        picture: `[H, W]`, any type.
    """
    if picture.dtype.kind not in "iu" or picture.dtype.itemsize > 4 or not picture.size:
        return None
    low, high = int(picture.min()), int(picture.max())
    if high - low >= min(MAX_LEVELS, picture.size):
        return None
    values = np.arange(low, high + 1, dtype=np.int64).astype(picture.dtype)
    # The difference is below 65,536, so it survives whatever wraps around on the way in a type of the same width.
    places = (picture - picture.dtype.type(low)).view(f"u{picture.dtype.itemsize}")
    return Levels(values, places)
