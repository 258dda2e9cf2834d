"""Preference files in `llava data check`: unusable pairs, leaks, lengths, tokens, and the copy without errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava.data.check.cli import main, write_fixed
from llava.data.check.pairs import PairLengths, pair_lines
from llava.data.check.report import check_file, report_data, report_summary
from llava.data.preference_formats import read_preference
from tests.support.check_files import check_rows, row, rules_of, smooth, write_rows


def pair(number: int, chosen: str = "a long answer", rejected: str = "no", **fields: Any) -> dict[str, Any]:
    base = {"id": f"pair {number}", "prompt": f"Is sign {number} seen here?", "chosen": chosen, "rejected": rejected}
    return {**base, "image": f"{number}.png", **fields}


def test_lengths_and_the_longer_answer() -> None:
    lengths = PairLengths()
    for number, (chosen, rejected) in enumerate([("a b c", "d"), ("a", "b c"), ("a b", "c d"), ("a b c d", "e f")]):
        lengths.add(read_preference(pair(number, chosen, rejected), default_id="0"))
    table = lengths.table()
    assert table is not None and table["pairs"] == 4 and table["longer_wins"] == 0.625 and table["equal_length"] == 0.25
    assert table["words"]["chosen"] == {"mean": 2.5, "shortest": 1, "median": 3, "p90": 4, "longest": 4}
    assert "62.5 %" in pair_lines(table)[0]
    assert PairLengths().table() is None


def test_unusable_pairs_are_errors(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "a"}]
    rows = [
        pair(0),
        pair(1, rejected="a long answer"),
        pair(2, rejected=" "),
        {"id": "x", "chosen_conversations": turns, "reject_conversations": [{**turns[0], "value": "other"}, turns[1]]},
        {"q": "Q", "img": "1.png", "p": "a", "r": "b"},
        pair(3, image=["3.png", "4.png"], prompt="<image> one placeholder"),
    ]
    assert check_rows(tmp_path, rows) == {"pair": [1, 2, 3], "places": [5]}


def test_repeated_pairs_differ_in_either_answer(tmp_path: Path) -> None:
    rows = [pair(0), pair(0, rejected="maybe", id="b"), pair(0, id="c")]
    assert check_rows(tmp_path, rows) == {"repeated-row": [2]}


def test_leaks_into_a_test_set_of_other_rows(tmp_path: Path) -> None:
    for name in ("images", "others"):
        (tmp_path / name).mkdir()
    for number in range(3):
        smooth(number).save(tmp_path / "images" / f"{number}.png")
    smooth(1).save(tmp_path / "others" / "test.png")
    against = write_rows(tmp_path / "test.json", [row(1, "test.png")])
    path = write_rows(tmp_path / "pairs.json", [pair(number) for number in range(3)])
    report = check_file(path, images=tmp_path / "images", against=against, against_images=tmp_path / "others")
    found = rules_of(report)
    assert found["leak-bytes"] == [1] and found["leak-pair"] == [1]
    fixed = write_fixed(report, tmp_path / "clean.json")
    assert (fixed.num_kept, fixed.num_dropped) == (2, 1)
    assert json.loads((tmp_path / "clean.json").read_text()) == [pair(0), pair(2)]


def test_identifiers_in_the_rejected_answer(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "a"}]
    other = [turns[0], {"from": "gpt", "value": "Call 555-123-4567 or write to a.b@example.org"}]
    rows = [{"id": "1", "chosen_conversations": turns, "reject_conversations": other}]
    assert "identifier-email" in check_rows(tmp_path, rows)


def test_the_report_shows_the_table(tmp_path: Path) -> None:
    report = check_file(write_rows(tmp_path / "pairs.json", [pair(0), pair(1, "x", "y z")]))
    data = report_data(report, strict=False)
    assert data["files"]["file"]["preferences"]["longer_wins"] == 0.5
    assert "'the longer answer wins' is right in 50.0 %" in report_summary(report, strict=False)
    plain = check_file(write_rows(tmp_path / "rows.json", [row(0)]))
    assert report_data(plain, strict=False)["files"]["file"]["preferences"] is None
    assert "preference" not in report_summary(plain, strict=False)


def test_the_command_ends_with_an_error_for_a_bad_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "pairs.json", [pair(0), pair(1, rejected="a long answer")])
    with pytest.raises(SystemExit) as ended:
        main([str(path)])
    assert ended.value.code == 1 and "preference pair cannot be used" in capsys.readouterr().out
    main([str(write_rows(path, [pair(0)]))])


def test_labeled_answers_have_a_table_and_named_errors(tmp_path: Path) -> None:
    labeled = [
        {"id": str(number), "prompt": "Q?", "completion": "word " * length, "label": length > 2}
        for number, length in enumerate((1, 2, 3, 4))
    ]
    bad = [labeled[0] | {"label": "yes"}, labeled[1] | {"completion": ""}]
    report = check_file(write_rows(tmp_path / "labeled.json", [*labeled, *bad]))
    assert rules_of(report)["label"] == [4, 5]
    table = report_data(report, strict=False)["files"]["file"]["labels"]
    assert (table["answers"], table["good"], table["longer_is_good"]) == (4, 2, 1.0)
    text = report_summary(report, strict=False)
    assert "labeled answers: 4, of which 50.0 % are good; the longer of two is the good one in 100.0 %" in text
    write_fixed(report, tmp_path / "clean.json")
    assert json.loads((tmp_path / "clean.json").read_text()) == labeled


@pytest.mark.parametrize("label", ["ARDS", 1, None])
def test_a_class_named_label_makes_no_labeled_answer(tmp_path: Path, label: object) -> None:
    report = check_file(write_rows(tmp_path / "rows.json", [row(0) | {"label": label}]))
    assert report_data(report, strict=False)["files"]["file"]["labels"] is None and "label" not in rules_of(report)


def test_labels_of_one_kind_have_no_rule(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "a"}]
    report = check_file(write_rows(tmp_path / "labeled.json", [{"id": "0", "messages": messages, "kto_tag": True}]))
    assert "all have the same label" in report_summary(report, strict=False)
