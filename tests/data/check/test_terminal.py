"""No control character of names or rows reaches the output of the check."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava.data.check.cli import main
from tests.support.check_files import row, smooth, write_rows

ESCAPES = ["\x1b]0;title\x07", "\x1b[2J\x1b[31m", "\x9b31m", "\u202eorder", "back\x08\x7f"]


@pytest.mark.parametrize("escape", ESCAPES)
def test_control_characters_are_visible_escapes(
    tmp_path: Path, escape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    smooth(0).save(images / f"{escape}.png")
    fields = {name: f"{escape} class" for name in ("answer_type", "modality", "question_type", escape)}
    rows = [row(number, f"{escape}.png", **fields) for number in range(5)]
    rows += [row(5, f"missing{escape}.png"), {escape: 1}, {"id": 1, "images": 3, f"img{escape}": "a"}]
    path = write_rows(tmp_path / f"rows{escape}.json", rows)
    page, data, copy = tmp_path / "p.html", tmp_path / f"d{escape}.json", tmp_path / "c.json"
    words = [path, "--images", images, "--html", page, "--json", data, "--fix", copy]
    with pytest.raises(SystemExit):
        main([str(word) for word in words])
    shown = capsys.readouterr()
    for text in (shown.out, shown.err, page.read_text()):
        assert not set(escape) & set(text) & set("\x1b\x07\x08\x7f\x9b\u202e")
    assert repr(escape)[1:-1] in shown.out
