"""Texts that every match of a pattern contains."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.symbolic.extract import extract, normalize
from llava.symbolic.patterns import required_texts
from llava.symbolic.rules import load_rules, shipped
from tests.support.probes import PROBES

PATTERNS = sorted(
    {
        pattern.pattern
        for name in shipped()
        for node in load_rules(name).nodes
        for rule in node.extract
        for pattern in rule.patterns
    }
)


@pytest.mark.parametrize(
    ("pattern", "texts"),
    [
        (r"\b(myelo)?blasts?\b", {"blast"}),
        (r"\b(unfit|bad)\b", {"unfit", "bad"}),
        (r"\bdense\b[^.]*\bparticl", {"particl"}),
        (r"(a|b)?", set()),
        (r"(ab|c){2}", {"ab", "c"}),
        (r"(ab|)c", {"c"}),
        (r"[ab]\d+", set()),
        ("AML", {"aml"}),
    ],
)
def test_required_texts(pattern: str, texts: set[str]) -> None:
    assert required_texts(pattern) == texts


@settings(max_examples=30, deadline=None)
@given(data=st.data(), pattern=st.sampled_from(PATTERNS))
def test_every_match_contains_one(data: st.DataObject, pattern: str) -> None:
    text = normalize(data.draw(st.from_regex(re.compile(pattern, re.ASCII))))
    needed = required_texts(pattern)
    if needed and re.search(pattern, text):
        assert any(part in text for part in needed)


@pytest.mark.parametrize("name", shipped())
def test_looking_for_texts_first_changes_no_value(name: str) -> None:
    rules = load_rules(name)
    for node, text, value in PROBES[name]:
        plain = normalize(text)
        for rule, needed in rules.node(node).finders:
            found = any(pattern.search(plain) for pattern in rule.patterns)
            assert not found or not needed or any(part in plain for part in needed)
        assert extract(rules.node(node), text).value == value
