"""Facts that hold for every HTML page: texts are escaped, nothing is requested, one stylesheet."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest

from llava.utils.reporting import render_page
from tests.support.pages import NAME, PAGES, PERSON, Marks

TEMPLATES = sorted(file.name for file in files("llava.utils").joinpath("templates").iterdir())

TAGS = "html head meta title style body h1 h2 h3 p b br div span img table thead tbody tr th td dl dt dd pre"
TAGS += " svg rect line text polyline input label details summary b sup"
"""Elements of the templates; none of them runs code."""


class Elements(HTMLParser):
    """Elements, attributes and text of a page as a browser sees them."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(params=sorted(PAGES))
def marks_and_page(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Marks, Path]:
    marks = Marks()
    return marks, PAGES[request.param](tmp_path, marks)


def test_every_text_is_shown_and_escaped(marks_and_page: tuple[Marks, Path]) -> None:
    marks, page = marks_and_page
    elements = Elements(page)
    assert set(elements.tags) <= set(TAGS.split())
    assert [text for text in marks.used if text not in elements.text] == []


def test_no_page_shows_a_python_literal(marks_and_page: tuple[Marks, Path]) -> None:
    text = Elements(marks_and_page[1]).text
    assert re.findall(r"\{'[^}]{0,40}|\['[^\]]{0,40}|\b(?:PosixPath|frozenset|OrderedDict)\(", text) == []


def test_names_of_images_stay_in_their_attribute(marks_and_page: tuple[Marks, Path]) -> None:
    elements = Elements(marks_and_page[1])
    names = {value for name, value in elements.attributes if name == "alt"}
    assert bool(names) == ("img" in elements.tags)
    assert names <= {NAME, f"other {NAME}", "row 4", "image of the row"}


def test_no_page_names_a_folder_of_images(marks_and_page: tuple[Marks, Path]) -> None:
    assert PERSON not in marks_and_page[1].read_text(encoding="utf-8")


def test_every_template_has_a_page() -> None:
    assert {f"{name}.html" for name in PAGES} == set(TEMPLATES) - {"base.html", "parts.html"}


def test_no_attribute_leads_out_of_the_page(marks_and_page: tuple[Marks, Path]) -> None:
    elements = Elements(marks_and_page[1])
    links = [value for name, value in elements.attributes if name in {"src", "href", "srcset", "action", "data"}]
    assert bool(links) == ("img" in elements.tags)
    assert all(re.match(r"data:image/(jpeg|png);base64,[A-Za-z0-9+/=]+$", link) for link in links)
    assert not [name for name, _ in elements.attributes if name.startswith("on") or name == "style"]


def test_the_page_forbids_requests(marks_and_page: tuple[Marks, Path]) -> None:
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert ("content", policy) in Elements(marks_and_page[1]).attributes


def test_the_page_has_the_one_stylesheet(marks_and_page: tuple[Marks, Path]) -> None:
    style = re.findall(r"<style>.*?</style>", marks_and_page[1].read_text(encoding="utf-8"), re.DOTALL)
    other = render_page("row.html", title="", settings="", summary="", images=[], parts=[])
    assert len(style) == 1 and style[0] in other


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_names_nothing_outside(name: str) -> None:
    text = files("llava.utils").joinpath("templates", name).read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(|<script|<link|\|\s*safe|autoescape", text)


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_chart_is_an_svg_with_a_view_box(name: str) -> None:
    text = files("llava.utils").joinpath("templates", name).read_text(encoding="utf-8")
    assert "<canvas" not in text and all("viewBox=" in tag for tag in re.findall(r"<svg[^>]*>", text))


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - {"base.html", "parts.html"}))
def test_every_page_extends_the_base(name: str) -> None:
    text = files("llava.utils").joinpath("templates", name).read_text(encoding="utf-8")
    assert text.startswith('{% extends "base.html" %}\n') and "<style" not in text
