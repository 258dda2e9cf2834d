"""The symbolic reward as TRL calls it."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from llava.errors import DataError
from llava.symbolic.rubric import reward
from llava.symbolic.rules import load_rules
from llava.symbolic.structure import RuleSet
from llava.train.trl_reward import symbolic_reward
from tests.support.rollouts import PHRASES, TOY


@pytest.fixture
def rules(tmp_path: Path) -> RuleSet:
    (tmp_path / "phrases.yaml").write_text(PHRASES)
    (tmp_path / "rules.yaml").write_text(TOY)
    return load_rules(tmp_path / "rules.yaml")


TRUTH = {"shade": "dark", "kind": "cell"}
MESSAGES = [
    {"role": "assistant", "content": "abc"},
    {"role": "user", "content": "Cell?"},
    {"role": "assistant", "content": [{"type": "text", "text": "xyz"}]},
]


def test_texts_and_messages_have_the_reward_of_their_answers(rules: RuleSet) -> None:
    function = symbolic_reward(rules)
    rows = {"asked": [["shade"], ["shade", "kind"], ["kind", "shade"]], "truth": [TRUTH] * 3}
    found = function(prompts=["p"] * 3, completions=["abc", MESSAGES, MESSAGES[:1]], trainer_state=None, **rows)
    answers = [["abc"], ["abc", "xyz"], ["abc", ""]]
    expected = [
        reward(rules, truth=TRUTH, asked=asked, answers=texts).total
        for asked, texts in zip(rows["asked"], answers, strict=True)
    ]
    assert found == expected and len(set(found)) == 3


def test_an_answer_without_end_token_is_unfinished(rules: RuleSet) -> None:
    function = symbolic_reward(rules.path, eos_token_id=2)
    rows = {"asked": [["shade"]] * 2, "truth": [TRUTH] * 2, "references": [["abc"]] * 2}
    ended, cut = function(completions=["abc"] * 2, completion_ids=[[5, 2], [5, 6]], **rows)
    assert ended > cut
    assert cut == reward(rules, truth=TRUTH, asked=["shade"], answers=["abc"], finished=[False]).total


@pytest.mark.parametrize(
    ("completion", "message"), [(MESSAGES, "2 answers to 1 asked nodes"), (3, "a completion is int")]
)
def test_completions_of_other_forms(rules: RuleSet, completion: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        symbolic_reward(rules)(completions=[completion], asked=[["shade"]], truth=[TRUTH])


def test_the_log_names_the_rules(rules: RuleSet) -> None:
    function = symbolic_reward(rules)
    assert function.__name__ == "symbolic_reward_toy" and not inspect.iscoroutinefunction(function)
