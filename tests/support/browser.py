"""Headless Chromium, where it is installed: pages in frames of given widths, and scripts that look at them."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import run_command

PROBE = """<html><body><script>
const found = [];
function next(jobs) {
  if (!jobs.length) { document.title = JSON.stringify(found); return; }
  const [source, width] = jobs[0], frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 800px; border: 0`;
  frame.onload = () => {
    const page = frame.contentDocument, root = page.documentElement, view = frame.contentWindow;
    const result = [root.scrollWidth, root.clientWidth, root.scrollHeight];
    const requests = view.performance.getEntriesByType("resource").map(entry => entry.name)
      .filter(name => !name.startsWith("data:"));
    found.push({sizes: result, requests: requests, value: (function () { %s })()});
    frame.remove();
    next(jobs.slice(1));
  };
  frame.src = source;
  document.body.append(frame);
}
next(%s);
</script></body></html>
"""


def look_at(
    folder: Path, pages: list[Path], *, widths: tuple[int, ...] = (390,), script: str = "", dark: bool = False
) -> list[dict[str, Any]]:
    """Return, for each page and width, `sizes` (content, frame, height), `requests` and the `value` of a script.

    Args:
        folder: folder for the files of the browser.
        pages: HTML files.
        widths: widths of the frame in pixels; all pages are shown at the first one, then at the next.
        script: JavaScript that returns a JSON value; `page` is the document, `view` its window.
        dark: ask for dark colors.
    """
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("Chromium is not installed")
    probe = folder / "probe.html"
    jobs = [(page.as_uri(), width) for width in widths for page in pages]
    probe.write_text(PROBE % (script or "return null", json.dumps(jobs)))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--hide-scrollbars"]
    options += ["--window-size=1400,900"] + ["--blink-settings=preferredColorScheme=0"] * dark
    options += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000", "--dump-dom", probe.as_uri()]
    done = run_command([program, *options], timeout=900)
    assert done.returncode == 0, done.stderr[-500:]
    shown = done.stdout
    title = re.search(r"<title>(.*?)</title>", shown, re.DOTALL)
    assert title is not None, shown[:500]
    found: list[dict[str, Any]] = json.loads(html.unescape(title.group(1)))
    return found


def narrow_sizes(folder: Path, pages: list[Path]) -> list[tuple[int, int, int]]:
    """Return, for each page in a frame of 390 pixels, the width of its content, of the frame, and its height."""
    return [tuple(found["sizes"]) for found in look_at(folder, pages)]  # type: ignore[misc]
