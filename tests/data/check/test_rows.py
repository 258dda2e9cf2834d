"""Single rows: problems by field, and agreement with the rows that training accepts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.data.check.report import check_file, report_summary
from llava.data.check.rows import view_row
from llava.data.check.rules import RULES
from llava.data.records import load_samples, read_default
from llava.errors import DataError
from llava.samples import with_placeholders
from llava.utils.json_rows import decode_row
from tests.support.check_files import check_rows, row, rules_of, write_rows

TURNS = row(0)["conversations"]
HUMAN, GPT = TURNS


@pytest.mark.parametrize(
    ("value", "rules"),
    [
        (row(0, "a.png"), []),
        (row(0), []),
        (DataError("not JSON"), ["unreadable"]),
        ([], ["row-type"]),
        (None, ["row-type"]),
        (row(0, id=1.5), ["id"]),
        (row(0, id=True), ["id"]),
        (row(0, image=3), ["image-field"]),
        (row(0, image=["a", ""]), ["image-field"]),
        (row(0, image=3, id=[]), ["id", "image-field"]),
        ({"id": "a", "conversations": "text"}, ["conversation"]),
        ({"id": "a", "conversations": [HUMAN, HUMAN]}, ["conversation"]),
        ({"id": "a", "conversations": [{"from": "other", "value": "x"}]}, ["conversation"]),
        ({"id": "a", "conversations": [{"from": "human", "value": None}]}, ["conversation"]),
        ({"id": [], "image": {}, "conversations": [7]}, ["id", "image-field", "conversation"]),
        ({"id": "a"}, ["no-conversation"]),
        ({"id": "a", "conversations": []}, ["no-conversation"]),
        ({"id": "a", "conversations": None, "image": 5}, ["no-conversation", "image-field"]),
        ({"id": "a", "conversations": [HUMAN]}, ["no-answer"]),
        ({"question_id": 4, "text": "What is seen?\n<image>", "image": "a.png"}, []),
        ({"question_id": 4, "text": ["What is seen?"]}, ["conversation"]),
        (row(0, conversations=[{"from": "human", "value": "<image>"}, GPT]), ["places", "empty-text"]),
        (row(0, "a.png", conversations=[{"from": "human", "value": "<image><image> ?"}, GPT]), ["places"]),
        (row(0, answer_type="maybe"), ["answer-type"]),
        (row(0, answer_type="closed"), []),
        (row(0, note="\ud800"), ["text"]),
        (row(0, **{"\udfff": 1}), ["text"]),
        (row(0, image=["a\udc00.png"]), ["text"]),
    ],
)
def test_problems_of_a_row(value: Any, rules: list[str]) -> None:
    found = value if isinstance(value, DataError) else decode_row(json.dumps(value))
    assert [problem.rule for problem in view_row(found, 0).problems] == rules


SECRET = "Jane Roe, born in May"


@pytest.mark.parametrize(
    "value",
    [
        {"id": {SECRET: SECRET}, "image": {SECRET: 1}, "conversations": [SECRET]},
        {"id": "a", "conversations": [{"from": SECRET, "value": SECRET}]},
        {"id": "a", "conversations": [{"from": "human", "value": [SECRET]}]},
        {"id": "a", "conversations": [{"from": "human", "value": f"{SECRET} <image><image>"}]},
    ],
    ids=["fields", "speaker", "value", "placeholders"],
)
def test_no_message_shows_text_of_a_row(value: dict[str, Any]) -> None:
    problems = view_row(value, 0).problems
    assert problems and all(SECRET not in problem.message for problem in problems)


def test_what_is_read_leniently_is_counted() -> None:
    old = {"conversatons": [{"from": "user", "value": "?"}, {"from": "assistant", "value": 3}]}
    seen = view_row(old, 5)
    assert seen.problems == () and not seen.has_id and len(seen.repairs) == 4
    late = view_row({"id": "a", "conversations": [GPT, HUMAN, GPT]}, 0)
    assert late.repairs == ("an answer before the first question, dropped",)


turn = st.fixed_dictionaries(
    {"from": st.sampled_from(["human", "gpt", "user", "system", "x"]), "value": st.text(max_size=5) | st.integers()}
)
fields = st.fixed_dictionaries(
    {},
    optional={
        "id": st.text(max_size=3) | st.integers() | st.none() | st.booleans(),
        "question_id": st.integers(),
        "text": st.text(max_size=3) | st.none(),
        "image": st.none() | st.text(max_size=3) | st.lists(st.text(max_size=2), max_size=2) | st.integers(),
        "conversations": st.lists(turn, max_size=4) | st.none() | st.text(max_size=2) | st.lists(st.none(), max_size=1),
        "conversatons": st.lists(turn, max_size=2),
        "answer_type": st.none() | st.sampled_from(["OPEN", "x"]) | st.integers(),
    },
)


@settings(max_examples=300, deadline=None)
@given(value=fields | st.lists(st.none(), max_size=1) | st.text(max_size=3))
def test_errors_are_exactly_what_training_refuses(value: Any) -> None:
    seen = view_row(value, 3)
    errors = [problem for problem in seen.problems if RULES[problem.rule].level == "error"]
    refused = "no-conversation" in [problem.rule for problem in seen.problems]
    try:
        if not isinstance(value, dict):
            raise DataError("no object")
        with_placeholders(read_default(value, "3")[0])
    except DataError:
        assert errors or refused
    else:
        assert not errors and not refused and seen.sample is not None


def test_rows_that_repeat(tmp_path: Path) -> None:
    rows = [row(0), row(1), {**row(0), "id": "other"}, {**row(2), "id": "row 1"}, row(3, id=5), row(4, id="5")]
    found = check_rows(tmp_path, rows)
    assert found == {"repeated-row": [2], "repeated-id": [3, 5]}


def test_rows_without_an_id_do_not_repeat_the_ids_of_others(tmp_path: Path) -> None:
    nameless = row(7)
    del nameless["id"]
    assert check_rows(tmp_path, [row(0, id="1"), nameless]) == {}


@pytest.mark.parametrize(
    "wrapped",
    [
        {"data": [row(0), row(1)]},
        {"version": 2, "rows": [row(0)]},
        {"train": [row(0)], "test": []},
        {"data": {"train": [row(0)], "val": [row(1)]}},
        {"0": row(0), "1": row(1)},
        {"data": {"a": row(0)}},
        {"row": {"id": 1, "conversatons": row(0)["conversations"]}},
    ],
)
def test_rows_inside_an_object_are_an_error(tmp_path: Path, wrapped: dict[str, Any]) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(wrapped))
    report = check_file(tmp_path / "rows.json")
    assert rules_of(report)["wrapped"] == [0] and report.exit_status(strict=False) == 1
    with pytest.raises(DataError, match="no conversation"):
        read_default(wrapped, "0")


@pytest.mark.parametrize(
    "content",
    [b"", b"\n \n", b"[]", b" [ ] ", b"\xef\xbb\xbf", gzip.compress(b"", mtime=0), gzip.compress(b"[]", mtime=0)],
)
def test_a_file_without_rows_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    report = check_file(path)
    assert rules_of(report) == {"no-rows": []} and report.exit_status(strict=False) == 1
    assert "[no-rows]" in report_summary(report, strict=False)
    with pytest.raises(DataError, match="empty"):
        load_samples(path)
    other = check_file(write_rows(tmp_path / "good.json", [row(0)]), against=path)
    assert other.exit_status(strict=False) == 1


@pytest.mark.parametrize(
    "system", ["<image> Be brief.", "<image>", "Look at <image>", "a\n<image>\nb", "<image><image>"]
)
@pytest.mark.parametrize("image", [None, "a.png"])
def test_a_placeholder_in_the_system_prompt_is_an_error(system: str, image: str | None) -> None:
    turns = [{"from": "system", "value": system}, *row(0, image)["conversations"]]
    assert [problem.rule for problem in view_row(row(0, image, conversations=turns), 0).problems] == ["places"]


@pytest.mark.parametrize("name", ["img", "image_path", "figure", "Images"])
def test_images_in_fields_that_are_not_read_are_errors(name: str) -> None:
    assert [problem.rule for problem in view_row(row(0, **{name: "a.png"}), 0).problems] == ["image-field"]
    seen = view_row(row(0, conversations=[{"from": "human", "value": "<img>a.png</img> ?"}, GPT]), 0)
    assert [problem.rule for problem in seen.problems] == ["conversation"]


def test_images_under_images_are_images() -> None:
    seen = view_row(row(0, images=["a.png"]), 0)
    assert seen.problems == () and seen.images == ("a.png",)
