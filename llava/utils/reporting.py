"""Building blocks of reports: self-contained HTML pages with embedded images, and plain text tables."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING

from llava.errors import DataError

if TYPE_CHECKING:
    from PIL import Image


THUMBNAIL = 224
"""Longer side of an embedded image in pixels."""

OpenImage = Callable[[str], "Image.Image"]

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em;color:#1b1f24;background:#fff}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}.note{color:#57606a}svg text{font:12px system-ui,sans-serif}
table{border-collapse:collapse;margin:.6em 0 1.6em}td,th{padding:.25em .8em;border-bottom:1px solid #d8dee4}
th{text-align:left}td.n{text-align:right;font-variant-numeric:tabular-nums}
.case{display:flex;gap:1em;margin:0 0 1.2em;padding-bottom:1.2em;border-bottom:1px solid #d8dee4}
.case img{max-width:224px;max-height:224px}.case .none{width:224px;color:#57606a}
.right{color:#116329}.wrong{color:#a40e26}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2em 1em;margin:0}
dt{color:#57606a}dd{margin:0;overflow-wrap:anywhere}
"""


def page(title: str, parts: Sequence[str]) -> str:
    """Return an HTML page; `title` is plain text and is escaped, `parts` are HTML."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an HTML table; cells are escaped, and all columns but the first are aligned as numbers."""
    head = "".join(f"<th>{escape(header)}</th>" for header in headers)
    body = "".join(
        "<tr>"
        + "".join(f"<td{'' if column == 0 else ' class=n'}>{escape(cell)}</td>" for column, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def thumbnail(name: str, open_image: OpenImage | None) -> str:
    """Return an HTML element with a small copy of an image, or with a note if it is missing."""
    if open_image is None:
        return '<div class="none">no image</div>'
    try:
        image = open_image(name).convert("RGB")
    except DataError:
        return '<div class="none">the image cannot be read</div>'
    return f'<img alt="{escape(name)}" src="{picture_data(image)}">'


def picture_data(image: Image.Image) -> str:
    """Return a small JPEG copy of an image as a data URL."""
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


Cell = str | float | int

HEADER_MARGIN = 2
"""Minimum difference between the width of a column and of its header."""


def simple_table(headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Return a text table with a rule below its headers.

    Numbers have six significant digits and are aligned at the decimal point; other columns are aligned to the left.
    """
    columns = [_column(header, [row[index] for row in rows]) for index, header in enumerate(headers)]
    lines = ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]
    return "\n".join(lines)


def _column(header: str, cells: Sequence[Cell]) -> list[str]:
    """Return header, rule and cells of one column, padded to one width."""
    numeric = any(not isinstance(cell, str) for cell in cells)
    texts = [cell if isinstance(cell, str) else format(cell, "g") for cell in cells]
    if numeric:
        tails = [_tail(cell) for cell in cells]
        texts = [text + " " * (max(tails) - tail) for text, tail in zip(texts, tails, strict=True)]
    width = max([len(header) + HEADER_MARGIN, *map(len, texts)])
    align = str.rjust if numeric else str.ljust
    return [align(header, width), "-" * width, *(align(text, width) for text in texts)]


def _tail(cell: Cell) -> int:
    """Return the number of characters after the decimal point or the exponent mark; -1 without either."""
    if isinstance(cell, str):
        return -1
    text = format(cell, "g")
    point = text.rfind(".")
    if point < 0:
        point = text.lower().rfind("e")
    return len(text) - 1 - point if point >= 0 else -1
