"""Negated lists across commas, cues that belong to what follows, and exclusion that is not possible."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.symbolic.cue_lists import languages, read_cues
from llava.symbolic.extract import Extraction, extract
from llava.symbolic.rules import load_rules
from llava.symbolic.structure import RuleSet
from tests.support.rule_files import rules_of

OTHERS = ["lymphoma", "other malignancy", "infiltration by foreign cells", "toxic change"]


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> RuleSet:
    return rules_of(tmp_path_factory.mktemp("rules"))


def read(rules: RuleSet, text: str) -> str:
    return extract(rules.node("diagnosis"), text).value


@settings(max_examples=60, deadline=None)
@given(
    cue=st.sampled_from(
        [
            *("No", "There is no evidence of", "Without", "Negative for", "There isn't any", "It does not show"),
            *("We didn't see", "No findings consistent with", "It does not show features suggestive of", "It is not"),
        ]
    ),
    items=st.lists(st.sampled_from(OTHERS), min_size=2, max_size=6).flatmap(lambda x: st.permutations([*x, "AML"])),
    link=st.sampled_from([", or ", ", nor ", " or ", ", and "]),
    end=st.sampled_from([".", "; the rest is fine.", ", but read it again."]),
)
def test_a_list_is_negated_wherever_the_match_stands(
    rules: RuleSet, cue: str, items: list[str], link: str, end: str
) -> None:
    if cue == "It is not" and link not in (", or ", ", nor "):  # "it is not clotted, AML or MM" may be a statement
        link = ", or "
    assert read(rules, f"{cue} {', '.join(items[:-1])}{link}{items[-1]}{end}") == "healthy"


@settings(max_examples=40, deadline=None)
@given(
    items=st.lists(st.sampled_from(OTHERS), min_size=1, max_size=4),
    contrast=st.sampled_from(
        [", AML.", ", but AML or MDS.", ", there is AML or MDS.", ", it is AML.", ", and AML is seen.", "; AML or MDS."]
    ),
)
def test_a_contrast_ends_the_list(rules: RuleSet, items: list[str], contrast: str) -> None:
    negated = f"No {items[0]}" if len(items) == 1 else f"No {', '.join(items[:-1])}, or {items[-1]}"
    assert read(rules, negated + contrast) == "AML"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("not AML, MM.", "MM"),
        ("No AML, but MM.", "MM"),
        ("No AML, MM.", "MM"),
        ("I don't think it is AML, MM, or lymphoma.", "healthy"),
        ("No AML, no MM, and no lymphoma.", "healthy"),
        ("No, AML or MM.", "__conflict__"),
        ("It is not normal, AML or MM.", "__conflict__"),
        ("I do not know, AML or MM.", "__conflict__"),
        ("No lymphoma, we see AML or MDS.", "AML"),
        ("No lymphoma, only AML and debris.", "AML"),
        ("No lymphoma, toxic change, and an AML.", "AML"),
        ("No lymphoma, or one two three four five six seven eight AML", "AML"),
        ("AML, lymphoma, or toxic change is not seen.", "healthy"),
        ("AML, lymphoma, and toxic change are absent.", "healthy"),
        ("It is AML, and lymphoma is not seen.", "AML"),
        ("It is AML, lymphoma, or toxic change is not seen.", "AML"),
        ("AML and not MM.", "AML"),
        ("AML fits and we don't see MM.", "AML"),
        ("It is AML and it is not treated.", "AML"),
        ("AML that is not MM.", "AML"),
        ("It is not AML and shows MM.", "MM"),
        ("It is AML and is not MM.", "AML"),
        ("AML and MM are absent and it looks bad.", "healthy"),
        ("AML and MM are not seen.", "healthy"),
        ("AML not seen.", "healthy"),
        ("AML isn't seen.", "healthy"),
        ("AML is not seen with MM.", "healthy"),
        ("AML cannot be seen.", "healthy"),
        ("AML has not been found and this is a healthy marrow.", "healthy"),
        ("AML has not been found and MM fits.", "healthy"),
        ("AML hasn't been found and MM fits.", "healthy"),
        ("AML and MM are not seen in this healthy marrow.", "healthy"),
        ("AML not seen in this case with MM.", "healthy"),
        ("AML (not MM).", "AML"),
        ("AML considered and is excluded.", "healthy"),
        ("AML fits and does not suggest MM.", "AML"),
        ("No lymphoma, toxic change, infiltration and AML.", "healthy"),
        ("No lymphoma, toxic change and AML.", "AML"),
        ("No lymphoma, toxic change, and AML is seen.", "AML"),
        ("No lymphoma, AML or toxic change is seen.", "healthy"),
        ("No toxic or foreign cells, AML or MM.", "healthy"),
        ("It is not lymphoma, AML, or toxic change.", "healthy"),
        ("It is not lymphoma, AML or toxic change.", "AML"),
        ("It is not lymphoma, AML, or toxic change is seen.", "AML"),
        ("Not AML, consistent with MM or plasmacytoma.", "MM"),
        ("No AML, consistent with MM or plasmacytoma.", "MM"),
        ("Not AML, most likely MM or plasmacytoma.", "MM"),
        ("The sample is not blurred, AML or another acute leukemia.", "AML"),
        ("No prior image for comparison, AML, toxic change, and debris.", "AML"),
        ("AML, lymphoma or toxic change is not seen.", "AML"),
        ("AML, lymphoma, debris or toxic change is not seen.", "healthy"),
    ],
)
def test_scope(rules: RuleSet, text: str, value: str) -> None:
    assert read(rules, text) == value


@pytest.mark.parametrize("verb", ["didn't", "wasn't", "weren't", "hasn't", "haven't", "hadn't", "couldn't"])
def test_contractions_deny_on_both_sides(rules: RuleSet, verb: str) -> None:
    assert read(rules, f"It {verb} be AML") == read(rules, f"AML {verb} be found") == "healthy"


@pytest.mark.parametrize(
    "text",
    [
        "AML could not be excluded.",
        "AML couldn't be excluded.",
        "AML can't be excluded.",
        "AML has not been ruled out.",
        "AML hasn't yet been ruled out.",
        "AML cannot be completely excluded.",
        "We cannot entirely exclude AML.",
        "We cannot rule AML out.",
        "We are unable to exclude AML.",
        "It is not possible to safely exclude AML.",
        "This does not rule out AML.",
        "AML is not yet fully excluded.",
        "AML is unlikely.",
        "This is unlikely to be AML.",
        "AML cannot be confidently excluded.",
        "I cannot confirm or exclude AML.",
        "I can neither confirm nor exclude AML.",
        "AML is neither confirmed nor excluded.",
        "AML cannot be either confirmed or excluded.",
        "There is no way to exclude AML.",
        "There is no way of ruling out AML.",
        "AML is not ruled-out.",
        "AML cannot with certainty be excluded.",
        "AML cannot at this time be excluded.",
        "AML cannot yet be ruled out.",
    ],
)
def test_doubt_is_hedged_and_no_denial(rules: RuleSet, text: str) -> None:
    assert extract(rules.node("diagnosis"), text) == Extraction("AML", hedged=True)


@pytest.mark.parametrize(
    "text", ["AML is excluded.", "AML has been ruled out.", "AML is ruled-out.", "AML can be excluded with certainty."]
)
def test_exclusion_is_a_denial(rules: RuleSet, text: str) -> None:
    assert extract(rules.node("diagnosis"), text) == Extraction("healthy", hedged=False)


@pytest.mark.parametrize(
    ("text", "hedged"),
    [
        ("Consolidation cannot be confirmed or excluded.", True),
        ("The opacity hasn't changed.", False),
        ("The opacity isn't new.", False),
        ("This is not a new consolidation.", False),
        ("The consolidation cannot be missed.", False),
        ("The consolidation has not resolved.", False),
        ("The opacity is not significantly changed.", False),
        ("No significant change in bilateral opacities.", False),
        ("No interval change in opacities.", False),
        ("Opacities without interval change since yesterday.", False),
        ("The infiltrate did not improve.", False),
        ("Infiltrates have not significantly cleared.", False),
        ("The opacity that was not seen before is now present.", False),
    ],
)
def test_what_is_unchanged_is_present(text: str, hedged: bool) -> None:
    assert extract(load_rules("chest-xray").node("abnormality"), text) == Extraction("present", hedged)


@pytest.mark.parametrize(
    "text",
    [
        "No acute changes of pneumonia.",
        "No definite changes of interstitial disease are seen.",
        "Without further changes of fibrosis or consolidation.",
        "There are no changes from consolidation.",
        "No changes in the lungs to suggest pneumonia.",
        "No obvious change in the lung fields such as consolidation.",
    ],
)
def test_changes_of_a_finding_are_denied(text: str) -> None:
    assert extract(load_rules("chest-xray").node("abnormality"), text) == Extraction("absent", hedged=False)


@pytest.mark.parametrize(
    "text",
    [
        "No effusion, patchy opacities in the left upper lobe or lingula.",
        "No pneumothorax, consolidation at the left or right base.",
    ],
)
def test_a_link_between_places_closes_no_list(text: str) -> None:
    assert extract(load_rules("chest-xray").node("abnormality"), text) == Extraction("present", hedged=False)


@pytest.mark.parametrize("text", ["AML not otherwise specified.", "AML which has not been treated."])
def test_names_and_histories_deny_nothing(rules: RuleSet, text: str) -> None:
    assert extract(rules.node("diagnosis"), text) == Extraction("AML", hedged=False)


@pytest.mark.parametrize("text", ["no " + "-" * 3600 + " aml" * 90, "-" * 3700 + "aml" * 90 + " not seen"])
def test_long_runs_without_letters_take_no_time(rules: RuleSet, text: str) -> None:
    started = time.process_time()
    read(rules, text)
    assert time.process_time() - started < 5  # milliseconds, and half a minute in quadratic time


@pytest.mark.parametrize("language", languages())
def test_every_cue_has_a_part(language: str) -> None:
    cues = read_cues(language)
    doubt = "this was not possible to fully exclude"
    assert cues.any.search(doubt) and any(part in doubt for part in cues.parts)


def test_a_refused_pattern_of_doubt_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava.errors import DataError
    from llava.symbolic import cue_lists

    text = (cue_lists.CUES / "en.yaml").read_text(encoding="utf-8")
    (tmp_path / "xx.yaml").write_text(text.replace("doubts:\n", 'doubts:\n  - "(a+)+$"\n'), encoding="utf-8")
    monkeypatch.setattr(cue_lists, "CUES", tmp_path)
    with pytest.raises(DataError, match="nested repeats"):
        read_cues("xx")
