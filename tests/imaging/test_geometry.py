"""Fill colors and the place of an image on its square, in whole numbers."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from llava.imaging.geometry import fit_image, mean_color

CLIP = (0.48145466, 0.4578275, 0.40821073)


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        (CLIP, (122, 116, 104)),
        ((0.0, 0.5, 1.0), (0, 127, 255)),
        ((0.999, 0.0039, 0.004), (254, 0, 1)),
        ((0.485, 0.456, 0.406), (123, 116, 103)),
        ((0.9961, 0.1999, 0.7), (254, 50, 178)),
    ],
)
def test_fill_colors_are_rounded_down(means: tuple[float, float, float], expected: tuple[int, int, int]) -> None:
    assert mean_color(means) == expected


@pytest.mark.parametrize(
    ("size", "first"), [((3, 4), 0), ((4, 3), 0), ((1, 4), 1), ((4, 1), 1), ((2, 5), 1), ((5, 2), 1), ((6, 9), 1)]
)
def test_an_odd_border_is_smaller_before_the_image(size: tuple[int, int], first: int) -> None:
    white = Image.new("RGB", size, (255, 255, 255))
    padded = np.asarray(fit_image(white, "pad", size=9, fill=(0, 0, 0)))[..., 0]
    side, short = max(size), min(size)
    line = padded[0] if size[0] < size[1] else padded[:, 0]
    assert padded.shape == (side, side)
    assert line.tolist() == [0] * first + [255] * short + [0] * (side - short - first)
