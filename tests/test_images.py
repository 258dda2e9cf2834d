"""Files of `images/`: small, self-contained, and what `scripts/make_images.py` makes of the documents today."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "images").iterdir())


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "make_images.py"))


def test_they_are_small() -> None:
    assert {"data-show.svg", "architecture.svg", "speed.svg"} <= {file.name for file in FILES}
    assert sum(file.stat().st_size for file in FILES) < 400_000


@pytest.mark.parametrize("file", [file for file in FILES if file.suffix == ".svg"], ids=lambda file: file.name)
def test_they_need_nothing_else(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg") and root.get("viewBox")
    assert not re.findall(r"href|url\(|<script|file:|/home/", text)
    assert not re.findall(r"""(?<![^\s"'>=:,(])/[a-z]+/""", text.replace("http://", ""))  # no folder of a machine


@pytest.mark.parametrize(
    ("image", "document", "function"),
    [("speed.svg", "performance.md", "speed_svg"), ("architecture.svg", "architecture.md", "architecture_svg")],
)
def test_they_show_the_documents(script: dict[str, Any], image: str, document: str, function: str) -> None:
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    made = script[function](text)
    assert (ROOT / "images" / image).read_text(encoding="utf-8") == made, "run: python scripts/make_images.py"


def test_colors_of_a_terminal(script: dict[str, Any]) -> None:
    made = script["terminal_svg"]("x", "plain \x1b[1;32mgre<en\nstill\x1b[0m plain\n" + "a" * 150)
    texts = ["".join(node.itertext()) for node in ElementTree.fromstring(made) if node.tag.endswith("text")]
    assert texts == ["$ x", "plain gre<en", "still plain", "a" * 112, "a" * 38]
    assert made.count("<tspan") == 2
