"""A page in headless Chromium, driven over the DevTools pipe; nothing more than the browser is needed.

with browser(folder) as page:
    page.open(url)
    page.until("!!document.querySelector('img')")
    page.requests                     origins that the page asked
    page.stranger()                   a page of somebody else, without its cookies
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.support.processes import started

KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, "")}


MIN_CONTRAST = 4.5
"""Least contrast of small text to what is behind it, WCAG AA."""

FAINT = """((least) => {
  document.querySelectorAll("details").forEach(one => one.open = true);
  const numbers = color => color.match(/[0-9.]+/g).map(Number);
  const over = (top, below) => {
    const [r, g, b, a = 1] = top;
    return [r, g, b].map((value, i) => a * value + (1 - a) * below[i]);
  };
  const luminance = color => {
    const [r, g, b] = color.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const layers = one => {
    const found = [];
    for (let at = one; at; at = at.parentElement) found.push(numbers(getComputedStyle(at).backgroundColor));
    return found;
  };
  const shapes = (one, box) => one.ownerSVGElement ? [...one.ownerSVGElement.querySelectorAll("rect")].filter(rect => {
    const area = rect.getBoundingClientRect(), x = (box.left + box.right) / 2, y = (box.top + box.bottom) / 2;
    return area.left <= x && x <= area.right && area.top <= y && y <= area.bottom;
  }).map(rect => getComputedStyle(rect).fill).filter(fill => fill != "none").map(numbers) : [];
  const faint = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  while (walk.nextNode()) {
    const text = walk.currentNode, one = text.parentElement, style = getComputedStyle(one);
    const range = document.createRange();
    range.selectNodeContents(text);
    const box = range.getBoundingClientRect();
    if (!text.textContent.trim() || !box.width || !box.height || one.closest("script, style, :disabled")
      || !one.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
    seen += 1;
    let back = [255, 255, 255];
    for (const layer of [...layers(one).reverse(), ...shapes(one, box)]) back = over(layer, back);
    let opacity = 1;
    for (let at = one; at; at = at.parentElement) opacity *= Number(getComputedStyle(at).opacity);
    const [r, g, b, a = 1] = numbers(one.ownerSVGElement ? style.fill : style.color);
    const [dark, light] = [luminance(over([r, g, b, a * opacity], back)), luminance(back)].sort((x, y) => x - y);
    const contrast = (light + 0.05) / (dark + 0.05);
    if (contrast < least) faint.push(`${contrast.toFixed(2)} ${one.tagName}.${one.className.baseVal ?? one.className}: `
      + text.textContent.trim().slice(0, 40));
  }
  return seen ? faint : ["no text"];
})(LEAST)"""
"""Script that lists the visible texts with less contrast; those of controls that are off do not count."""


class DevTools:
    """Connection to a browser, for all of its pages."""

    def __init__(self, reader: int, writer: int) -> None:
        self.reader = reader
        self.writer = writer
        self.number = 0
        self.rest = b""
        self.pages: dict[str, BrowserPage] = {}

    def send(self, method: str, params: dict[str, Any], session: str = "") -> dict[str, Any]:
        """Run a command and return its result."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self.writer, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def _receive(self) -> dict[str, Any]:
        limit = time.monotonic() + 120
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.reader], [], [], max(0.0, limit - time.monotonic()))
            assert ready, "Chromium does not answer"
            self.rest += os.read(self.reader, 1 << 16)
        line, _, self.rest = self.rest.partition(b"\0")
        found: dict[str, Any] = json.loads(line)
        page = self.pages.get(found.get("sessionId", ""))
        if page is not None:
            page.note(found)
        return found


class BrowserPage:
    """One page of a browser."""

    def __init__(self, tools: DevTools, **context: str) -> None:
        self.tools = tools
        self.requests: set[str] = set()
        self.errors: list[str] = []
        target = tools.send("Target.createTarget", {"url": "about:blank", **context})["targetId"]
        self.session = tools.send("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        tools.pages[self.session] = self
        for domain in ("Page", "Network", "Runtime", "DOM"):
            self.send(f"{domain}.enable")

    def stranger(self) -> BrowserPage:
        """Return a page that shares neither cookies nor storage with this one."""
        return BrowserPage(self.tools, **self.tools.send("Target.createBrowserContext", {}))

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Run a command of this page and return its result."""
        return self.tools.send(method, params, self.session)

    def note(self, event: dict[str, Any]) -> None:
        """Keep what an event tells of requests and errors."""
        if event.get("method") == "Network.requestWillBeSent":
            parts = urlsplit(event["params"]["request"]["url"])
            if parts.scheme not in ("data", "blob"):
                self.requests.add(f"{parts.scheme}://{parts.netloc}")
        elif event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(event["params"]["exceptionDetails"])[:300])

    def open(self, url: str, *, width: int = 1280, height: int = 900) -> None:
        """Open a URL in a window of this size."""
        self.resize(width, height)
        self.send("Page.navigate", url=url)

    def resize(self, width: int, height: int) -> None:
        """Change the size of the window."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def prefer_dark(self, dark: bool) -> None:
        """Let pages see that the user prefers dark or light colors."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[feature])

    def value(self, script: str) -> Any:
        """Return the value of a script."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def faint_texts(self) -> list[str]:
        """Return the visible texts whose contrast is below `MIN_CONTRAST`, each after its contrast and element."""
        found: list[str] = self.value(FAINT.replace("LEAST", str(MIN_CONTRAST)))
        return found

    def until(self, script: str, seconds: float = 120.0) -> bool:
        """Wait until a script returns true."""
        limit = time.monotonic() + seconds
        while not self.value(script):
            if time.monotonic() > limit:
                return False
            time.sleep(0.02)
        return True

    def click(self, label: str) -> None:
        """Click the last button with this text."""
        name = json.dumps(label)
        self.value(f"[...document.querySelectorAll('button')].filter(b => b.innerText.trim() == {name}).at(-1).click()")

    def type(self, selector: str, text: str) -> None:
        """Focus a field and type into it."""
        self.value(f"document.querySelector({json.dumps(selector)}).focus()")
        self.send("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """Press a key."""
        code, text = KEYS[key]
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more)

    def choose_file(self, selector: str, path: Path) -> None:
        """Give a file to a field."""
        root = self.send("DOM.getDocument", depth=-1)["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def save_screenshot(self, path: Path) -> None:
        """Write what is shown to a PNG file."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[BrowserPage]:
    """Start Chromium with its profile in `folder`; tests are skipped where it is not installed."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("Chromium is not installed")
    to_browser, writer = os.pipe()
    reader, from_browser = os.pipe()
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
    # The browser reads commands from descriptor 3 and answers on 4.
    words = ["bash", "-c", f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}', program, *options]
    words += [f"--user-data-dir={folder / 'profile'}"]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        with started(words, pass_fds=(to_browser, from_browser), **silent):
            os.close(to_browser)
            os.close(from_browser)
            yield BrowserPage(DevTools(reader, writer))
    finally:
        os.close(reader)
        os.close(writer)
