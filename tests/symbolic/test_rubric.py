"""The reward: published presets, each term of the default, and its properties."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.errors import ConfigError, DataError
from llava.symbolic.rubric import Reward, check_priors, count_values, reward
from llava.symbolic.structure import RuleSet
from tests.support.rule_files import ANSWERS, ECG, rules_of

NODES = ("quality", "cell_quality", "abnormality", "proliferation", "diagnosis")


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> RuleSet:
    return rules_of(tmp_path_factory.mktemp("rules"))


@pytest.fixture(scope="module")
def ecg(tmp_path_factory: pytest.TempPathFactory) -> RuleSet:
    return rules_of(tmp_path_factory.mktemp("ecg"), ECG)


def score(rules: RuleSet, profile: str, values: list[str], asked: tuple[str, ...] = NODES, **more: Any) -> Reward:
    """Return the reward of answers with these values; unknown values are texts."""
    truth = rules.profiles[profile]
    return reward(
        rules,
        truth=truth,
        asked=asked,
        answers=[ANSWERS.get(value, value) for value in values],
        references=more.pop("references", [ANSWERS[truth[node]] for node in asked]),
        finished=more.pop("finished", [True] * len(asked)),
        preset=more.pop("preset", "default"),
        priors=more.pop("priors", None),
    )


def path(rules: RuleSet, profile: str) -> list[str]:
    return list(rules.profiles[profile].values())


def with_garbage(values: list[str], *turns: int) -> list[str]:
    return ["kidney" if turn in turns else value for turn, value in enumerate(values)]


def test_preset_of_the_release(rules: RuleSet) -> None:
    preset = "drllava-2024-11"
    assert score(rules, "AML", path(rules, "AML"), preset=preset).raw == 9.0
    one_lost = score(rules, "AML", with_garbage(path(rules, "AML"), 2), preset=preset)
    assert (one_lost.raw, sum(one_lost.components["correctness"])) == (5.5, 3.5)  # type: ignore[arg-type]
    assert score(rules, "NORMAL", path(rules, "AML"), preset=preset).raw == 6.0
    worst = score(rules, "NORMAL", ["kidney"] * 5, preset=preset)
    assert (worst.raw, worst.total) == (-2.5, -1.0)


def test_preset_of_the_chain(rules: RuleSet) -> None:
    assert score(rules, "AML", path(rules, "AML"), preset="drllava-chain").raw == pytest.approx(5.0)
    assert score(rules, "AML", path(rules, "MM"), preset="drllava-chain").raw == pytest.approx(2.4)
    # Four answers in a row are those of a path: factor 3 on (4 - 0.5) / 5.
    lost = score(rules, "AML", with_garbage(path(rules, "AML"), 4), preset="drllava-chain")
    assert lost.raw == pytest.approx(3 * 3.5 / 5)


@pytest.mark.parametrize(
    ("profile", "answers", "raw"),
    [
        ("STEMI", ["elevation", "no depression", "troponin", "stemi"], 4 + 2 + 1 + 7.5),
        ("NORMAL", ["no elevation", "no depression", "no troponin", "normal"], 4.0),
        ("NORMAL", ["no elevation", "no depression", "troponin", "normal"], 3.0 - 1),
        ("NSTEMI", ["no elevation", "depression", "troponin", "stemi"], 3.0 - 1 + 1),
        ("STEMI", ["x", "x", "x", "x"], -4.0 - 1),
    ],
)
def test_preset_of_coronary_syndromes(ecg: RuleSet, profile: str, answers: list[str], raw: float) -> None:
    found = reward(ecg, truth=ecg.profiles[profile], asked=list(ecg.by_id), answers=answers, preset="drllava-acs")
    assert found.raw == raw and -1 <= found.total <= 1


def test_coronary_preset_needs_its_values(rules: RuleSet) -> None:
    with pytest.raises(ConfigError, match="stemi and nstemi"):
        score(rules, "AML", path(rules, "AML"), preset="drllava-acs")


def test_a_perfect_conversation_scores_one(rules: RuleSet) -> None:
    found = score(rules, "AML", path(rules, "AML"))
    assert (found.raw, found.total, found.violations) == (1.5, 1.0, ())


def test_a_constant_path_earns_its_matches_times_its_consistency(rules: RuleSet) -> None:
    found = score(rules, "NORMAL", path(rules, "AML"))
    assert found.raw == pytest.approx(0.4 + 0.5 * 1.0 * 0.4)
    assert found.turns == pytest.approx((0.2, 0.2, 0.0, 0.0, 0.2))
    assert sum(found.turns) == pytest.approx(found.raw)


def test_confusable_values_earn_their_credit(rules: RuleSet) -> None:
    found = score(rules, "BLOOD", path(rules, "CLOT"))
    assert found.components["correctness"] == (1.0, 0.5, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("changes", "component", "value"),
    [
        ({"finished": [True] * 4 + [False]}, "format", -0.5),
        ({"finished": [True] * 4 + [False]}, "correctness", -0.5),
        ({"values": ""}, "format", -0.5),
        ({"values": "This is AML." + " AML" * 6}, "format", 0.0),
        ({"values": "AML " * 12}, "format", -0.25),
        ({"values": "This is AML." + "." * 40}, "length", 0.0),
        ({"values": "This is AML." + "." * 140}, "length", 0.1),
        ({"values": "This is AML." + "." * 1039}, "correctness", 1.0),
        ({"values": "This is AML." + "." * 1040}, "correctness", -0.5),
    ],
)
def test_terms_of_the_last_turn(rules: RuleSet, changes: dict[str, Any], component: str, value: float) -> None:
    values = [*path(rules, "AML")[:4], changes.pop("values", "AML")]
    terms = score(rules, "AML", values, **changes).components[component]
    assert isinstance(terms, tuple) and terms[-1] == pytest.approx(value)


def test_void_turns_agree_with_nothing(rules: RuleSet) -> None:
    found = score(rules, "AML", path(rules, "AML"), finished=[True] * 4 + [False])
    assert found.components["consistency"] == 0.8


def test_balance_multiplies_rare_values_within_limits(rules: RuleSet) -> None:
    priors = {"diagnosis": {"AML": 1, "MM": 99, "healthy": 0}, "quality": {"high": 90, "low": 10}}
    terms = score(rules, "AML", path(rules, "AML"), priors=priors).components["correctness"]
    assert terms == pytest.approx((100 / (2 * 90), 1.0, 1.0, 1.0, 4.0))
    assert score(rules, "AML", path(rules, "AML"), priors=priors, preset="drllava-2024-11").raw == 9.0


@pytest.mark.parametrize(("mode", "value"), [("adjacent", 0.0), ("pairwise", 1.0), ("global", 1.0)])
def test_one_turn(rules: RuleSet, mode: str, value: float) -> None:
    from llava.symbolic.rubric import consistency

    assert consistency(rules, mode, ["quality"], ["low"]) == value
    assert consistency(rules, mode, ["quality"], ["__no_match__"]) == 0.0


def test_errors_of_arguments(rules: RuleSet) -> None:
    with pytest.raises(DataError, match="answers: expected 5"):
        reward(rules, truth=rules.profiles["AML"], asked=NODES, answers=["x"])
    with pytest.raises(DataError, match="truth of node quality"):
        reward(rules, truth={}, asked=["quality"], answers=["x"])
    with pytest.raises(DataError, match="unknown node 'x'"):
        reward(rules, truth={}, asked=["x"], answers=["x"])
    with pytest.raises(ConfigError, match="preset"):
        score(rules, "AML", path(rules, "AML"), preset="x")
    with pytest.raises(DataError, match="priors"):
        check_priors(rules, {"diagnosis": {"AML": -1}})


def test_priors_of_a_table(rules: RuleSet) -> None:
    counts = count_values(rules, [rules.profiles["AML"], rules.profiles["MM"]])
    assert counts["diagnosis"] == {"AML": 1, "MM": 1, "healthy": 0, "inconclusive": 0}


VALUES = [
    [*values, "__no_match__"]
    for values in (
        ("high", "low"),
        ("adequate", "blood", "clot"),
        ("present", "absent", "inconclusive"),
        ("blast", "plasma", "none", "inconclusive"),
        ("AML", "MM", "healthy", "inconclusive"),
    )
]
PRIORS = {"diagnosis": {"AML": 3, "MM": 40, "healthy": 50, "inconclusive": 9}, "quality": {"high": 90, "low": 9}}


@settings(max_examples=80, deadline=None)
@given(
    case=st.tuples(
        st.sampled_from(["NORMAL", "AML", "MM", "BLOOD", "CLOT"]),
        st.tuples(*(st.sampled_from(values) for values in VALUES)),
    ),
    asked=st.lists(st.sampled_from(NODES), min_size=1, max_size=5, unique=True),
    priors=st.sampled_from([None, PRIORS]),
    data=st.data(),
)
def test_total_falls_when_a_right_answer_turns_wrong(
    rules: RuleSet, case: tuple[str, tuple[str, ...]], asked: list[str], priors: Any, data: st.DataObject
) -> None:
    profile, picked = case
    truth = rules.profiles[profile]
    answer = dict(zip(NODES, picked, strict=True))
    turn = data.draw(st.integers(0, len(asked) - 1))
    answer[asked[turn]] = truth[asked[turn]]
    before = score(rules, profile, [answer[node] for node in asked], tuple(asked), priors=priors)
    node = rules.node(asked[turn])
    wrong = [
        v for v in (*node.values, "__no_match__") if v != truth[node.id] and (v, truth[node.id]) not in node.credit
    ]
    answer[node.id] = data.draw(st.sampled_from(wrong))
    # The wrong answer has the length of the right one, so that only its value differs.
    after = score(
        rules,
        profile,
        [answer[n] for n in asked],
        tuple(asked),
        priors=priors,
        references=[ANSWERS.get(answer[n], "__no_match__") for n in asked],
    )
    same = score(
        rules,
        profile,
        [truth[n] if n == node.id else answer[n] for n in asked],
        tuple(asked),
        priors=priors,
        references=[ANSWERS.get(truth[n] if n == node.id else answer[n], "__no_match__") for n in asked],
    )
    assert after.total < same.total
    assert before.raw == pytest.approx(sum(before.turns))


@settings(max_examples=25, deadline=None)
@given(
    profile=st.sampled_from(["NORMAL", "AML", "BLOOD"]),
    values=st.tuples(*(st.sampled_from([*values, "kidney"]) for values in VALUES)),
    words=st.lists(st.sampled_from(["word", "no", "AML", "blasts.", "healthy,", "quality", "not", "clot"]), min_size=1),
)
def test_total_never_rises_when_words_are_appended(
    rules: RuleSet, profile: str, values: tuple[str, ...], words: list[str]
) -> None:
    """Whatever 4,000 words are appended, also those that name the true value."""
    short = score(rules, profile, list(values))
    tail = " ".join((words * 4000)[:4000])
    texts = [f"{ANSWERS.get(value, value)} {tail}" for value in values]
    assert score(rules, profile, texts).total <= short.total
