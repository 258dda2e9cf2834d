"""Extraction: scope of negation, uncertainty, priorities, and hostile texts."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.symbolic.extract import Extraction, _extracted, extract, normalize
from llava.symbolic.structure import RuleSet
from tests.support.rule_files import ANSWERS, MARROW, rules_of


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> RuleSet:
    return rules_of(tmp_path_factory.mktemp("rules"))


@pytest.mark.parametrize(
    ("node", "text", "value"),
    [
        ("diagnosis", "AML, not MM.", "AML"),
        ("diagnosis", "No, I do not agree. It is AML.", "AML"),
        ("diagnosis", "No evidence of multiple myeloma.", "healthy"),
        ("diagnosis", "AML and MM.", "__conflict__"),
        ("diagnosis", "This is common.", "__no_match__"),
        ("diagnosis", "A kidney disease.", "__no_match__"),
        ("diagnosis", "Neither AML nor MM.", "healthy"),
        ("diagnosis", "MM rather than AML", "MM"),
        ("diagnosis", "AML instead of MM", "AML"),
        ("diagnosis", "No doubt this is AML", "AML"),
        ("diagnosis", "Not only AML", "AML"),
        ("diagnosis", "AML is excluded.", "healthy"),
        ("diagnosis", "AML was clearly ruled out.", "healthy"),
        ("diagnosis", "AML is not seen.", "healthy"),
        ("diagnosis", "The stain is not good: AML", "AML"),
        ("diagnosis", "It is not MM whereas AML fits", "AML"),
        ("diagnosis", "It is not what we expected though AML fits", "AML"),
        ("diagnosis", "They don\u2019t have AML", "healthy"),
        ("diagnosis", "A\u200fML", "AML"),
        ("diagnosis", "\uff21\uff2d\uff2c", "AML"),
        ("diagnosis", "not one two three four five six seven eight AML", "healthy"),
        ("diagnosis", "not one two three four five six seven eight nine AML", "AML"),
        ("diagnosis", "AML one two three absent", "healthy"),
        ("diagnosis", "AML one two three four absent", "AML"),
        ("diagnosis", "x" * 4000 + " AML", "__no_match__"),
        ("proliferation", "No plasma cells. There are blasts.", "blast"),
        ("proliferation", "No unusual growth.", "none"),
        ("proliferation", "Unusual growth.", "__no_match__"),
        ("abnormality", "Not normal.", "__no_match__"),
        ("abnormality", "There is no malignancy, and the cells are normal", "absent"),
    ],
)
def test_values(rules: RuleSet, node: str, text: str, value: str) -> None:
    assert extract(rules.node(node), text).value == value


@pytest.mark.parametrize(
    ("text", "hedged"),
    [
        ("AML cannot be excluded.", True),
        ("Cannot rule out AML.", True),
        ("AML is not excluded", True),
        ("Possibly AML", True),
        ("It is unclear whether this is AML", True),
        ("This is AML. Possibly severe", False),
        ("Possibly AML. This is AML.", False),
        ("This is AML", False),
    ],
)
def test_hedges(rules: RuleSet, text: str, hedged: bool) -> None:
    assert extract(rules.node("diagnosis"), text) == Extraction("AML", hedged)


@pytest.mark.parametrize(
    ("policy", "node", "value"),
    [
        ("abstain", "diagnosis", "inconclusive"),
        ("no_match", "diagnosis", "__no_match__"),
        ("abstain", "cell_quality", "__no_match__"),
        ("value", "cell_quality", "blood"),
    ],
)
def test_policies_for_uncertain_values(tmp_path: Path, policy: str, node: str, value: str) -> None:
    rules = rules_of(tmp_path, MARROW.replace("version: 1.0.0", f"uncertain: {policy}"))
    assert extract(rules.node(node), "Possibly AML with blood") == Extraction(value, hedged=True)


def test_tags(tmp_path: Path) -> None:
    rules = rules_of(tmp_path, MARROW.replace("version: 1.0.0", "answer_format: tag"))
    node = rules.node("diagnosis")
    assert extract(node, "MM? <diagnosis> AML </diagnosis>").value == "AML"
    assert extract(node, "<diagnosis>AML</diagnosis><diagnosis>MM</diagnosis>").value == "__conflict__"
    assert extract(node, "AML").value == "__no_match__"
    assert extract(node, "<diagnosis>the <diagnosis>AML</diagnosis> or <diagnosis>MM").value == "AML"


def test_tagged_values_may_contain_marks(tmp_path: Path) -> None:
    text = MARROW.replace("version: 1.0.0", "answer_format: tag").replace("values: [high, low]", "values: ['<5%', low]")
    node = rules_of(tmp_path, text.replace("value: high", "value: '<5%'").replace("quality: high", "quality: '<5%'"))
    assert extract(node.node("quality"), "<quality><5%</quality>").value == "<5%"


def test_long_answers_share_their_place_in_the_cache(rules: RuleSet) -> None:
    node = rules.node("diagnosis")
    before = _extracted.cache_info()
    values = {extract(node, "AML " + "-" * 4000 + end) for end in ("", "MM", "-" * 100_000)}
    after = _extracted.cache_info()
    assert values == {Extraction("AML")} and after.misses - before.misses == 1


def test_matches_beyond_a_limit_are_not_looked_at(rules: RuleSet, monkeypatch: pytest.MonkeyPatch) -> None:
    node = rules.node("diagnosis")
    assert extract(node, "There is AML and also MM").value == "__conflict__"
    monkeypatch.setattr("llava.symbolic.extract.MAX_MATCHES", 1)
    assert extract(node, "There is AML and also one MM").value == "AML"


@pytest.mark.parametrize("value", ANSWERS)
def test_answers_give_their_value(rules: RuleSet, value: str) -> None:
    node = next(node for node in rules.nodes if value in node.values)
    assert extract(node, ANSWERS[value]).value == value


def test_normalize() -> None:
    assert normalize("A\0B\u202e  \n\uff23\u00ad") == "a b c"
    assert len(normalize("\ufdfa" * 4000)) <= 4000


HOSTILE = st.text("no, .;:'\0\u202e\u200f\ufdfablm aquity", max_size=300) | st.sampled_from(
    [
        "no " + "-" * 3600 + " aml" * 90,
        "- " * 1900 + "aml not seen",
        "unusual " * 500,
        "aml not " * 500,
        "no " * 1300,
        "\0" * 9000,
        "plasma cells" * 400,
        "\ud800 AML",
        ", " * 2000,
    ]
)


@settings(max_examples=100, deadline=None)
@given(text=HOSTILE)
def test_any_text_gives_a_value_in_bounded_time(rules: RuleSet, text: str) -> None:
    started = time.process_time()
    for node in rules.nodes:
        assert extract(node, text).value in {*node.values, "__no_match__", "__conflict__"}
    assert time.process_time() - started < 20  # milliseconds, unless an expression takes the square of the length
