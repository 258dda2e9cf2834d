"""The cache folder: its place, private files, and one line where it cannot be written."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest

from llava.errors import ConfigError
from llava.utils import files
from llava.utils.files import cache_folder, write_cache


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (None, "HOME/.cache/llava"),
        ("", "HOME/.cache/llava"),
        ("~/fast", "HOME/fast"),
        ("/x/y", "/x/y"),
        ("near", "near"),
    ],
)
def test_the_place_of_the_cache(
    variable: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LLAVA_CACHE", raising=False)
    if variable is not None:
        monkeypatch.setenv("LLAVA_CACHE", variable)
    assert cache_folder() == Path(expected.replace("HOME", str(tmp_path)))


def test_a_user_without_a_home_folder_is_told_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LLAVA_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(ConfigError, match="set LLAVA_CACHE to a folder"):
        cache_folder()


def test_only_its_user_can_read_a_cache_file(tmp_path: Path) -> None:
    assert write_cache(tmp_path / "new" / "index.json", "{}", lost="nothing")
    assert (tmp_path / "new" / "index.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.EPERM])
def test_a_cache_that_cannot_be_written_costs_one_line(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, "write_atomic", fail)
    with caplog.at_level(logging.WARNING):
        for name in ("a.json", "b.json", "a.json"):
            assert not write_cache(tmp_path / "cache" / name, "{}", lost="all is computed again")
    (record,) = caplog.records
    assert record.getMessage() == (
        f"cache {tmp_path / 'cache'} cannot be written ({os.strerror(number).lower()}); set LLAVA_CACHE to a writable "
        "folder; all is computed again"
    )
