"""Rule files: valid paths, violations, and errors with line numbers."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.errors import ConfigError, DataError
from llava.symbolic.check import check_file
from llava.symbolic.rules import load_rules, read_rules
from llava.symbolic.settings import PRESETS
from tests.support.rule_files import MARROW, rules_of, write_rules


def test_the_constraints_give_the_profiles(tmp_path: Path) -> None:
    rules = rules_of(tmp_path)
    assert rules.num_assignments == 288
    assert sorted(map(str, rules.paths)) == sorted(map(str, rules.profiles.values()))


@pytest.mark.parametrize(
    ("assignment", "broken"),
    [
        ({"proliferation": "blast", "diagnosis": "MM"}, ["blast-aml"]),
        ({"quality": "high", "diagnosis": "inconclusive"}, ["high-quality"]),
        ({"cell_quality": "blood", "diagnosis": "AML"}, ["paths"]),
        ({"quality": "low", "diagnosis": "__conflict__"}, []),
        ({"quality": "low", "diagnosis": "inconclusive"}, []),
        ({}, []),
    ],
)
def test_violations_of_partial_answers(tmp_path: Path, assignment: dict[str, str], broken: list[str]) -> None:
    rules = rules_of(tmp_path)
    assert rules.violations(assignment) == broken
    assert rules.consistent(assignment) is (not broken)


def test_unknown_names_are_errors(tmp_path: Path) -> None:
    rules = rules_of(tmp_path)
    with pytest.raises(ConfigError, match=r"unknown node 'x'.*quality"):
        rules.node("x")
    with pytest.raises(DataError, match=r"unknown value 'x'.*high, low"):
        rules.violations({"quality": "x"})


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("values: [high, low]", "values: [yes, low]", 6, "unquoted yes"),
        ("values: [high, low]", "values: [true, low]", 6, "unquoted true"),
        ("values: [high, low]", "values: [high, high]", 6, "repeated"),
        ("values: [high, low]", "values: &a [high, low]", 6, "aliases"),
        ("values: [high, low]", "values: !!set [high, low]", 6, "tags"),
        ("version: 1.0.0", "id: marrow", 3, "duplicate key 'id'"),
        ("version: 1.0.0", "versions: 1.0.0", 3, "unknown key 'versions'"),
        ("version: 1.0.0", "language: xx", 3, "language"),
        ("version: 1.0.0", "dialogue: {phrases: ../x.yaml}", 3, "outside"),
        ("version: 1.0.0", "dialogue: {phrases: /etc/passwd}", 3, "outside"),
        (r"'\bquality\b'", r"'(?=quality)'", 21, "look-around"),
        (r"'\bquality\b'", r"'(?<!low )quality'", 21, "look-around"),
        (r"'\bquality\b'", r"'(q)\1'", 21, "back-references"),
        (r"'\bquality\b'", r"'(a+)+$'", 21, "nested repeats"),
        (r"'\bquality\b'", r"'\w*\w*\w*x'", 21, "too long"),
        (r"'\bquality\b'", r"'(a|a){30}b'", 21, "too long"),
        (r"'\bquality\b'", r"'['", 21, "does not compile"),
        (r"'\bquality\b'", "'" + "x" * 501 + "'", 21, "501 characters"),
        ("{folder: clot}, profile: CLOT", "{folder: clot}, profile: CLOTS", 69, "unknown 'CLOTS'"),
        ("schema: llava.rules/v1", "schema: llava.rules/v2", 1, "llava.rules/v1"),
        ("priority: 20", "priority: 2_0", 21, "expected a number from -1e"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, old: str, new: str, line: int, message: str) -> None:
    path = write_rules(tmp_path, MARROW.replace(old, new, 1))
    with pytest.raises(DataError, match=message) as caught:
        load_rules(path)
    assert str(caught.value).startswith(f"{path}, line {line}: ")


@pytest.mark.parametrize(
    ("reward", "offset", "message"),
    [
        ("{wrong: 5}", 0, "reward, wrong: expected less than correct, 1, got 5"),
        ("{wrong: 1}", 0, "reward, wrong: expected less than correct, 1, got 1"),
        ("\n  correct: 2\n  no_match: 3", 2, "reward, no_match: expected less than correct, 2, got 3"),
        ("\n  length: {weight: 0}\n  correct: 0", 2, "reward, wrong: expected less than correct, 0, got 0"),
        ("{correct: 2, abstain_wrong: 2.5}", 0, "reward, abstain_wrong: expected less than correct, 2, got 2.5"),
        ("{preset: drllava-chain, no_match: 1}", 0, "reward, no_match: expected less than correct"),
        (
            "{correct: 0, no_match: 0, consistency: {weight: 0}, length: {weight: 0}, "
            "format: {missing_eos: 0, empty: 0, repeat_ngram: {penalty: 0}}}",
            0,
            "reward, no_match: expected less than correct, 0, got 0",
        ),
    ],
)
def test_rewards_in_which_a_right_answer_earns_no_more_are_errors(
    tmp_path: Path, reward: str, offset: int, message: str
) -> None:
    line = MARROW.count("\n") + 1 + offset
    path = write_rules(tmp_path, f"{MARROW}reward: {reward}\n")
    _, errors = read_rules(path)
    assert any(error.startswith(f"{path}, line {line}: {message}") for error in errors)
    assert check_file(path).errors == errors


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_legal_rewards(tmp_path: Path, preset: str) -> None:
    rules = rules_of(tmp_path, f"{MARROW}reward: {{preset: {preset}}}\n")
    assert rules.reward == PRESETS[preset]


def test_all_errors_are_listed(tmp_path: Path) -> None:
    text = MARROW.replace("abstain: inconclusive", "abstain: unknown").replace("priority: 20", "priority: high")
    _, errors = read_rules(write_rules(tmp_path, text))
    assert len(errors) == 6


def test_a_large_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="larger than 1,000,000 bytes"):
        load_rules(write_rules(tmp_path, MARROW + "#" * 1_000_000))


def test_a_million_assignments_are_searched(tmp_path: Path) -> None:
    values = ", ".join(f"v{i}" for i in range(10))
    nodes = "\n".join(f"  - {{id: n{i}, values: [{values}]}}" for i in range(6))
    then = ", ".join(f"n{i}: v1" for i in range(5))
    text = (
        f"schema: llava.rules/v1\nid: x\nnodes:\n{nodes}\nconstraints:\n  - {{id: c, if: {{n5: v1}}, then: {{{then}}}}}"
    )
    rules = rules_of(tmp_path, text)
    started = time.process_time()
    assert len(rules.path_values) == 900_001
    assert time.process_time() - started < 60  # a second or two


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_fuzzed_files_give_errors_or_rules_in_bounded_time(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Any bytes, and any change of a valid file, are read quickly and fail with errors only."""
    content = MARROW.encode()
    begin = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(begin, min(begin + 40, len(content))))
    inserted = data.draw(
        st.binary(max_size=30) | st.text("\0\u202e[]{}:&*!?|>-'\" \n#(+)\\ab1", max_size=30).map(str.encode)
    )
    path = tmp_path_factory.mktemp("fuzz") / "rules.yaml"
    path.write_bytes(content[:begin] + inserted + content[end:])
    started = time.process_time()
    rules, errors = read_rules(path)
    assert rules is not None or errors
    assert time.process_time() - started < 20  # milliseconds, unless a file is searched without a limit
