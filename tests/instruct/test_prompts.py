"""Prompts for the generation of dialogues."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llava.errors import DataError
from llava.instruct.cleaning import clean_fixed, clean_legacy
from llava.instruct.instruct_few_shot_examples import DOMAINS, FEW_SHOT_EXAMPLES
from llava.instruct.postprocess import parse_dialogue
from llava.instruct.prompts import SYSTEM_TEXT, context_text, dialogue_text, messages_for, read_captions

CAPTIONS = Path("oracles/llava-med-eval/llava_med_eval_qa50_fig_captions.json")


def row(number: int = 0, **changes: Any) -> dict[str, Any]:
    """Return an invented caption row."""
    identity = f"9100000{number}_F1"
    base = {"pair_id": identity, "fig_label": "Fig. 1", "fig_caption": f"Plain drawing {number}.", "domain": {}}
    return {**base, "in_text_mention": None, **changes}


def test_layout_of_the_context() -> None:
    mentions = [{"tokens": "See ( Fig. 1 ) .", "entities": []}, "Another one ."]
    full = row(in_text_mention=mentions)
    assert context_text(full, use_inline_mentions=False) == "Figure Caption:\nFig. 1: Plain drawing 0."
    assert context_text(full, use_inline_mentions=True) == (
        "Figure Caption:\nFig. 1: Plain drawing 0.\n\nFigure Context:\n\t- See ( Fig. 1 ) .\n\t- Another one ."
    )
    for nothing in (None, []):
        without = row(in_text_mention=nothing)
        assert "Context" not in context_text(without, use_inline_mentions=True)


@pytest.mark.parametrize(
    "changes", [{"fig_caption": None}, {"in_text_mention": "text"}, {"in_text_mention": [{"entities": []}]}]
)
def test_invalid_rows_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="field"):
        context_text(row(**changes), use_inline_mentions=True)


def test_request_has_the_rules_eight_examples_and_the_question() -> None:
    messages = messages_for(row(), use_inline_mentions=True)
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 8, "user"]
    assert messages[0]["content"] == SYSTEM_TEXT
    assert messages[-1]["content"].endswith("Plain drawing 0.")
    assert all("Figure Context:" in message["content"] for message in messages[1:-1:2])
    short = messages_for(row(), use_inline_mentions=False)
    assert not any("Figure Context:" in message["content"] for message in short)


def test_the_examples_have_the_published_structure() -> None:
    domains = Counter(name for example in FEW_SHOT_EXAMPLES for name, is_it in example["domain"].items() if is_it)
    assert domains == {"chest_xray": 2, "ct_scan": 1, "gross": 2, "histology": 2, "mri": 1}
    for example in FEW_SHOT_EXAMPLES:
        assert tuple(example["domain"]) == DOMAINS
        assert [turn["from"] for turn in example["conversations"]] == ["human", "gpt"] * 3
        assert 1 <= len(example["in_text_mention"]) <= 2 and all(isinstance(m, str) for m in example["in_text_mention"])
        assert example["pair_id"] == f"{example['pmid']}_{example['fig_id']}"


def test_the_examples_follow_their_own_rules() -> None:
    """The cleaning rules do not change the examples, and the examples do not quote numbers of the caption."""
    for example in FEW_SHOT_EXAMPLES:
        text = dialogue_text(example["conversations"])
        pairs, num_malformed = parse_dialogue(text)
        assert len(pairs) == 3 and num_malformed == 0
        assert [part for pair in pairs for part in pair] == [turn["value"] for turn in example["conversations"]]
        for question, answer in pairs:
            assert clean_legacy(answer).text == clean_fixed(answer).text == answer
            words = f"{question} {answer}".lower()
            assert not any(word in words for word in ("mentioned", "context", "article", "caption", "description"))
            assert not any(letter.isdigit() for letter in words)


def test_one_row_of_each_domain_in_turn(tmp_path: Path) -> None:
    file = tmp_path / "captions.json"
    file.write_text(json.dumps({"a": [row(1), row(2), row(3)], "b": [row(4)], "c": [row(5), row(1)]}))
    assert [found["pair_id"][7] for found in read_captions(file)] == ["1", "4", "5", "2", "3"]
    assert [found["pair_id"][7] for found in read_captions(file, max_size=4)] == ["1", "4", "5", "2"]


def test_lists_and_lines_keep_their_order(tmp_path: Path) -> None:
    rows = [row(number) for number in range(3)]
    (tmp_path / "list").write_text(json.dumps(rows))
    (tmp_path / "lines").write_text("".join(json.dumps(item) + "\n" for item in rows))
    (tmp_path / "one").write_text(json.dumps(rows[0]))
    assert read_captions(tmp_path / "list") == read_captions(tmp_path / "lines") == rows
    assert read_captions(tmp_path / "one") == rows[:1]


def test_invalid_rows_are_named_without_their_text(tmp_path: Path) -> None:
    file = tmp_path / "captions.json"
    file.write_text(json.dumps({"mri": [row(1), row(2, fig_caption=["secret"]), {"fig_caption": "secret"}, 3]}))
    with pytest.raises(DataError, match="'mri', row 1: field 'fig_caption'") as raised:
        read_captions(file)
    assert "secret" not in str(raised.value)
    assert len(read_captions(file, skip_bad=True)) == 1
    file.write_text(json.dumps({"mri": {"a": 1}}))
    with pytest.raises(DataError, match="'mri' is not a list"):
        read_captions(file)
    file.write_text("{}")
    with pytest.raises(DataError, match="no valid caption row"):
        read_captions(file)


def test_the_published_captions(shared: Path) -> None:
    """Ten, ten, nine, eleven and ten figures: chest, CT, gross, histology, MR, one of each in turn."""
    path = shared / CAPTIONS
    rows = read_captions(path)
    lists = json.loads(path.read_text())
    assert [len(part) for part in lists.values()] == [10, 10, 9, 11, 10]
    assert [found["pair_id"] for found in rows[:6]] == [
        *(part[0]["pair_id"] for part in lists.values()),
        lists["chest_xray"][1]["pair_id"],
    ]
    assert len(rows) == 50 and rows[-1] == lists["histology"][10]
    for found in rows:
        text = context_text(found, use_inline_mentions=True)
        assert text.count("\n\t- ") == len(found["in_text_mention"] or [])
