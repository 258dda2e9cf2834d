"""Tables of text, laid out as the published evaluation scripts print theirs."""

from __future__ import annotations

from collections.abc import Sequence

Cell = str | float | int

HEADER_MARGIN = 2
"""A column is at least this much wider than its header."""


def simple_table(headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Return a table with a rule below its headers; numbers have six significant digits and stand point under point.

    A column of numbers is aligned to the right, any other to the left.
    """
    columns = [_column(header, [row[index] for row in rows]) for index, header in enumerate(headers)]
    lines = ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]
    return "\n".join(lines)


def _column(header: str, cells: Sequence[Cell]) -> list[str]:
    """Return header, rule and cells of one column, all equally wide."""
    numeric = any(not isinstance(cell, str) for cell in cells)
    texts = [cell if isinstance(cell, str) else format(cell, "g") for cell in cells]
    if numeric:
        tails = [_tail(cell) for cell in cells]
        texts = [text + " " * (max(tails) - tail) for text, tail in zip(texts, tails, strict=True)]
    width = max([len(header) + HEADER_MARGIN, *map(len, texts)])
    align = str.rjust if numeric else str.ljust
    return [align(header, width), "-" * width, *(align(text, width) for text in texts)]


def _tail(cell: Cell) -> int:
    """How many characters a number has after its point (or its exponent mark); -1 when it has neither."""
    if isinstance(cell, str):
        return -1
    text = format(cell, "g")
    point = text.rfind(".")
    if point < 0:
        point = text.lower().rfind("e")
    return len(text) - 1 - point if point >= 0 else -1
