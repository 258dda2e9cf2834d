"""Building blocks of reports: HTML pages from templates, embedded images, and plain text tables."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from llava.errors import DataError
from llava.utils.terminal import visible_lines

if TYPE_CHECKING:
    from jinja2 import Environment
    from PIL import Image


THUMBNAIL = 224
"""Longer side of an embedded image in pixels."""

OpenImage = Callable[[str], "Image.Image"]


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """Small copy of an image as a data URL; without a URL, a note that says why.

    Attributes:
        name: name of the image in the data.
        url: data URL; empty without an image.
        note: text shown instead of the image.
    """

    name: str
    url: str = ""
    note: str = ""


def render_page(template: str, **values: object) -> str:
    """Return the HTML page of a file in `llava/utils/templates`; all values are escaped.

    Raises:
        jinja2.UndefinedError: the template uses a value that is not given.

    Example::

        render_page("row.html", title="row 3", settings="...", summary="...", images=[], parts=[])
    """
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    # Imported here: commands that write no page do not wait for it.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("llava.utils"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_shown,
        auto_reload=False,  # a template that is updated under a running training need not fit the code in memory
    )


def _shown(value: object) -> object:
    """Return a text with visible control characters, which could reorder a page; anything else unchanged."""
    return visible_lines(value) if type(value) is str else value  # not markup, a subclass


def fact_lines(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return names and texts of facts such as provenance; tables within tables become lines of their own.

    >>> fact_lines({"seed": 0, "data": {"train": {"file": "t.json", "rows": 3}}, "git_commit": None})
    [('seed', '0'), ('data, train', 'file t.json, rows 3'), ('git commit', '-')]
    """
    lines: list[tuple[str, str]] = []
    for name, value in facts.items():
        title = name.replace("_", " ")
        if isinstance(value, Mapping) and any(isinstance(part, Mapping) for part in value.values()):
            lines += [(f"{title}, {inner}", text) for inner, text in fact_lines(value)]
        else:
            lines.append((title, _fact_text(value)))
    return lines


def _fact_text(value: object) -> str:
    """Return a value in words, without the marks of Python or JSON."""
    if value is None or value in ({}, [], ()):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{str(name).replace('_', ' ')} {_fact_text(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_fact_text, value))
    return str(value)


def html_thumbnail(name: str, open_image: OpenImage | None) -> Thumbnail:
    """Return a small JPEG copy of an image, or a note if it is missing or cannot be read.

    The name on the page is without folders, which often name a patient.
    """
    shown = PurePath(name).name
    if open_image is None:
        return Thumbnail(shown, note="no image")
    try:
        image = open_image(name).convert("RGB")
    except DataError:
        return Thumbnail(shown, note="the image cannot be read")
    return Thumbnail(shown, url=image_url(image))


def image_url(image: Image.Image, *, side: int = THUMBNAIL, form: str = "jpeg") -> str:
    """Return a copy of an image of at most `side` pixels as a data URL; `form` is `jpeg` or `png`."""
    small = image.copy()
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, format=form, quality=85)  # PNG ignores the quality
    return data_url(buffer.getvalue(), form)


def data_url(data: bytes, form: str) -> str:
    """Return an encoded image as a data URL."""
    return f"data:image/{form};base64,{base64.b64encode(data).decode('ascii')}"


Cell = str | float | int

HEADER_MARGIN = 2
"""Minimum difference between the width of a column and of its header."""


def text_table(headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
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
