"""Histograms of whole numbers for the HTML pages.

{value: count} --bars of one width--> Histogram --macro `plot` of parts.html--> SVG
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

WIDTH, HEIGHT = 320, 150
"""Size of a histogram in its own units, about that in pixels, so that its text is as large as the page's notes."""

LEFT, TOP, BASE = 14, 20, 124
"""Left and right margin, and the heights of the tallest bar and of the axis."""

MAX_BARS = 24
MAX_TICKS = 6
FEW_BARS = 12
"""Largest number of bars and of marks at the axis; and the number of bars of one value up to which all are marked."""

TAIL = 0.995
"""Fraction of the values that the bars cover if the largest value is far beyond them; the last bar has the rest."""


@dataclass(frozen=True, slots=True)
class HistogramBar:
    """Bar in the units of the histogram, with the text that a browser shows for it."""

    x: str
    y: str
    width: str
    height: str
    title: str


@dataclass(frozen=True, slots=True)
class Histogram:
    """Histogram for the template.

    Attributes:
        name: heading.
        bars: the bars.
        ticks: position and text of the marks at the axis.
        tallest: number of values in the tallest bar.
        note: median and largest value.
        limit: position of a vertical line; None for none.
        view: the view box; `left`, `right`, `top` and `base` are the sides of the area of the bars.
    """

    name: str
    bars: tuple[HistogramBar, ...]
    ticks: tuple[tuple[str, str], ...]
    tallest: str
    note: str
    limit: str | None = None
    view: str = f"0 0 {WIDTH} {HEIGHT}"
    left: int = LEFT
    right: int = WIDTH - LEFT
    top: int = TOP
    base: int = BASE


def histogram(
    name: str, counts: Mapping[int, int], *, unit: str = "rows", limit: int | None = None
) -> Histogram | None:
    """Return the histogram of counted values; None with fewer than two distinct values.

    Args:
        name: heading.
        counts: number of occurrences of each value.
        unit: noun for what is counted.
        limit: value at which a line is drawn, if the bars reach it.
    """
    if len(counts) < 2:
        return None
    start, step, heights, is_cut = _bars(counts)
    tallest, wide = max(heights), (WIDTH - 2 * LEFT) / len(heights)
    bars = []
    for place, number in enumerate(heights):
        first, last = start + place * step, start + (place + 1) * step - 1
        values = f"{first}" if step == 1 else f"{first} to {last}"
        values = f"{first} or more" if is_cut and place == len(heights) - 1 else values
        high = (BASE - TOP) * number / tallest
        bars.append(
            HistogramBar(
                f"{LEFT + place * wide + 0.5:.1f}",
                f"{BASE - high:.1f}",
                f"{wide - 1:.1f}",
                f"{high:.1f}",
                f"{values}: {number:,} {unit}",
            )
        )
    end = start + len(heights) * step
    line = f"{LEFT + (limit - start) / step * wide:.1f}" if limit is not None and start <= limit < end else None
    note = f"median {quantile(counts, 0.5):,}, 90 % up to {quantile(counts, 0.9):,}, largest {max(counts):,}"
    note += "" if line is None else f"; dashed: {limit:,}"
    return Histogram(name, tuple(bars), _ticks(start, step, len(heights), is_cut), f"{tallest:,} {unit}", note, line)


def quantile(counts: Mapping[int, int], fraction: float) -> int:
    """Return the smallest value that at least this fraction of the values does not exceed."""
    values = sorted(counts)
    wanted = fraction * sum(counts.values())
    reached = accumulate(counts[value] for value in values)
    return next(value for value, number in zip(values, reached, strict=True) if number >= wanted)


def _bars(counts: Mapping[int, int]) -> tuple[int, int, list[int], bool]:
    """Return the first bar's first value, values per bar, bar heights, and whether the last has a tail."""
    low, high, most = min(counts), max(counts), quantile(counts, TAIL)
    is_cut = high - low > 2 * max(most - low, 1)
    end = most + 1 if is_cut else high
    step = next(
        factor * 10**power
        for power in range(20)
        for factor in (1, 2, 5)
        if end // (factor * 10**power) - low // (factor * 10**power) < MAX_BARS
    )
    start = low // step * step
    heights = [0] * ((end - start) // step + 1)
    for value, number in counts.items():
        heights[min((value - start) // step, len(heights) - 1)] += number
    return start, step, heights, is_cut


def _ticks(start: int, step: int, num_bars: int, is_cut: bool) -> tuple[tuple[str, str], ...]:
    """Return position and text of each mark: centered for bars of one value, else at the bar's start."""
    is_single = step == 1 and num_bars <= FEW_BARS
    every = 1 if is_single else -(-num_bars // MAX_TICKS)
    wide = (WIDTH - 2 * LEFT) / num_bars
    marks = []
    for place in range(0, num_bars, every):
        more = "+" if is_cut and place == num_bars - 1 else ""
        marks.append((f"{LEFT + (place + 0.5 * is_single) * wide:.1f}", f"{start + place * step}{more}"))
    return tuple(marks)
