"""Grayscale formulas of the DICOM standard on plain arrays, from physical values to gray levels.

    physical values --window or VOI LUT--> 0 to 1 --gray--> 0 to 255

Numbers in docstrings are sections of part 3 of the standard. Arrays are `[height, width]`, float64 unless stated
otherwise; padding does not affect an automatic window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llava.errors import DataError

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LookupTable:
    """Lookup table (C.11.1.1, C.11.2.1.1).

    Attributes:
        first: value that is mapped to the first entry, as are smaller values.
        entries: `[N]` output values; inputs past the end are mapped to the last entry.
        bits: bits of the output values.
    """

    first: int
    entries: Values
    bits: int

    def __call__(self, values: Values) -> Values:
        """Return the entry of each value; fractions are rounded down."""
        # Not pydicom's apply_voi and apply_modality_lut: they take a first value of -1024 that is written as 64512 as
        # it is, need tables of 8 or 10 to 16 bits, and do not round fractions down.
        places = np.clip(np.floor(values) - self.first, 0, len(self.entries) - 1)
        found: Values = self.entries[places.astype(np.int64)]
        return found


def linear(values: Values, center: float, width: float) -> Values:
    """Return 0 to 1 for function LINEAR (C.11.2.1.2.1), whose window of width `w` covers `w - 1` steps."""
    if width == 1:
        return np.where(values > center - 0.5, 1.0, 0.0)
    return np.clip((values - (center - 0.5)) / (width - 1.0) + 0.5, 0.0, 1.0)


def linear_exact(values: Values, center: float, width: float) -> Values:
    """Return 0 to 1 for function LINEAR_EXACT (C.11.2.1.3.2)."""
    return np.clip((values - center) / width + 0.5, 0.0, 1.0)


def sigmoid(values: Values, center: float, width: float) -> Values:
    """Return 0 to 1 for function SIGMOID (C.11.2.1.3.1)."""
    return 1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - center) / width, -700.0, 700.0)))


FUNCTIONS: dict[str, Callable[[Values, float, float], Values]] = {
    "": linear,
    "LINEAR": linear,
    "LINEAR_EXACT": linear_exact,
    "SIGMOID": sigmoid,
}
"""Functions by the VOI LUT Function of a file; the default is LINEAR."""


def window_values(values: Values, center: float, width: float, function: str = "") -> Values:
    """Return values windowed to 0 to 1 with one of `FUNCTIONS`.

    Raises:
        DataError: the function is unknown.
    """
    if function not in FUNCTIONS:
        raise DataError(f"the VOI LUT Function is unknown; expected one of {', '.join(filter(None, FUNCTIONS))}")
    # Not pydicom's apply_windowing: it gives the range of the stored values instead of 0 to 1, which moves values at
    # the half of a level (levels differ for 58 of 2,000 random windows), and it rejects a width below 1.
    chosen = FUNCTIONS[function]
    # LINEAR is not defined for a width between 0 and 1, which files with fractional values (PET) have.
    return (linear_exact if chosen is linear and width < 1 else chosen)(values, center, width)


def stretch_values(values: Values, low: float, high: float) -> Values:
    """Return values scaled linearly to 0 to 1 from `low` to `high`; all 0 if these are equal."""
    return np.clip((values - low) / (high - low), 0.0, 1.0) if high > low else np.zeros_like(values)


def percentile_limits(
    values: Values, is_padding: NDArray[np.bool_] | None, percentiles: tuple[float, float]
) -> tuple[float, float]:
    """Return the lower and upper percentile of the values that are not padding (all if only padding).

    Raises:
        DataError: a value is not finite.
    """
    inside = values if is_padding is None or is_padding.all() else values[~is_padding]
    if percentiles == (0.0, 100.0):
        low, high = float(inside.min()), float(inside.max())
    else:
        low, high = (float(value) for value in np.percentile(inside, percentiles))
    if not np.isfinite([low, high]).all():
        raise DataError("the image holds values that are not finite")
    return low, high


def to_gray(shares: Values, *, inverted: bool) -> NDArray[np.uint8]:
    """Return 0 to 1 as 0 to 255, rounded; `inverted` for MONOCHROME1, whose smallest value is white."""
    levels = np.rint(shares * 255.0).astype(np.uint8)
    return 255 - levels if inverted else levels


MAX_LEVELS = 1 << 16


class Levels(NamedTuple):
    """Image as ascending `values` [N] in its own dtype and `places` [H, W]: it equals `values[places]`."""

    values: NDArray[Any]
    places: NDArray[Any]


def levels_of(image: NDArray[Any]) -> Levels | None:
    """Return the levels of an image of integers, or None if a lookup would not be faster.

    Args:
        image: `[H, W]` of any dtype.
    """
    if image.dtype.kind not in "iu" or image.dtype.itemsize > 4 or not image.size:
        return None
    low, high = int(image.min()), int(image.max())
    if high - low >= min(MAX_LEVELS, image.size):
        return None
    values = np.arange(low, high + 1, dtype=np.int64).astype(image.dtype)
    # The difference is below 65,536, so it is exact even if the subtraction wraps around in a dtype of this width.
    places = (image - image.dtype.type(low)).view(f"u{image.dtype.itemsize}")
    return Levels(values, places)
