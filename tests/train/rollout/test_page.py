"""`llava rules rollouts`: the table and the page of a run."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from llava.errors import ConfigError, DataError
from llava.train.rollout.page import MAX_STEPS, main
from tests.support.rollouts import episode
from tests.support.tiny import tiny_image


def write_run(folder: Path, num_steps: int, *, tail: str = "") -> Path:
    """Write the records of a run with random episodes."""
    draw = random.Random(0)
    (folder / "images").mkdir(parents=True)
    tiny_image(0).save(folder / "images" / "i.png")
    lines = []
    for step in range(1, num_steps + 1):
        for sample in range(4):
            line = episode(0, sample, draw)
            line.image, line.advantages = "i.png", [0.0] * len(line.turns)
            row = line.record(step)
            lines.append(json.dumps(row | {"violations": ["dark-cell"] if sample == 2 else []}) + "\n")
    (folder / "rollouts.jsonl").write_text("".join(lines) + tail)
    (folder / "resolved_arguments.json").write_text(json.dumps({"data": {"image_folder": str(folder / "images")}}))
    return folder


def test_the_page_shows_best_worst_and_contradictory_dialogues(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = write_run(tmp_path / "run", 3)
    main([str(run), "--html"])
    page = (run / "rollouts.html").read_text()
    assert "3 steps, 12 dialogues" in capsys.readouterr().out
    assert page.count("<dd>best</dd>") == page.count("<dd>worst</dd>") == 6
    assert page.count("<dd>contradictory</dd>") == 3 and "dark-cell" in page and "data:image/jpeg" in page
    assert page.count('type="radio"') == 4 and "<script" not in page


def test_a_long_run_shows_steps_from_first_to_last(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 40)
    main([str(run), "--html", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert page.count('type="radio"') == MAX_STEPS + 1
    assert ">step 1</label>" in page and ">step 40</label>" in page


def test_the_table_drops_an_incomplete_last_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main([str(write_run(tmp_path / "run", 2, tail='{"step": 3, "ca'))])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["step", "dialogues", "reward"] and len(lines) == 4


@pytest.mark.parametrize("name", ["rollouts.jsonl", "resolved_arguments.json"])
def test_the_page_does_not_replace_the_records(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / "run", 2)
    before = (run / name).read_bytes()
    with pytest.raises(ConfigError, match=r"--html .* would overwrite an input"):
        main([str(run), "--html", str(run / name)])
    assert (run / name).read_bytes() == before


@pytest.mark.parametrize(("text", "message"), [("", "no rollout yet"), ("[1]\n{}\n", "row 0: expected an object")])
def test_records_that_cannot_be_shown(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rollouts.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        main([str(tmp_path)])
