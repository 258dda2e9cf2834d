"""Sliders of a DICOM window on the page, with ranges that hold the window of the image."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

from llava.imaging.dicom.policy import PRESETS
from llava.serve.page_chat import PageImage

CENTERS, WIDTHS = (-2000.0, 4000.0), (1.0, 6000.0)
"""Ranges for CT; those of an image whose window lies outside are wider."""

NO_WIDTH = 400.0
"""Width that the slider shows for an image whose file has no window."""

NARROW = 16.0
"""Width of a file below which a step of 1 is too coarse, as for emission images."""

LARGEST = sys.float_info.max


@dataclass(frozen=True, slots=True)
class SliderState:
    """Value of a slider, and the range around it."""

    minimum: float
    maximum: float
    step: float
    value: float


def sliders_of(image: PageImage | None) -> tuple[SliderState, SliderState]:
    """Return the sliders of center and width; their ranges hold the window in use and that of the file."""
    center, width = _level_of(image)
    middle, size = (0.0, NO_WIDTH) if image is None or image.width <= 0 else (image.center, image.width)
    # A window at the end of its slider could be changed in one direction only.
    left = middle - size if middle < CENTERS[0] else CENTERS[0]
    right = middle + size if middle > CENTERS[1] else CENTERS[1]
    narrow = size / 10 if size < WIDTHS[0] else WIDTHS[0]
    wide = size * 2 if size > WIDTHS[1] else WIDTHS[1]
    step = 1.0 if size >= NARROW else 10.0 ** (math.floor(math.log10(size)) - 2)
    return (
        SliderState(max(min(left, center), -LARGEST), min(max(right, center), LARGEST), step, center),
        SliderState(min(narrow, width), min(max(wide, width), LARGEST), step, width),
    )


def _level_of(image: PageImage | None) -> tuple[float, float]:
    """Return center and width of the window of an image."""
    if image is None:
        return 0.0, NO_WIDTH
    if image.window in PRESETS:
        return PRESETS[image.window]
    center, comma, width = image.window.partition(",")
    if comma and ":" not in center:
        return float(center), float(width)
    return image.center, image.width if image.width > 0 else NO_WIDTH
