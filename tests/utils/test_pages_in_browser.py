"""Every page fits a phone and a desk screen, light and dark, and sends no request; screenshots are kept."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.chromium import BrowserPage, browser
from tests.support.pages import PAGES, Marks

SCREENSHOTS = "LLAVA_SCREENSHOTS"
"""Environment variable with the folder of the screenshots; by default that of the test."""

HIDDEN = """(() => {
  const isCut = one => one.textContent.trim() && !one.closest("details, .scroll")
    && one.getBoundingClientRect().right > document.documentElement.clientWidth + 1;
  const isFaint = one => one.textContent.trim() && one.checkVisibility && !one.closest("details")
    && !one.checkVisibility({opacityProperty: true, visibilityProperty: true});
  const isOutside = one => {
    const text = one.getBoundingClientRect(), all = one.closest("svg").getBoundingClientRect();
    return text.left < all.left - 1 || text.right > all.right + 1;
  };
  return [...[...document.querySelectorAll("dd, td, p")].filter(one => isCut(one) || isFaint(one)),
    ...[...document.querySelectorAll(".curves text, .plots text")].filter(isOutside)]
    .map(one => one.textContent.slice(0, 40));
})()"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All pages, written with hostile texts."""
    folder = tmp_path_factory.mktemp("pages")
    found = {}
    for name, write in PAGES.items():
        (folder / name).mkdir()
        found[name] = write(folder / name, Marks())
    return found


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserPage]:
    """One browser for all tests of the module."""
    with browser(tmp_path_factory.mktemp("chromium")) as page:
        yield page


def test_faint_texts_are_found(chromium: BrowserPage, tmp_path: Path) -> None:
    shapes = "<rect width=90 height=40 fill=black></rect><text x=5 y=20 fill=black>on black</text>"
    texts = f"""<p style='color: #949494'>gray</p><p style='color: #767676'>dark gray</p><svg>{shapes}</svg>
        <div style='opacity: .4'><p>pale</p></div><p hidden style='color: white'>no</p>
        <details><p style='color: white'>white</p></details>"""
    (tmp_path / "page.html").write_text(f"<!doctype html><body style='background: #fff; color: #000'>{texts}")
    chromium.prefer_dark(False)
    chromium.open((tmp_path / "page.html").as_uri())
    assert chromium.until("document.readyState == 'complete' && !!document.querySelector('details')")
    assert [text.split(": ")[1] for text in chromium.faint_texts()] == ["gray", "on black", "pale", "white"]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_pages_fit_and_are_readable(
    pages: dict[str, Path], chromium: BrowserPage, tmp_path: Path, width: int, dark: bool
) -> None:
    folder = Path(os.environ.get(SCREENSHOTS) or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    chromium.prefer_dark(dark)
    for name, path in pages.items():
        chromium.open(path.as_uri(), width=width)
        assert chromium.until(f"document.readyState == 'complete' && location.href == {path.as_uri()!r}"), name
        assert chromium.value("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0, name
        assert chromium.value(HIDDEN) == [], name
        back = chromium.value("getComputedStyle(document.body).backgroundColor")
        assert (back == "rgb(255, 255, 255)") is not dark, name
        assert chromium.faint_texts() == [], name
        chromium.resize(width, min(chromium.value("document.documentElement.scrollHeight"), 4000))
        chromium.save_screenshot(folder / f"{name}-{width}-{'dark' if dark else 'light'}.png")
    assert chromium.requests <= {"file://"} and chromium.errors == []
    assert len(list(folder.glob(f"*-{width}-{'dark' if dark else 'light'}.png"))) == len(PAGES)
