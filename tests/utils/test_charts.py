"""Line charts: one scale for all lines, and few points of long series."""

from __future__ import annotations

import pytest

from llava.utils.charts import BASE, LEFT, MARGIN, MAX_POINTS, RIGHT, TOP, line_chart, number_text


def places(points: str) -> list[tuple[float, float]]:
    """Return the coordinates of the points of a line."""
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in points.split())]


def test_points_fill_the_area() -> None:
    found = line_chart("loss", [[(10, 4.0), (20, 2.0), (30, 3.0)]])
    low, high = BASE - MARGIN, TOP + MARGIN
    assert places(found.lines[0]) == [(LEFT, high), ((LEFT + RIGHT) / 2, low), (RIGHT, (low + high) / 2)]
    assert (found.first, found.last, found.low, found.high) == ("10", "30", "2", "4")


def test_lines_share_one_scale() -> None:
    found = line_chart("loss", [[(0, 0.0), (10, 1.0)], [], [(10, 2.0), (20, 4.0)]])
    first, empty, last = found.lines
    assert empty == "" and (found.first, found.last, found.low, found.high) == ("0", "20", "0", "4")
    assert places(first)[0] == (LEFT, BASE - MARGIN) and places(last)[-1] == (RIGHT, TOP + MARGIN)
    assert places(first)[1][0] == places(last)[0][0] == (LEFT + RIGHT) / 2


def test_constant_values_and_a_single_point_are_drawn() -> None:
    assert places(line_chart("rate", [[(1, 0.5), (2, 0.5)]]).lines[0])[1] == (RIGHT, BASE - MARGIN)
    assert places(line_chart("rate", [[(7, 0.5)]]).lines[0]) == [(LEFT, BASE - MARGIN)]


def test_marks_of_an_axis_are_short() -> None:
    found = line_chart("rate", [[(1, -8.331e-7), (2, 1.5e12)]])
    assert (found.low, found.high) == ("-8.33e-7", "1.5e12")


@pytest.mark.parametrize(
    ("value", "text"),
    [(999.4, "999"), (999.6, "1,000"), (2204.0, "2,200"), (10240.0, "10,200"), (-10240.0, "-10,200"),
     (999_499.0, "999,000"), (1e6, "1e6"), (0.0, "0"), (5e-05, "5e-5")],
)  # fmt: skip
def test_numbers_are_plain_from_a_thousand_to_a_million(value: float, text: str) -> None:
    assert number_text(value) == text


def test_long_series_are_thinned_and_end_at_their_end() -> None:
    found = line_chart("loss", [[(step, float(step)) for step in range(5000)]])
    points = places(found.lines[0])
    assert MAX_POINTS / 2 < len(points) <= MAX_POINTS + 1 and points[-1] == (RIGHT, TOP + MARGIN)
    assert found.last == "4,999"
