"""Every page fits a phone and a desk screen, light and dark, and sends no request."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.browser import look_at
from tests.support.pages import PAGES, Marks

COLORS = """
const style = view.getComputedStyle(page.body);
const isCut = one => one.textContent.trim() && !one.closest("details, .scroll")
  && one.getBoundingClientRect().right > root.clientWidth + 1;
const texts = [...page.querySelectorAll("dd, td, p")];
return {back: style.backgroundColor, hidden: texts.filter(isCut).map(one => one.textContent.slice(0, 40))};
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """All pages, written with hostile texts."""
    folder = tmp_path_factory.mktemp("pages")
    found = []
    for name, write in PAGES.items():
        (folder / name).mkdir()
        found.append(write(folder / name, Marks()))
    return found


@pytest.mark.parametrize("dark", [False, True])
def test_pages_fit_and_are_readable(pages: list[Path], tmp_path: Path, dark: bool) -> None:
    found = look_at(tmp_path, pages, widths=(390, 1280), script=COLORS, dark=dark)
    assert len(found) == 2 * len(PAGES)
    for one, page in zip(found, [*pages, *pages], strict=True):
        assert one["sizes"][0] <= one["sizes"][1], page
        assert one["requests"] == [] and one["value"]["hidden"] == [], page
        assert (one["value"]["back"] == "rgb(255, 255, 255)") is not dark
