"""Uploads of the page: nothing stays on the disk, and no session loses a file that another one sent too."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava.serve.page_uploads import KEPT_SECONDS, Uploads


class Clock:
    """Clock that a test sets."""

    seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def uploads(clock: Clock) -> Uploads:
    return Uploads(clock)


def uploaded(folder: Path, name: str = "a.png", content: bytes = b"x") -> str:
    """Write a file where Gradio puts it: in a folder named by the content."""
    path = folder / content.hex() / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return str(path)


def test_files_are_read_and_removed(uploads: Uploads, tmp_path: Path) -> None:
    path = uploaded(tmp_path)
    assert uploads.take([path, str(tmp_path / "gone.png")], "first") == [("a.png", b"x")]
    assert [one for one in tmp_path.rglob("*") if one.is_file()] == [] and Path(path).parent.is_dir()


def test_a_change_that_is_reported_twice_adds_a_file_once(uploads: Uploads, tmp_path: Path) -> None:
    path = uploaded(tmp_path)
    assert uploads.take([path], "first")
    assert uploads.take([path], "first") == []


def test_two_sessions_that_send_one_file_both_get_it(uploads: Uploads, tmp_path: Path) -> None:
    path = uploaded(tmp_path)
    assert uploaded(tmp_path) == path
    assert uploads.take([path], "first") == uploads.take([path], "second") == [("a.png", b"x")]
    assert uploads.take([path], "first") == uploads.take([path], "second") == []


def test_a_file_that_is_sent_again_is_added_again(uploads: Uploads, tmp_path: Path) -> None:
    for _ in range(3):
        assert uploads.take([uploaded(tmp_path)], "first") == [("a.png", b"x")]


def test_files_of_other_names_and_contents_are_apart(uploads: Uploads, tmp_path: Path) -> None:
    paths = [uploaded(tmp_path), uploaded(tmp_path, "b.png"), uploaded(tmp_path, content=b"y")]
    found = [("a.png", b"x"), ("b.png", b"x"), ("a.png", b"y")]
    assert uploads.take(paths, "first") == found == uploads.take(paths, "second")


@pytest.mark.parametrize("is_late", [True, False])
def test_contents_are_not_kept_for_long(uploads: Uploads, clock: Clock, tmp_path: Path, is_late: bool) -> None:
    path = uploaded(tmp_path)
    uploads.take([path], "first")
    clock.seconds += KEPT_SECONDS + (1 if is_late else -1)
    assert bool(uploads.take([path], "second")) is not is_late


def test_contents_of_a_closed_session_are_dropped(uploads: Uploads, tmp_path: Path) -> None:
    first, second = uploaded(tmp_path), uploaded(tmp_path, content=b"y")
    uploads.take([first], "first")
    uploads.take([second], "second")
    uploads.forget("first")
    assert uploads.take([first, second], "third") == [("a.png", b"y")]
