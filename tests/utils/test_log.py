"""Log messages and progress bars appear once, on the first rank."""

from __future__ import annotations

import io
import logging

import pytest

from llava.utils import log


def test_warn_once(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("llava.test_warn_once")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            log.warn_once(logger, "100% of the flags have no effect")
    assert [record.getMessage() for record in caplog.records] == ["100% of the flags have no effect"]


@pytest.mark.parametrize(("rank", "silent"), [("0", False), ("1", True)])
def test_progress_is_for_the_first_rank(monkeypatch: pytest.MonkeyPatch, rank: str, silent: bool) -> None:
    monkeypatch.setenv("RANK", rank)
    bar = log.with_progress(range(3), title="three")
    assert bar.disable is silent
    assert list(bar) == [0, 1, 2]


def test_the_log_follows_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first stream may be closed when a later line is written, as between two tests or in a notebook."""
    logger = logging.getLogger("llava")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    first, second = io.StringIO(), io.StringIO()
    for stream, line in ((first, "one"), (second, "two")):
        monkeypatch.setattr("sys.stderr", stream)
        log.setup_logging()
        logger.info(line)
    assert first.getvalue().endswith("INFO one\n") and second.getvalue().endswith("INFO two\n")
    assert len(logger.handlers) == 1
