"""Validation before training: bad rows raise errors that name them, or are skipped, counted and listed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava.data import validate
from llava.data.encode import encode
from llava.data.image_store import ImageIndex
from llava.data.quarantine import BadRow, Quarantine, bad_rows_message
from llava.data.validate import Checked, check_trainable
from llava.errors import DataError
from llava.imaging import decode
from llava.samples import Conversation, Origin, Sample, Turn


def row(number: int, *texts: str, image: str | None = None) -> Sample:
    turns = tuple(Turn("gpt" if index % 2 else "human", text) for index, text in enumerate(texts))
    return Sample(f"s{number}", Conversation(turns), (image,) if image else (), origin=Origin("train.json", number))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("good.png", "other.png"):
        Image.new("RGB", (20, 30), (60, len(name), 200)).save(folder / name)
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:50])
    return folder


GOOD = [
    row(0, "<image>\nwhat?", "a cell", image="good.png"),
    row(1, "what?", "a cell", image="other.png"),
    row(2, "who?", "me"),
]
BAD = {
    "gone.png cannot be read": row(3, "q", "a", image="gone.png"),
    "cut.png cannot be decoded": row(4, "q", "a", image="cut.png"),
    "outside the image folder": row(5, "q", "a", image="../x.png"),
    "names no image": row(6, "<image>\nq", "a"),
    "no token is left to train": row(7, "q"),
}


def check(samples: list[Sample], folder: Path, tiny: Any, **options: Any) -> Checked:
    return check_trainable(samples, folder, tiny.processor, index=ImageIndex(folder), **options)


def test_good_rows_pass_and_are_counted(tiny: Any, folder: Path) -> None:
    found = check(GOOD, folder, tiny)
    assert found.samples == GOOD
    assert (found.bad, found.num_images, found.num_shortened, found.num_cut_tokens) == ([], 2, 0, 0)
    assert found.num_trained_tokens >= len("a cell" * 2 + "me")


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_row_is_an_error_that_names_it(tiny: Any, folder: Path, reason: str) -> None:
    bad = BAD[reason]
    assert bad.origin is not None
    with pytest.raises(DataError) as caught:
        check([*GOOD, bad], folder, tiny)
    message = str(caught.value)
    assert "1 of 4 rows cannot be used" in message and "--skip-bad" in message
    assert reason in message
    assert message.count(f"train.json, row {bad.origin.row}, id {bad.id!r}") == 1


def test_bad_rows_are_skipped_counted_and_listed(
    tiny: Any, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    quarantine.add([BadRow("train.json", 99, "s99", "found while reading")])
    mixed = [GOOD[0], *BAD.values(), *GOOD[1:]]
    with caplog.at_level(logging.WARNING):
        found = check(mixed, folder, tiny, skip_bad=True, quarantine=quarantine)
    assert found.samples == GOOD
    assert f"skipped 5 of 8 rows that cannot be used, listed in {quarantine.path}" in caplog.text
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == [99, 3, 4, 5, 6, 7]
    for line, reason in zip(lines[1:], BAD, strict=True):
        assert reason in line["reason"]
        assert "train.json" not in line["reason"]


def test_many_bad_rows_show_the_first_ones() -> None:
    rows = [BadRow("train.json", number, str(number), "is bad") for number in range(12)]
    message = bad_rows_message(rows, 20)
    assert message.startswith("12 of 20 rows")
    assert "row 4," in message and "row 5," not in message
    assert message.endswith("... and 7 more")


def test_no_row_left_is_an_error_even_when_skipping(tiny: Any, folder: Path) -> None:
    with pytest.raises(DataError, match="none of the 1 rows can be used for training"):
        check([BAD["no token is left to train"]], folder, tiny, skip_bad=True)


def test_truncation_is_counted_and_a_row_it_empties_is_bad(
    tiny: Any, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [row(0, "who?", "me"), row(1, "who?", "me and all the others"), row(2, "who " * 60 + "?", "me")]
    length = len(encode(rows[0].conversation, tiny.processor, max_length=None).input_ids)
    with caplog.at_level(logging.WARNING):
        found = check(rows, folder, tiny, max_length=length + 2, skip_bad=True)
    assert [sample.id for sample in found.samples] == ["s0", "s1"]
    assert found.num_shortened == 1
    assert found.num_cut_tokens > 0
    assert "no token is left to train after" in found.bad[0].reason
    assert f"1 of 3 rows are longer than {length + 2} tokens" in caplog.text


def test_a_second_run_decodes_nothing(tiny: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(validate, "MIN_REMEMBERED", 1)
    rows = [*GOOD, *BAD.values()]
    first = check_trainable(rows, folder, tiny.processor, skip_bad=True)
    assert len(first.bad) == len(BAD)
    monkeypatch.setattr(decode, "read_image_bytes", lambda ref, root: pytest.fail(f"read {ref} again"))
    monkeypatch.setattr(validate, "_encode", lambda *_: pytest.fail("encoded again"))
    assert check_trainable(rows, folder, tiny.processor, skip_bad=True) == first
    for file in (tmp_path / "cache" / "images").glob("*.json"):
        assert file.stat().st_mode & 0o777 == 0o600
        names = [name for sample in rows for name in sample.images]
        assert not [name for name in (*names, str(folder)) if name in file.read_text()]


def test_rows_are_checked_again_when_anything_changed(
    tiny: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(validate, "MIN_REMEMBERED", 3)

    def num_outcomes() -> int:
        return len(list((tmp_path / "cache" / "images").glob("rows-*.json")))

    check_trainable(GOOD, folder, tiny.processor)
    check_trainable(GOOD[:2], folder, tiny.processor)
    assert num_outcomes() == 1
    check_trainable(GOOD, folder, tiny.processor, max_length=500)
    assert num_outcomes() == 2
    check_trainable([*GOOD[:2], row(2, "who?", "you")], folder, tiny.processor)
    assert num_outcomes() == 3
    (folder / "other.png").write_bytes((folder / "good.png").read_bytes())
    check_trainable(GOOD, folder, tiny.processor)
    assert num_outcomes() == 4
    (folder / "other.png").unlink()
    with pytest.raises(DataError, match=r"other\.png cannot be read"):
        check_trainable(GOOD, folder, tiny.processor)
    for outcome in (tmp_path / "cache" / "images").glob("rows-*.json"):
        outcome.write_text("{")
    with pytest.raises(DataError, match=r"other\.png cannot be read"):
        check_trainable(GOOD, folder, tiny.processor)
