"""The documentation site: it builds without a warning, every link leads somewhere, and it needs no other server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llava.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
LOADED = re.compile(r'<(?:script|img|iframe|source)\b[^>]*\bsrc="(https?:)?//|<link\b[^>]*\bhref="(https?:)?//')


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a broken link, a missing heading or a page outside of the navigation is an error."""
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_document_has_a_page(site: Path) -> None:
    documents = {path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")}
    assert {path.relative_to(site).with_suffix("") for path in site.rglob("*.html")} - {Path("404")} == documents


def test_the_reference_has_the_public_names(site: Path) -> None:
    page = (site / "reference" / "python.html").read_text(encoding="utf-8")
    for name in ("api.load_predictor", "api.LlavaPredictor.chat_many", "scoring.metrics.Metric", "errors.DataError"):
        assert f'id="llava.{name}"' in page


def test_the_page_of_options_has_every_command(site: Path) -> None:
    page = (site / "reference" / "options.html").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"llava {name}<" not in page] == []
    assert "--model-name-or-path" in page and "--max-running" in page


def test_no_page_loads_from_another_server(site: Path) -> None:
    assert [page for page in site.rglob("*.html") if LOADED.search(page.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("page", ["evaluation", "architecture", "performance"])
def test_images_of_the_repository_are_on_the_site(site: Path, page: str) -> None:
    text = (site / f"{page}.html").read_text(encoding="utf-8")
    [image] = re.findall(r'<img alt="[^"]+" src="(images/[^"]+)"', text)
    assert (site / image).read_bytes() == (ROOT / image).read_bytes()
