"""Levels: they reproduce the image, for every dtype and range."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from llava.imaging.grayscale import levels_of


@given(
    st.sampled_from(["u1", "i1", "<u2", ">u2", "<i2", ">i2", "<i4", ">i4", "<u4"]),
    st.integers(-(2**31), 2**31),
    st.data(),
)
def test_image_is_found_again(kind: str, low: int, data: st.DataObject) -> None:
    limits = np.iinfo(kind)
    low = min(max(low, limits.min), limits.max - 60)
    offsets = data.draw(arrays(np.int64, (9, 8), elements=st.integers(0, 60)))
    image = (offsets + low).astype(kind)
    levels = levels_of(image)
    assert levels is not None
    assert np.array_equal(levels.values[levels.places], image)
    assert levels.values.dtype == image.dtype and list(np.diff(levels.values.astype(np.int64))) == [1] * int(
        offsets.max() - offsets.min()
    )


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((3, 3)),
        np.zeros((0, 3), np.uint8),
        np.array([[0, 4]], np.uint8),
        np.array([[-(2**31), 2**31 - 1]] * 9, np.int32),
        np.zeros((3, 3), np.int64),
    ],
    ids=["fractions", "empty", "fewer pixels than levels", "wide", "64 bits"],
)
def test_no_levels(image: np.ndarray) -> None:
    assert levels_of(image) is None
