"""What a picture looks like as 64 bits: the perceptual hash of the low frequencies of its grey values.

    picture --grey, 32 x 32--> values --cosine transform--> 8 x 8 lowest frequencies --above their median?--> 64 bits

Pictures that were scaled, stored again or slightly changed differ in few bits. The method is pHash: C. Zauner,
"Implementation and Benchmarking of Perceptual Image Hash Functions", thesis, FH Hagenberg, 2010.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 32
"""Side of the small grey copy that is hashed, in pixels."""

LOW = 8
"""Frequencies kept in each direction, the constant one included."""


def _cosines() -> NDArray[np.float64]:
    """Return the first `LOW` rows of the orthonormal DCT-II matrix of size `SIDE`: [LOW, SIDE]."""
    k, n = np.arange(LOW)[:, None], np.arange(SIDE)[None, :]
    matrix = np.sqrt(2.0 / SIDE) * np.cos(math.pi * (2 * n + 1) * k / (2 * SIDE))
    matrix[0] /= math.sqrt(2.0)
    return np.asarray(matrix)


_COSINES = _cosines()


def small_grey(picture: Image.Image, side: int = SIDE) -> NDArray[np.uint8]:
    """Return a picture as grey values [side, side], averaged over what each of them covers."""
    # The draft by whole factors costs little; the last step is smooth.
    small = picture.convert("L").resize((side, side), Image.Resampling.BILINEAR, reducing_gap=3.0)
    return np.asarray(small)


def perceptual_hash(grey: NDArray[np.uint8]) -> int:
    """Return the 64 bits of grey values [32, 32]; bit 8 * v + u is the frequency with u horizontal, v vertical."""
    frequencies = _COSINES @ grey.astype(np.float64) @ _COSINES.T
    bits = (frequencies > np.median(frequencies)).reshape(-1)
    return int.from_bytes(np.packbits(bits, bitorder="little").tobytes(), "little")


def correlation(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    """Return Pearson's correlation of two pictures' grey values of one shape; two even pictures of one grey have 1."""
    one, other = first.astype(np.float64), second.astype(np.float64)
    one, other = one - one.mean(), other - other.mean()
    scale = math.sqrt(float((one * one).sum()) * float((other * other).sum()))
    if scale == 0.0:
        return 1.0 if np.array_equal(first, second) else 0.0
    return float((one * other).sum()) / scale
