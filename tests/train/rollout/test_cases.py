"""Cases of reinforcement learning, and what is asked about one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava.errors import DataError
from llava.symbolic.rules import load_rules
from llava.symbolic.structure import RuleSet
from llava.train.rollout.cases import interview, read_cases, seed_of
from tests.support.rollouts import PHRASES, TOY

TABLE = [
    {"id": f"c{i}", "image": f"{i}.png", "label": "dl"[i % 2], "split": "train" if i < 4 else "val"} for i in range(6)
]


@pytest.fixture
def rules(tmp_path: Path) -> RuleSet:
    (tmp_path / "phrases.yaml").write_text(PHRASES)
    (tmp_path / "rules.yaml").write_text(TOY)
    return load_rules(tmp_path / "rules.yaml")


def write(rules: RuleSet, rows: list[Any]) -> Path:
    path = rules.path.parent / "rows.json"
    path.write_text(json.dumps(rows))
    return path


DIALOGUE = {
    "id": "d", "image": "0.png", "asked": ["kind", "shade"], "truth": {"shade": "dark", "kind": "cell"},
    "conversations": [{"from": "human", "value": "<image>\nQ1"}, {"from": "gpt", "value": "abc"},
                      {"from": "human", "value": "Q2"}, {"from": "gpt", "value": "cba"}],
}  # fmt: skip


def test_a_table_has_the_rows_of_its_splits(rules: RuleSet) -> None:
    path = write(rules, TABLE)
    assert [case.id for case in read_cases(path, rules)] == ["c0", "c1", "c2", "c3"]
    assert len(read_cases(path, rules, splits=("train", "val"))) == 6
    assert read_cases(path, rules)[1].truth == {"shade": "light", "kind": "clot"}


def test_rows_with_nothing_to_ask_are_left_out(tmp_path: Path) -> None:
    rows = [{"id": label, "image": "a.png", "label": label, "findings": ""} for label in ("COVID-19", "todo")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert [case.id for case in read_cases(tmp_path / "rows.json", load_rules("chest-xray"))] == ["COVID-19"]


def test_a_dialogue_is_asked_as_it_is_written(rules: RuleSet) -> None:
    [case] = read_cases(write(rules, [DIALOGUE]), rules)
    asked = interview(case, rules, seed=5)
    assert (asked.asked, asked.questions, asked.references) == (
        ("kind", "shade"),
        ("<image>\nQ1", "Q2"),
        ("abc", "cba"),
    )
    assert asked.opening.turns[0].text == "<image>\nQ1" and len(asked.answered.turns) == 4


def test_a_row_of_a_table_is_asked_anew_by_seed(rules: RuleSet) -> None:
    case = read_cases(write(rules, TABLE), rules)[0]
    orders = {interview(case, rules, seed=seed).asked for seed in range(12)}
    assert orders == {("shade", "kind"), ("kind", "shade")}
    assert interview(case, rules, seed=3) == interview(case, rules, seed=3)
    assert {interview(case, rules, seed=seed, styles=["standard"]).asked for seed in range(6)} == {("shade", "kind")}
    assert len({interview(case, rules, seed=seed).seed for seed in range(50)}) == 50


@pytest.mark.parametrize(("row", "message"), [
    ({"image": "a.png", "label": "x"}, "no label fits"),
    ({"label": "d"}, "key 'image' is missing"),
    ("text", "expected an object, got str"),
    ({**DIALOGUE, "truth": {"shade": "dark", "kind": "clot"}}, "truth is on no valid path \\(it breaks dark-cell\\)"),
    ({**DIALOGUE, "truth": {"shade": "pink"}}, "truth of 'shade': unknown value 'pink'; known: dark, light"),
    ({**DIALOGUE, "truth": {"shade": "dark"}}, "asked: kind has no truth"),
    ({**DIALOGUE, "conversations": []}, "expected a question and an answer for each of 2 asked nodes"),
    ({**DIALOGUE, "conversations": [{}] * 4}, "turn 0: expected a text 'value' from human"),
])  # fmt: skip
def test_rows_that_cannot_be_used(rules: RuleSet, row: Any, message: str) -> None:
    path = write(rules, [TABLE[0], row])
    with pytest.raises(DataError, match=message) as caught:
        read_cases(path, rules)
    assert f"{path}, row 1" in str(caught.value)


def test_seeds_differ_and_repeat() -> None:
    assert len({seed_of(0, step, case) for step in range(30) for case in range(30)}) == 900
    assert seed_of(1, 2) == seed_of(1, 2) != seed_of(12)
