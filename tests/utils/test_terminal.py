"""Control characters as visible escapes: one function, applied wherever names and texts reach a terminal or a log."""

from __future__ import annotations

import logging
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.errors import DataError
from llava.utils import log
from llava.utils.cli import Parser, run_program
from llava.utils.terminal import visible, visible_lines, visible_message

HOSTILE = {
    "color": ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
    "title": ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
    "one-byte sequence": ("\x9b2J", r"\x9b2J"),
    "backspaces": ("bad\b\b\bgood", r"bad\x08\x08\x08good"),
    "carriage return": ("bad\rgood", r"bad\rgood"),
    "bidirectional": ("a\u202egnp.exe\u2066", r"a\u202egnp.exe\u2066"),
    "separator": ("a\u2028b", r"a\u2028b"),
    "half of a pair": ("a\udc9b", r"a\udc9b"),
    "tag": ("a\U000e0041", r"a\U000e0041"),
    "line feed": ("a\nllava: error: b", r"a\nllava: error: b"),
}


@pytest.mark.parametrize(("text", "shown"), HOSTILE.values(), ids=HOSTILE)
def test_control_characters_are_escapes(text: str, shown: str) -> None:
    assert visible(text) == shown


@given(st.text())
def test_no_hidden_character_is_left(text: str) -> None:
    kept = {"\u00ad", "\u200c", "\u200d"}
    for shown, allowed in ((visible(text), kept), (visible_lines(text), kept | {"\n", "\t"})):
        hidden = [c for c in shown if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
        assert set(hidden) <= allowed


@pytest.mark.parametrize(
    "text", ["", "CT 3.5 cm\u00b2", "\u5de6\u80ba", "na\u00efve \U0001f600", "\u0645\u0650\u064a\u200c\u062e"]
)
def test_other_text_is_unchanged(text: str) -> None:
    assert visible(text) == visible_lines(text) == visible_message(text) == text


def test_a_message_cannot_look_like_two() -> None:
    assert (
        visible_message("rows cannot be used:\n  row 1\nllava: error: x")
        == "rows cannot be used:\n  row 1\n  llava: error: x"
    )


def test_errors_of_a_command_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise DataError("image \x1b[2J\u202e.png is missing")

    with pytest.raises(SystemExit):
        run_program(fail)
    assert capsys.readouterr().err == "llava: error: image \\x1b[2J\\u202e.png is missing\n"


def test_file_system_errors_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_program(lambda: open("/nonexistent/\x1b[2J"))  # noqa: SIM115 - fails
    assert "\x1b" not in capsys.readouterr().err


def test_log_lines_are_escaped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    formatter = log.VisibleFormatter("%(levelname)s %(message)s")
    record = logging.LogRecord("llava", logging.INFO, "", 0, "file %s", ("\x1b[2J\n12:00 ERROR",), None)
    assert formatter.format(record) == "INFO file \\x1b[2J\n  12:00 ERROR"


def test_titles_of_progress_bars_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    list(log.with_progress(range(2), title="rows of \x1b]0;x\x07.json"))
    log.progress_bar(1, title="rows of \x1b]0;y\x07.json").close()
    shown = capsys.readouterr().err
    assert "\x1b]0" not in shown and "\\x1b]0;x\\x07" in shown and "\\x1b]0;y\\x07" in shown


def test_usage_errors_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        Parser(prog="x").parse_args(["--\x1b[2J"])
    shown = capsys.readouterr().err
    assert "\x1b" not in shown and "\\x1b[2J" in shown
