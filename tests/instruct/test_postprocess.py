"""Conversion of generated dialogues to training rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.errors import ConfigError, DataError
from llava.instruct import instruct_postprocess
from llava.instruct.postprocess import PAIR_OUTCOMES, image_first, parse_dialogue, training_rows
from llava.instruct.prompts import dialogue_text
from llava.samples import from_row
from llava.utils.jsonl import write_records


def generated(result: Any, identity: str = "91_F1") -> dict[str, Any]:
    return {"pair_id": identity, "domain": {"mri": True}, "fig_caption": "Plain.", "result": result}


def dialogue(*pairs: tuple[str, str]) -> str:
    return "\n\n".join(f"User: {question}\n\nAssistant: {answer}" for question, answer in pairs)


@pytest.mark.parametrize(
    ("text", "pairs", "num_malformed"),
    [
        ("User: a\n\nAssistant: b", [("a", "b")], 0),
        ("Here it is.\nUser: a Assistant: b\n\nUser: c\nAssistant:d", [("a", "b"), ("c", "d")], 0),
        ("User: a\nUser: b\nAssistant: c", [("b", "c")], 1),
        ("User: a\nAssistant: b\nAssistant: c\nUser: d\nAssistant: e", [("d", "e")], 1),
        ("**User:** a\n\n**Assistant:** b", [("** a\n\n**", "** b")], 0),
        ("Assistant: a", [], 0),
        ("", [], 0),
    ],
)
def test_parsing(text: str, pairs: list[tuple[str, str]], num_malformed: int) -> None:
    assert parse_dialogue(text) == (pairs, num_malformed)


PLAIN = st.text(max_size=20).map(str.strip).filter(lambda text: "User:" not in text and "Assistant:" not in text)


@settings(deadline=None)
@given(st.lists(st.tuples(PLAIN, PLAIN), max_size=5))
def test_what_is_written_is_read_back(pairs: list[tuple[str, str]]) -> None:
    turns = [{"from": who, "value": text} for pair in pairs for who, text in zip(("human", "gpt"), pair, strict=True)]
    assert parse_dialogue(dialogue_text(turns)) == (pairs, 0)


PIECES = st.sampled_from(["User:", "Assistant:", "\n\n", "<image>", "According to the caption, ", "a", " ", "User"])


ANYTHING = st.characters(codec=None)  # includes lone surrogates


@settings(deadline=None)
@given(st.lists(PIECES | st.text(ANYTHING, max_size=5), max_size=12).map("".join), st.booleans(), st.integers(0, 9))
def test_any_text_gives_rows_that_can_be_read_or_none(text: str, legacy: bool, seed: int) -> None:
    rows, counts = training_rows([generated(text)], mode="legacy" if legacy else "fixed", seed=seed)
    assert counts.rows.total() == 1 and counts.rows["kept"] == len(rows)
    num_parts = text.replace("" if legacy else "<image>", "").count("User:")
    assert counts.rows["no answer"] or counts.pairs.total() == num_parts
    for row in rows:
        assert json.dumps(row, ensure_ascii=False).encode()
        sample = from_row(row)
        if not legacy:
            assert sum(turn.text.count("<image>") for turn in sample.conversation.turns) == 1
            assert "<image>" in sample.conversation.turns[0].text
            assert all(turn.text for turn in sample.conversation.turns)


def test_the_row_as_published() -> None:
    text = dialogue(("What is it?", "A rim."), ("More?", "Yes, based on the description, MRI."))
    (row,), counts = training_rows([generated(text)])
    first = "<image>\nWhat is it?" if image_first("91_F1", 0) else "What is it?\n<image>"
    assert list(row) == ["id", "image", "domain", "conversations"]
    assert row == {
        "id": "91_F1",
        "image": "91_F1.jpg",
        "domain": {"mri": True},
        "conversations": [
            {"from": "human", "value": first},
            {"from": "gpt", "value": "A rim."},
            {"from": "human", "value": "More?"},
            {"from": "gpt", "value": "Yes, MRI."},
        ],
    }
    assert counts.pairs == {"R5 kept": 1, "R2 cut": 1, "malformed": 0}


def test_placeholder_survives_a_dropped_question() -> None:
    text = dialogue(("What?", "Sorry, no image is here."), ("Where?", "On the left."))
    for legacy, questions in ((True, ["Where?"]), (False, ["<image>\nWhere?", "Where?\n<image>"])):
        (row,), _ = training_rows([generated(text)], mode="legacy" if legacy else "fixed")
        assert row["image"] and len(row["conversations"]) == 2
        assert row["conversations"][0]["value"] in questions


def test_placeholder_position_is_fair_seeded_and_independent_per_row() -> None:
    tosses = [image_first(str(number), 0) for number in range(2000)]
    assert 900 < sum(tosses) < 1100
    assert tosses != [image_first(str(number), 1) for number in range(2000)]
    rows = [generated(dialogue(("q", "answer")), str(number)) for number in range(20)]
    everything, _ = training_rows(rows, seed=3)
    assert training_rows(rows[7:8], seed=3)[0] == everything[7:8]


@pytest.mark.parametrize("text", ["**User:** a\n\n**Assistant:** b", "*User*: a\n **Assistant**: b<image>"])
def test_bold_speakers_and_placeholders_of_the_model(text: str) -> None:
    (row,), _ = training_rows([generated(text)])
    values = [turn["value"] for turn in row["conversations"]]
    assert values[0] in ("<image>\na", "a\n<image>") and values[1:] == ["b"]


def test_unusable_rows_are_counted() -> None:
    texts = [None, " ", "no marks", dialogue(("a", "I'm sorry.")), dialogue(("", "b")), dialogue(("a", "b"))]
    rows, counts = training_rows([generated(text, str(number)) for number, text in enumerate(texts)])
    assert [row["id"] for row in rows] == ["5"]
    assert counts.rows == {"no answer": 2, "no dialogue": 1, "all dropped": 2, "kept": 1}
    assert counts.pairs["empty question"] == counts.pairs["R1 dropped"] == 1
    with pytest.raises(DataError, match="rows, row 1: field 'pair_id'"):
        training_rows([generated("x"), {"result": "x"}])


def run(tmp_path: Path, rows: Sequence[dict[str, Any]], *more: str) -> list[dict[str, Any]]:
    source, target = tmp_path / "gen.jsonl", tmp_path / "post.json"
    write_records(source, rows)
    instruct_postprocess.main(["--input_path", str(source), "--output_path", str(target), *more])
    found: list[dict[str, Any]] = json.loads(target.read_text(encoding="utf-8"))
    return found


def test_the_command_reads_lines_and_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [generated(dialogue(("q", "answer é")), str(number)) for number in range(3)]
    found = run(tmp_path, rows, "--report_path", str(tmp_path / "report.json"))
    assert (tmp_path / "post.json").read_text(encoding="utf-8").startswith('[\n  {\n    "id": "0"')
    source = tmp_path / "array.jsonl"
    source.write_text(json.dumps(rows))
    instruct_postprocess.main(["--input_path", str(source), "--output_path", str(tmp_path / "again.json")])
    assert json.loads((tmp_path / "again.json").read_text(encoding="utf-8")) == found
    shown = capsys.readouterr().out
    assert all(name in shown for name in PAIR_OUTCOMES)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["rows"]["kept"] == 3 and report["pairs"]["R5 kept"] == 3


def test_the_report_names_the_deciding_phrase(tmp_path: Path) -> None:
    rows = [generated(dialogue(("q", "Based on the caption, an MRI."), ("q", "So sorry.")))]
    report = tmp_path / "report.json"
    found = run(tmp_path, rows, "--legacy_rules", "--report_path", str(report))
    assert found[0]["conversations"][1]["value"] == "An mri."
    assert json.loads(report.read_text())["phrases"] == [
        {"outcome": "R1 dropped", "phrase": "sorry", "count": 1},
        {"outcome": "R2 cut", "phrase": "based on the caption, ", "count": 1},
    ]


def test_answers_that_were_paid_for_are_not_overwritten(tmp_path: Path) -> None:
    write_records(tmp_path / "gen.jsonl", [generated(dialogue(("a", "b")))])
    before = (tmp_path / "gen.jsonl").read_bytes()
    words = ["--input_path", str(tmp_path / "gen.jsonl"), "--output_path"]
    for more in ([words[1]], [str(tmp_path / "post.json"), "--report_path", words[1]]):
        with pytest.raises(ConfigError, match="would overwrite an input or another output"):
            instruct_postprocess.main([*words, *more])
    assert (tmp_path / "gen.jsonl").read_bytes() == before and not (tmp_path / "post.json").exists()


def test_nothing_left_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no row is left"):
        run(tmp_path, [generated("nothing")])
    assert not (tmp_path / "post.json").exists()
