"""Warnings of a rule file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llava.symbolic.check import check_file
from llava.symbolic.rule_warnings import iter_warnings
from llava.symbolic.rules import load_rules
from llava.symbolic.structure import RuleSet
from tests.support.rule_files import MARROW, rules_of, write_rules

LIGHT = """schema: llava.rules/v1
id: light
nodes:
  - {id: lamp, values: ["on", "off", unknown], extract: [{value: "on", any: [lit]}, {value: "off", any: [dark]},
     {value: unknown, any: [unclear]}], ask_when: {lamp: ["on", "off"]}}
  - {id: room, values: [bright, dim], extract: [{value: bright, any: [bright]}, {value: dim, any: [dim]}],
     ask_when: {lamp: ["on", "off"]}}
profiles:
  DAY: {lamp: "on", room: bright}
  NIGHT: {lamp: "off", room: dim}
  FOG: {lamp: unknown, room: dim}
  HAZE: {lamp: unknown, room: bright}
"""


def test_a_clean_file_has_none(tmp_path: Path) -> None:
    assert list(iter_warnings(rules_of(tmp_path))) == []


def test_paths_that_differ_only_in_what_is_not_asked(tmp_path: Path) -> None:
    assert check_file(write_rules(tmp_path, LIGHT)).warnings == [
        f"{tmp_path / 'rules.yaml'}: the paths FOG and HAZE differ only in nodes that are not asked"
    ]


def test_many_paths_are_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava.symbolic.rule_warnings.MAX_PATHS", 3)
    assert check_file(write_rules(tmp_path, LIGHT)).warnings == []  # a comparison of a million takes 17 s


def test_constant_answers_with_marks(tmp_path: Path) -> None:
    text = MARROW.replace("AML", "'<5%'").replace("adequate_'<5%'_Mono", "adequate_AML_Mono")
    rules = load_rules(write_rules(tmp_path, text + "reward: {balance: none}\n"))
    truths = [rules.profiles["<5%"]] * 36 + [rules.profiles["MM"]] * 4
    assert [truth["diagnosis"] for truth in truths].count("<5%") == 36
    (found,) = (text for text in iter_warnings(rules, truths) if "always answering" in text)
    plain = load_rules(write_rules(tmp_path, MARROW + "reward: {balance: none}\n"))
    (same,) = iter_warnings(plain, [plain.profiles["AML"]] * 36 + [plain.profiles["MM"]] * 4)
    assert found == same.replace("AML", "<5%")


def test_constant_answers(tmp_path: Path) -> None:
    rules = load_rules(write_rules(tmp_path, MARROW + "reward: {balance: none}\n"))
    rare = [rules.profiles["AML"]] * 36 + [rules.profiles["MM"]] * 4
    (found,) = iter_warnings(rules, rare)
    assert found.startswith("always answering high, adequate, present, blast, AML earns ")
    assert found.endswith(" % of a perfect reward (rows of the table)")
    assert list(iter_warnings(rules, list(rules.profiles.values()) * 8)) == []
    assert list(iter_warnings(rules, rare[:10])) == []  # too few rows to tell


@pytest.mark.parametrize(("correct", "expected"), [(0.5, 1), (0.6, 0)])
def test_credit_as_large_as_that_of_a_right_answer(tmp_path: Path, correct: float, expected: int) -> None:
    rules = load_rules(write_rules(tmp_path, MARROW + f"reward: {{correct: {correct}}}\n"))
    found = [text for text in iter_warnings(rules) if "credit" in text]
    assert len(found) == expected and all("'blood', 'clot'" in text for text in found)


def with_answer(rules: RuleSet, node: str, value: str, text: str) -> RuleSet:
    assert rules.phrases is not None
    answers = json.loads(json.dumps(rules.phrases.answers))
    answers[node][value]["train"] = [text]
    return replace(rules, phrases=replace(rules.phrases, answers=answers))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Marrow nucleated cells beside blood.", [r"'\\bblood\\b' of 'blood' matches the answer 'Marrow nucleated"]),
        ("Marrow nucleated cells.", []),
    ],
)
def test_patterns_that_match_answers_of_another_value(text: str, expected: list[str]) -> None:
    rules = with_answer(load_rules("bone-marrow-aspirate"), "cell_quality", "adequate", text)
    found = list(iter_warnings(rules))
    assert len(found) == len(expected) and all(part in text for part, text in zip(expected, found, strict=True))


def test_questions_of_several_nodes() -> None:
    rules = load_rules("bone-marrow-aspirate")
    assert rules.phrases is not None
    questions = {**rules.phrases.questions, "quality": {"train": ("What is the  diagnosis?",), "test": ("Fit?",)}}
    changed = replace(rules, phrases=replace(rules.phrases, questions=questions))
    assert list(iter_warnings(changed)) == [
        "the question 'what is the diagnosis?' is asked for several nodes: diagnosis, quality"
    ]
