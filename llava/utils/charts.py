"""Line charts of the HTML pages: one or several series over one axis of steps.

[(step, value)] of each run --one scale--> LineChart --macro `chart` of parts.html--> SVG
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

Points = Sequence[tuple[int, float]]
"""Steps and values of a series, in the order of the steps."""

WIDTH, HEIGHT = 400, 180
"""Size of a chart in its own units, about that in pixels, so that its text is as large as the page's notes."""

LEFT, RIGHT, TOP, BASE = 56, 394, 8, 156
"""Sides of the area of the lines; the marks of both axes are outside of it."""

MARGIN = 5
"""Distance of the largest and the smallest value from the sides."""

MAX_POINTS = 600
"""Largest number of points that a line is drawn with."""

MAX_LINES = 4
"""Lines that the stylesheet has colors for."""


@dataclass(frozen=True, slots=True)
class LineChart:
    """Chart for the template: points of each line as SVG has them, marks of both axes, and a note as text."""

    name: str
    lines: tuple[str, ...]
    first: str
    last: str
    low: str
    high: str
    note: str
    view: str = f"0 0 {WIDTH} {HEIGHT}"
    left: int = LEFT
    right: int = RIGHT
    top: int = TOP
    base: int = BASE


def line_chart(name: str, lines: Sequence[Points], *, note: str = "") -> LineChart:
    """Return the chart of one or several series; a series may be empty, but not all of them."""
    kept = [_thinned(points) for points in lines]
    steps = [step for points in kept for step, _ in points]
    values = [value for points in kept for _, value in points]
    start, span = min(steps), max(max(steps) - min(steps), 1)
    low, high = min(values), max(values)
    height = (high - low) or 1.0
    area = BASE - TOP - 2 * MARGIN

    def place(step: int, value: float) -> str:
        across = LEFT + (step - start) / span * (RIGHT - LEFT)
        return f"{across:.1f},{TOP + MARGIN + (1 - (value - low) / height) * area:.1f}"

    drawn = tuple(" ".join(place(*point) for point in points) for points in kept)
    return LineChart(name, drawn, f"{start:,}", f"{start + span:,}", number_text(low), number_text(high), note)


def number_text(value: float, *, num_digits: int = 3) -> str:
    """Return a number in few digits; from a thousand to a million it has no exponent."""
    text = f"{value:.{num_digits}g}"
    if 1e3 <= abs(float(text)) < 1e6:
        return f"{float(text):,.0f}"
    return re.sub(r"e([-+])0", r"e\1", text).replace("e+", "e")


def _thinned(points: Points) -> list[tuple[int, float]]:
    """Return at most about `MAX_POINTS` points, the last one among them."""
    kept = list(points[:: -(-len(points) // MAX_POINTS) or 1])
    return kept if not kept or kept[-1] == points[-1] else [*kept, points[-1]]
