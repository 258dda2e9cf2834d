"""Single answers with labels, and the mismatched answers of a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava.constants import IGNORE_INDEX
from llava.data.labeled import (
    BAD,
    GOOD,
    KIND,
    MISMATCHED,
    LabeledDataset,
    holds_labels,
    read_labeled,
    with_mismatched,
)
from llava.data.preference import PreferenceDataset, read_preferences
from llava.errors import DataError
from llava.model.builder import LoadedModel
from tests.support.pairs import write_pairs
from tests.support.tiny import tiny_image

TURNS = [{"from": "human", "value": "<image>\nQ2?"}, {"from": "gpt", "value": "second"}]
ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "Q1?", "completion": "first", "label": True, "image": "0.png"},
    {"id": "b", "conversations": TURNS, "kto_tag": False, "images": ["0.png"], "weight": 0.5},
    {
        "id": "c",
        "messages": [{"role": "user", "content": "Q3?"}, {"role": "assistant", "content": "third"}],
        "label": False,
    },
]


def write(folder: Path, *rows: Any) -> Path:
    (folder / "images").mkdir(exist_ok=True)
    tiny_image(0).save(folder / "images" / "0.png")
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def test_rows_of_every_layout(tmp_path: Path) -> None:
    path = write(tmp_path, *ROWS)
    found = read_labeled(path)
    assert holds_labels(path) and [row.desirable for row in found] == [True, False, False]
    assert [row.sample.conversation.turns[-1].text for row in found] == ["first", "second", "third"]
    assert [row.weight for row in found] == [1.0, 0.5, 1.0] and [len(row.sample.images) for row in found] == [1, 1, 0]
    assert not holds_labels(write_pairs(tmp_path / "pairs"))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt": "Q", "completion": "a"}, "not a labeled answer"),
        ({**ROWS[0], "label": 1}, "'label' must be true or false"),
        ({**ROWS[0], "completion": " "}, "does not end with an answer"),
        ({**ROWS[0], "image": ["0.png"] * 2, "prompt": "<image> Q"}, "1 placeholder"),
        ({**ROWS[0], "completion": 3}, "must be text or a list"),
    ],
)
def test_bad_rows_are_named_or_skipped(tmp_path: Path, bad: Any, message: str) -> None:
    path = write(tmp_path, ROWS[0], bad)
    with pytest.raises(DataError, match=rf"rows\.json, row 1: .*{message}"):
        read_labeled(path)
    assert len(read_labeled(path, skip_bad=True)) == 1


def test_mismatched_answers_follow_the_questions_of_others(tmp_path: Path, tiny: LoadedModel) -> None:
    path = write(tmp_path, *ROWS)
    dataset = LabeledDataset(read_labeled(path), tiny.processor, image_folder=tmp_path / "images")
    units = with_mismatched([dataset[row] for row in range(3)])
    kinds = [[one.numbers[KIND] for one in unit] for unit in units]
    assert kinds == [[GOOD, MISMATCHED], [BAD, MISMATCHED], [BAD, MISMATCHED]]
    for place, unit in enumerate(units):
        own, other = unit[0], units[(place + 1) % 3][0]
        start = next(at for at, label in enumerate(own.labels) if label != IGNORE_INDEX)
        assert unit[1].input_ids[:start] == own.input_ids[:start] and unit[1].images == own.images
        trained = [label for label in other.labels if label != IGNORE_INDEX]
        assert [label for label in unit[1].labels if label != IGNORE_INDEX] == trained
        assert len(unit[1].input_ids) == len(unit[1].labels) == len(unit[1].turns)
        assert unit[1].weight == own.weight


def test_ranks_complete_a_step_as_one_process_does(tmp_path: Path, tiny: LoadedModel) -> None:
    dataset = LabeledDataset(read_labeled(write(tmp_path, *ROWS)), tiny.processor, image_folder=tmp_path / "images")
    rows = [dataset[row] for row in (0, 0, 1, 2)]
    whole = with_mismatched(rows)
    assert with_mismatched(rows[:2], rows[2:]) + with_mismatched(rows[2:], rows[:2]) == whole
    assert with_mismatched(rows[:1], rows[1:])[0] == whole[0] and len(whole[0]) == 2
    assert [len(unit) for unit in with_mismatched(rows[:2], rows[:1])] == [1, 1]


def test_pairs_are_a_good_and_a_bad_answer(tmp_path: Path, tiny: LoadedModel) -> None:
    pairs = read_preferences(write_pairs(tmp_path, 3))
    dataset = PreferenceDataset(pairs, tiny.processor, image_folder=tmp_path / "images")
    units = with_mismatched([dataset[row] for row in range(3)])
    assert [one.numbers[KIND] for one in units[0]] == [GOOD, BAD, MISMATCHED, MISMATCHED]
    [alone] = with_mismatched([dataset[0]])
    assert [one.numbers[KIND] for one in alone] == [GOOD, BAD]
    same = with_mismatched([dataset[0], dataset[0]])
    assert [len(unit) for unit in same] == [2, 2]
