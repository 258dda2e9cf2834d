"""Page of an evaluation: its examples, and escaping of all texts of the data."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from PIL import Image

from llava.errors import DataError
from llava.eval.medvqa import page
from llava.eval.medvqa.items import Item
from llava.utils import reporting


def make(identity: str, prediction: str, *, failed: bool = False) -> Item:
    return Item(identity, "Is it <b>?", "yes", prediction, True, ("A&B",), f"{identity}.png", failed)


def test_examples_take_turns() -> None:
    items = [make("0", "yes"), make("1", "yes"), make("2", "no"), make("3", "", failed=True), make("4", "yes")]
    blank = [make("0", "yes"), make("1", "no"), make("2", "no"), make("3", "no"), make("4", "yes")]
    assert page.choose_examples(items, blank, 4) == [3, 1, 2, 0]
    assert page.choose_examples(items, blank, 99) == [3, 1, 2, 0, 4]
    assert page.choose_examples([], None, 5) == []


def test_examples_show_different_images_while_possible() -> None:
    items = [replace(make(str(number), "yes"), image=image) for number, image in enumerate("aab")]
    assert page.choose_examples(items, None, 2) == [0, 2]
    assert page.choose_examples(items, None, 3) == [0, 2, 1]


def test_case_is_escaped_and_shows_the_control() -> None:
    text = page.case(make("0", "<i>no</i>"), make("0", "maybe"), None)
    assert "<b>?" not in text and "<i>" not in text and "&lt;i&gt;" in text and "A&amp;B" in text
    assert "maybe" in text and "no picture" in text


def test_images_are_small_and_broken_ones_are_named() -> None:
    def open_image(name: str) -> Image.Image:
        if name == "broken":
            raise DataError("broken")
        return Image.new("L", (1000, 500), 9)

    assert reporting.thumbnail('a"b', open_image).startswith('<img alt="a&quot;b" src="data:image/jpeg;base64,')
    assert len(reporting.thumbnail("a", open_image)) < 5000
    assert "cannot be read" in reporting.thumbnail("broken", open_image)


def test_plot_bars_follow_the_figures() -> None:
    estimate = {"value": 50.0, "low": 25.0, "high": 75.0, "num_items": 4}
    rows = [{"type": "P<", "score": "s", "answered": estimate, "blank": {**estimate, "value": None}}]
    plot = page.type_plot(rows)
    assert re.findall(r'<rect [^>]*width="([0-9.]+)"', plot) == ["280.0", "0.0"]
    assert "M370.0" in plot and "H650.0" in plot and "P&lt;" in plot


def test_page_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    report = {"counts": {"questions": 1}, "scores": {}, "by_type": [], "provenance": {"command": "<x>"}}
    page.write_page(path, title="A < B", report=report, items=[make("0", "yes")], note="synthetic & drawn")
    text = path.read_text()
    assert text.startswith("<!doctype html>") and text.rstrip().endswith("</html>")
    assert "A &lt; B" in text and "synthetic &amp; drawn" in text and "&lt;x&gt;" in text
