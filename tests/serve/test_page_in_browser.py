"""The page in Chromium: upload, growing answer, stop, vote, clear, recovery, narrow window, no outside URL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("gradio")

from llava.serve.admission import Admission
from llava.serve.page import PageServer
from llava.serve.page_chat import phantom_png
from llava.serve.page_run import make_page_app, private_folder
from tests.serve.test_controller import controller
from tests.support.chromium import BrowserPage, browser
from tests.support.dicom_files import RAMP, make
from tests.support.served import MODEL, ScriptedEngine, scripted_app, served
from tests.support.waiting import until

FIELD = "#llava-question textarea"
ANSWERS = "[...document.querySelectorAll('[data-testid=bot]')].map(x => x.innerText).join('|')"


def ask(page: BrowserPage, text: str) -> None:
    page.type(FIELD, text)
    assert page.until(f"document.querySelector('{FIELD}').value == {text!r}")
    # The page ignores Enter until the event of the last answer has ended, shortly after its text is complete.
    for _ in range(10):
        page.press("Enter")
        if page.until(f"document.querySelector('{FIELD}').value == ''", 3.0):
            return
    raise AssertionError("the page does not take the question")


def choose(page: BrowserPage, label: str, option: str) -> None:
    """Choose an option of a list by its name."""
    field = f"input[aria-label='{label}']"
    page.value(f'document.activeElement.blur(); document.querySelector("{field}").select()')
    page.type(field, option)
    page.press("Enter")


def act_until(page: BrowserPage, act: Callable[[], object], script: str) -> None:
    """Do something again until it has its effect: a component that is just updated may miss an event."""
    for _ in range(10):
        act()
        if page.until(script, 6.0):
            return
    raise AssertionError(f"without effect: {script}")


def has_model(page: BrowserPage) -> bool:
    return page.until(f"[...document.querySelectorAll('input')].some(x => x.value == '{MODEL}')")


def shows(page: BrowserPage, text: str) -> bool:
    """Return whether the answers come to contain a text."""
    return page.until(f"({ANSWERS}).includes({text!r})")


def phantom(folder: Path) -> Path:
    """Return the path of a written image."""
    path = folder / "phantom.png"
    path.write_bytes(phantom_png())
    return path


def resume(engine: ScriptedEngine) -> None:
    """Let answers continue to their ends."""
    engine.pause_after = 0
    engine.hold.set()


def test_the_page_in_a_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("llava.serve.page.POLL_SECONDS", 0.5)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    engine = ScriptedEngine([f"word{number} " for number in range(12)])
    engine.pause_after = 3
    image = phantom(tmp_path)
    with private_folder() as uploads, controller() as (client, _), browser(tmp_path) as page:
        server = PageServer(str(client.base_url).rstrip("/"), Admission(max_running=9))
        with served(make_page_app(server, frozenset())) as url:
            page.open(url)
            assert page.until("document.querySelector('#llava-status')?.innerText.includes('No worker')")
            with served(scripted_app(engine, context=4096)) as worker:
                body = {"worker_name": worker, "check_heart_beat": False}
                assert client.post("/register_worker", json=body).status_code == 200
                assert has_model(page)
                page.choose_file("#llava-question input[type=file]", image)
                assert page.until("!!document.querySelector('.llava-frame img')")
                assert until(lambda: not any(path.is_file() for path in uploads.rglob("*")))
                ask(page, "What is shown?")
                assert shows(page, "word2") and "word3" not in page.value(ANSWERS)
                resume(engine)
                assert shows(page, "tokens of answer") and "word11" in page.value(ANSWERS)
                assert len(engine.prompts[-1][0].images) == 1
                engine.pause_after = 2
                ask(page, "And where?")
                assert until(lambda: len(engine.handles) == 2 and not engine.hold.is_set())
                page.press("Escape")
                assert until(lambda: engine.handles[-1].is_cancelled)
                assert shows(page, "stopped")
                resume(engine)
                page.click("Regenerate")
                assert page.until(
                    f"!({ANSWERS}).includes('stopped') && ({ANSWERS}).split('tokens of answer').length == 3"
                )
                off = "[...document.querySelectorAll('button')].filter(b => /vote|Flag/.test(b.innerText))"
                assert page.until(f"{off}.every(b => !b.disabled)")
                page.click("Upvote")
                assert page.until(f"{off}.every(b => b.disabled)") and until(lambda: server.num_votes == {"upvote": 1})
                assert until(lambda: page.faint_texts() == []), page.faint_texts()
                page.click("Clear")
                assert page.until(f"{ANSWERS} == '' && !document.querySelector('.llava-frame')")
                page.resize(390, 844)
                assert page.until("document.documentElement.scrollWidth <= 390")
                unnamed = "[...document.querySelectorAll('button')].filter(b => !(b.innerText.trim() || b.ariaLabel))"
                assert page.value(f"{unnamed}.length") == 0
                page.save_screenshot(tmp_path / "narrow.png")
                page.prefer_dark(True)
                page.open(url, width=390, height=844)
                assert has_model(page)
                assert page.until("getComputedStyle(document.body).backgroundColor != 'rgb(255, 255, 255)'")
                assert until(lambda: page.faint_texts() == []), page.faint_texts()
            assert page.requests == {url} and page.errors == []


def test_a_window_outside_of_the_usual_ranges_can_be_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    radiograph, section = tmp_path / "radiograph.dcm", tmp_path / "section.dcm"
    radiograph.write_bytes(make(RAMP, Modality="CR", WindowCenter=32768, WindowWidth=65536))
    section.write_bytes(make(RAMP, Modality="CT", WindowCenter=40, WindowWidth=400))
    text = "document.querySelector('.llava-frame img')?.alt"
    center = "document.querySelector(\"input[aria-label='number input for Window level (center)']\")"
    with private_folder(), browser(tmp_path) as page:
        server = PageServer("http://127.0.0.1:9", Admission(max_running=9), reloads=False)
        with served(make_page_app(server, frozenset())) as url:
            page.open(url)
            assert page.until("document.querySelector('#llava-status')?.innerText.includes('No worker')")
            page.choose_file("#llava-question input[type=file]", radiograph)
            assert page.until(f"{text} == 'radiograph.dcm, window file, frame 0' && {center}?.value == '32768'")
            move = f"{center}.value = '30000'; {center}.dispatchEvent(new Event('input', {{bubbles: true}}))"
            for change, window in (
                (lambda: page.value(f"{move}; {center}.dispatchEvent(new Event('blur'))"), "30000,65536"),
                (lambda: choose(page, "DICOM window", "full"), "full"),
            ):
                act_until(page, change, f"{text} == 'radiograph.dcm, window {window}, frame 0'")
            page.choose_file("#llava-question input[type=file]", section)
            assert page.until(f"{text} == 'section.dcm, window file, frame 0'")
            assert page.until(f"{center}.value == '40' && {center}.max == '4000'")
            assert page.errors == []


def test_two_sessions_never_see_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("llava.serve.page.POLL_SECONDS", 0.5)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    engine = ScriptedEngine([f"word{number} " for number in range(12)])
    engine.pause_after = 3
    image = phantom(tmp_path)
    everything = "document.body.innerText + [...document.querySelectorAll('img')].map(x => x.src).join()"
    with private_folder(), controller() as (client, _), browser(tmp_path) as first:
        server = PageServer(str(client.base_url).rstrip("/"), Admission(max_running=9))
        with served(make_page_app(server, frozenset())) as url:
            second = first.stranger()
            for page in (first, second):
                page.open(url)
                assert page.until("document.querySelector('#llava-status')?.innerText.includes('No worker')")
            with served(scripted_app(engine, context=4096)) as worker:
                body = {"worker_name": worker, "check_heart_beat": False}
                assert client.post("/register_worker", json=body).status_code == 200
                assert has_model(first) and has_model(second)
                first.choose_file("#llava-question input[type=file]", image)
                assert first.until("!!document.querySelector('.llava-frame img')")
                ask(first, "Alpha of the first patient")
                assert until(lambda: len(engine.handles) == 1)
                ask(second, "Beta of the second patient")
                assert until(lambda: len(engine.handles) == 2)
                # Neither answer is complete; the first is stopped, and the second must not notice.
                first.press("Escape")
                assert until(lambda: engine.handles[0].is_cancelled)
                assert shows(first, "stopped")
                resume(engine)
                assert shows(second, "word11")
                (mine, _), (theirs, _) = engine.prompts
                assert len(mine.images) == 1 and len(theirs.images) == 0
                assert len(theirs.conversation.turns) == 1 and "Alpha" not in theirs.conversation.turns[0].text
                shown, other = first.value(everything), second.value(everything)
                assert "Alpha" in shown and "Beta" not in shown and "Beta" in other and "Alpha" not in other
                assert "stopped" not in other and not second.value("!!document.querySelector('.llava-frame img')")
                first.click("Clear")
                assert first.until(f"{ANSWERS} == ''") and "word11" in second.value(ANSWERS)
                first.save_screenshot(tmp_path / "first.png")
                second.save_screenshot(tmp_path / "second.png")
            assert first.errors == second.errors == []
