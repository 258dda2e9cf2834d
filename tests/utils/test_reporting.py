"""Alignment of text tables, small copies of images, and rendering of templates."""

from __future__ import annotations

import base64
import io

import pytest
from jinja2 import UndefinedError
from PIL import Image

from llava.errors import DataError
from llava.utils.reporting import THUMBNAIL, OpenImage, Thumbnail, html_thumbnail, image_url, render_page, text_table

ROW = {"title": "row 3", "settings": "s", "summary": "n tokens", "images": [], "parts": []}


@pytest.mark.parametrize("missing", sorted(ROW))
def test_a_missing_value_raises(missing: str) -> None:
    with pytest.raises(UndefinedError, match=missing):
        render_page("row.html", **{name: value for name, value in ROW.items() if name != missing})


def test_a_missing_field_of_a_value_raises() -> None:
    with pytest.raises(UndefinedError, match="tokens"):
        render_page("row.html", **{**ROW, "parts": [{"kind": "text", "text": "t", "range": "0 to 1", "turn": 0}]})


def test_a_page_is_whole() -> None:
    text = render_page("row.html", **ROW)
    assert text.startswith("<!doctype html>\n") and text.endswith("</html>\n") and "<title>row 3</title>" in text


def test_text_keeps_its_line_breaks() -> None:
    part = {"kind": "text", "text": "\n a\n\nb ", "range": "0 to 1", "turn": 0, "tokens": "a=1"}
    assert '<pre><span class="text" title="a=1">\n a\n\nb </span></pre>' in render_page(
        "row.html", **{**ROW, "parts": [part]}
    )


def open_image(name: str) -> Image.Image:
    if name == "broken":
        raise DataError("broken")
    return Image.new("L", (1000, 500), 9)


def test_images_are_small() -> None:
    shown = html_thumbnail("a", open_image)
    assert shown.name == "a" and not shown.note and len(shown.url) < 5000
    assert shown.url.startswith("data:image/jpeg;base64,")


@pytest.mark.parametrize(
    ("name", "opener", "note"),
    [("a", None, "no image"), ("broken", open_image, "the image cannot be read")],
)
def test_missing_and_broken_images_have_a_note(name: str, opener: OpenImage | None, note: str) -> None:
    assert html_thumbnail(name, opener) == Thumbnail(name, note=note)


@pytest.mark.parametrize(("side", "size"), [(THUMBNAIL, (224, 112)), (336, (336, 168)), (2000, (1000, 500))])
def test_images_fit_the_longer_side(side: int, size: tuple[int, int]) -> None:
    url = image_url(open_image("a"), side=side, form="png")
    with Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))) as image:
        assert (image.format, image.size) == ("PNG", size)


def test_numbers_stand_point_under_point() -> None:
    rows = [["exact match score", 0.995452], ["bleu_score", 6.093724e-155], ["yes/no accuracy", 29.18454935]]
    assert text_table(["Metric", "Performance"], rows).splitlines() == [
        "Metric               Performance",
        "-----------------  -------------",
        "exact match score   0.995452",
        "bleu_score          6.09372e-155",
        "yes/no accuracy    29.1845",
    ]


def test_texts_stand_left() -> None:
    assert text_table(["a", "b"], [["x", "1"], ["long text", "2"]]).splitlines() == [
        "a          b",
        "---------  ---",
        "x          1",
        "long text  2",
    ]
    assert text_table(["a"], []).splitlines() == ["a", "---"]
