"""Bounds of the time that patterns take: what is refused, and what is accepted and fast."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from llava.errors import DataError
from llava.symbolic.extract import extract
from llava.symbolic.pattern_sets import OTHER_MARK, OTHER_WORD, characters_of
from llava.symbolic.pattern_steps import MAX_STEPS, MAX_TEXT, pattern_steps
from llava.symbolic.patterns import compile_pattern
from llava.symbolic.rules import load_rules, read_rules, shipped
from tests.support.rule_files import write_rules


@pytest.mark.parametrize(
    "pattern",
    [
        ".*b[^c]*c",  # one repeat that ends where another begins: 13 s for 4,000 characters
        r"\w*\w*\w*x",
        "(a|a){30}b",
        "(a?a?){60}x",
        ".*" + "a" * 400 + "b",  # a text that is compared to its end at each position
        "[ab]*" + "".join(f"{letter}?" for letter in "cdefghijklmnopqrstuvwxyz" * 6) + "0",
        "(" * 30 + "a" + ")?" * 30,
        "(?a:a)",
    ],
)
def test_patterns_that_could_take_long_are_refused(pattern: str) -> None:
    started = time.process_time()
    with pytest.raises(DataError, match=r"could take too long|levels deep|flag a"):
        compile_pattern(pattern)
    assert time.process_time() - started < 5  # milliseconds


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (".*[b0]", "z"),
        ("a{0,80}a{0,80}[bc]", "a"),
        ("[^b]*b", "a"),
        (r"( \w+)*x", " a"),
        (r"( \w{1,5})*x", " a"),
        (".*(a|aa)[xy]", "a"),
        (r".*\b[xy]", "a "),
        (r"\W+\wb", " "),
        ("[ac]*?(?: ab){0,40}b", "c"),
        (r"\b\w+ (\w+,? ){0,5}blasts?", "a, b "),
        (r"\b(large|larger|macrocyt\w*)\b", "macrocyt"),
    ],
)
def test_accepted_patterns_take_the_time_that_their_steps_state(pattern: str, text: str) -> None:
    compiled = compile_pattern(pattern)
    repeated = (text * MAX_TEXT)[:MAX_TEXT]
    started = time.process_time()
    for _ in compiled.finditer(repeated):
        pass
    # Ten times the 12 ns of the slowest step, and the milliseconds of a pattern that has hardly any.
    assert time.process_time() - started < 120e-9 * MAX_TEXT * pattern_steps(pattern) + 0.1


@pytest.mark.parametrize(
    ("pattern", "most"),
    [
        (r"\bblasts?\b", 5),
        (r"\b\w+ blasts", 20),  # each run of word characters is read once
        (r"(^|[.,] )(one|1)\W*$", 20),
        (r"^.*foo", 20),
        (r"\b(large|larger|enlarged|macrocyt\w*)\b", 40),
    ],
)
def test_repeats_that_read_a_text_once_are_cheap(pattern: str, most: float) -> None:
    assert 1 <= pattern_steps(pattern) <= most


@pytest.mark.parametrize(
    ("pattern", "inside", "outside"),
    [
        (r"\w", {ord("a"), OTHER_WORD}, {ord("-"), OTHER_MARK}),
        (r"[^\w]", {ord("-"), OTHER_MARK}, {ord("a"), OTHER_WORD}),
        (r"[^\u03b1]", {ord("a"), OTHER_WORD, OTHER_MARK}, set()),
        (r"\u2014", {OTHER_MARK}, {OTHER_WORD}),
        (r"[^\D]", {ord("1"), OTHER_WORD}, {ord("a"), OTHER_MARK}),
        ("k", {ord("k"), ord("K")}, {ord("j")}),
    ],
)
def test_characters(pattern: str, inside: set[int], outside: set[int]) -> None:
    (item,) = re._parser.parse(pattern, re.IGNORECASE)  # type: ignore[attr-defined]
    found = characters_of(*item)
    assert found is not None and inside <= found and not outside & found


def with_patterns(patterns: list[str]) -> str:
    """Return a rule file whose node `n` has one pattern a line, from line 7."""
    lines = "\n".join(f"      - {{value: x, any: ['{pattern}']}}" for pattern in patterns)
    return (
        f"schema: llava.rules/v1\nid: x\nnodes:\n  - id: n\n    values: [x, y]\n    extract:\n{lines}\n"
        "  - {id: m, values: [x, y]}\nprofiles: {A: {n: x, m: x}, B: {n: y, m: y}}\n"
    )


@pytest.mark.parametrize(
    ("patterns", "line"),
    [
        ([f".*[{letter}0]" for letter in "bcdefghijk"], 10),
        (["a{0,80}a{0,80}[bc]", "a{0,80}a{0,80}[de]"], 8),
        ([r"( \w+)*" + letter for letter in "bcd"], 8),
    ],
)
def test_the_patterns_of_a_file_have_a_common_limit(tmp_path: Path, patterns: list[str], line: int) -> None:
    path = write_rules(tmp_path, with_patterns(patterns))
    _, errors = read_rules(path)
    (error,) = errors
    assert error.startswith(f"{path}, line {line}: node n, extract: with pattern {patterns[line - 7]!r}, those of this")
    assert f"at most {MAX_STEPS:,} are allowed" in error
    rules = load_rules(write_rules(tmp_path, with_patterns(patterns[: line - 7])))
    started = time.process_time()
    extract(rules.node("n"), "z" * MAX_TEXT)
    assert time.process_time() - started < 10  # 0.3 s


@pytest.mark.parametrize("name", shipped())
def test_shipped_files_use_less_than_half_of_the_limit(name: str) -> None:
    nodes = load_rules(name).nodes
    patterns = [pattern.pattern for node in nodes for rule in node.extract for pattern in rule.patterns]
    assert sum(map(pattern_steps, patterns)) < MAX_STEPS / 2


def test_an_empty_list_of_patterns_is_an_error(tmp_path: Path) -> None:
    path = write_rules(tmp_path, with_patterns(["a"]).replace("['a']", "[]"))
    assert read_rules(path)[1] == [f"{path}, line 7: node n, extract, any: the list is empty"]
