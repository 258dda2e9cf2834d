"""Sliders of a DICOM window: ranges that hold the window of any image."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("gradio")

from gradio.components.slider import Slider

from llava.serve.page_chat import PageImage
from llava.serve.page_sliders import CENTERS, WIDTHS, sliders_of


def image(center: float, width: float, window: str = "file") -> PageImage:
    return PageImage("a.dcm", b"", 1, center, width, window)


@pytest.mark.parametrize("shown", [None, image(40, 400), image(0, 0), image(-600, 1500), image(900, 0, "lung")])
def test_the_usual_ranges_are_those_of_ct(shown: PageImage | None) -> None:
    center, width = sliders_of(shown)
    assert (center.minimum, center.maximum, width.minimum, width.maximum) == (*CENTERS, *WIDTHS)
    assert center.step == width.step == 1


@pytest.mark.parametrize(
    ("center", "width"),
    [(32768, 65536), (4001, 100), (-2001, 100), (40, 6001), (0.5, 0.9), (2.5, 0.001), (1e308, 1e308), (-1e308, 1e308)],
)
@pytest.mark.parametrize("window", ["file", "full", "brain", "1,2", "9000,9000"])
def test_the_page_accepts_the_window_of_every_image(center: float, width: float, window: str) -> None:
    # What the browser sends back is checked against the range.
    for state in sliders_of(image(center, width, window)):
        slider = Slider(state.minimum, state.maximum, value=state.value, step=state.step)
        assert slider.preprocess(state.value) == state.value


def test_a_window_is_not_at_the_end_of_its_sliders() -> None:
    center, width = sliders_of(image(32768, 65536))
    assert (center.value, center.maximum) == (32768, 32768 + 65536) and (width.value, width.maximum) == (65536, 131072)
    center, width = sliders_of(image(0.25, 0.5))
    assert (width.value, width.minimum) == (0.5, 0.05) and center.step == width.step == 0.001


def test_the_range_stays_while_the_window_of_an_image_changes() -> None:
    before = image(32768, 65536)
    for window in ("full", "brain", "30000,4000", "98304,131072"):
        for old, new in zip(sliders_of(before), sliders_of(replace(before, window=window)), strict=True):
            assert (old.minimum, old.maximum, old.step) == (new.minimum, new.maximum, new.step)
