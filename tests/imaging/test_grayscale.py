"""Windows, tables and gray levels by hand; levels reproduce the image, for every dtype and range."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from llava.imaging.grayscale import LookupTable, levels_of, to_gray, window_values


@pytest.mark.parametrize(
    ("function", "center", "width", "values", "expected"),
    [
        ("", 40, 400, [-160, 239, 39.5], [0, 1, 0.5]),
        ("LINEAR", 2048, 4096, [0, 4095, 2047.5], [0, 1, 0.5]),
        ("LINEAR", 10, 1, [9, 9.5, 9.75, 10], [0, 0, 1, 1]),
        ("", 0, 1, [-1, -0.5, -0.25, 0], [0, 0, 1, 1]),
        ("LINEAR", 10, 0.5, [9.75, 9.875, 10, 10.25], [0, 0.25, 0.5, 1]),
        ("LINEAR_EXACT", 10, 1, [9.5, 9.75, 10, 10.5], [0, 0.25, 0.5, 1]),
        ("LINEAR_EXACT", 40, 400, [-160, 240, 40], [0, 1, 0.5]),
        ("SIGMOID", 40, 400, [40, -1e9, 1e9], [0.5, 0, 1]),
    ],
)
def test_windows_by_hand(function: str, center: float, width: float, values: list, expected: list) -> None:
    shares = window_values(np.array(values, dtype=np.float64), center, width, function)
    assert shares.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("inverted", "expected"), [(False, [0, 64, 128, 255]), (True, [255, 191, 127, 0])])
def test_the_smallest_value_is_black_or_white(inverted: bool, expected: list[int]) -> None:
    assert to_gray(np.array([0.0, 0.25, 0.5, 1.0]), inverted=inverted).tolist() == expected


def test_a_table_rounds_fractions_down_and_ends_with_its_entries() -> None:
    table = LookupTable(-2, np.array([5.0, 6.0, 7.0, 8.0]), 8)
    values = [-9, -2, -1.5, -1.01, -1, -0.5, 0.49, 0.51, 0.99, 1, 1.7, 99]
    assert table(np.array(values, dtype=np.float64)).tolist() == [5, 5, 5, 5, 6, 6, 7, 7, 7, 8, 8, 8]


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
