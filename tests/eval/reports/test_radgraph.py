"""Rewards of report graphs: golden values, case, and checks of given graphs."""

from __future__ import annotations

from typing import Any

import pytest

from llava.errors import DataError
from llava.eval.reports.radgraph import LEVELS, elements, entities_of, model_of, radgraph_figures, reward

PREDICTION = {
    "1": {"tokens": "left", "label": "ANAT-DP", "relations": [["modify", "2"]]},
    "2": {"tokens": "pleural", "label": "ANAT-DP", "relations": []},
    "3": {"tokens": "effusion", "label": "OBS-DP", "relations": [["located_at", "2"]]},
}
REFERENCE = {
    "1": {"tokens": "pleural", "label": "ANAT-DP", "relations": []},
    "2": {"tokens": "effusion", "label": "OBS-DP", "relations": []},
    "3": {"tokens": "Large", "label": "OBS-DP", "relations": [["modify", "2"]]},
}


@pytest.mark.parametrize(("level", "expected"), [("simple", 2 / 3), ("partial", 1 / 3), ("complete", 1 / 3)])
def test_rewards(level: str, expected: float) -> None:
    assert reward(PREDICTION, REFERENCE, level) == pytest.approx(expected)


@pytest.mark.parametrize("level", LEVELS)
def test_equal_graphs(level: str) -> None:
    assert reward(PREDICTION, PREDICTION, level) == 1.0


@pytest.mark.parametrize(("case", "expected"), [("new", 1.0), ("legacy", 0.0)])
def test_case(case: str, expected: float) -> None:
    one = {"1": {"tokens": "Effusion", "label": "OBS-DP", "relations": []}}
    other = {"1": {"tokens": "effusion", "label": "OBS-DP", "relations": []}}
    assert reward(one, other, "simple", case=case) == expected


def test_legacy_case_lowers_relations() -> None:
    graph = {**PREDICTION, "3": {"tokens": "Effusion", "label": "OBS-DP", "relations": [["located_at", "2"]]}}
    assert ("effusion", "OBS-DP", "located_at", "pleural") in elements(graph, "complete", case="legacy")
    assert ("Effusion", "OBS-DP", True) in elements(graph, "partial", case="legacy")


@pytest.mark.parametrize(
    ("graphs", "texts", "expected"),
    [
        ([(PREDICTION, PREDICTION)], [("a", "a")], 1.0),
        ([(PREDICTION, PREDICTION)], [("", "a")], 0.0),
        ([({}, {})], [("a", "a")], 0.0),
        ([(PREDICTION, {})], [("a", "a")], 0.0),
    ],
)
def test_empty_sides_are_zero(graphs: Any, texts: Any, expected: float) -> None:
    figures = radgraph_figures(graphs, texts, source="given")
    assert [figure.name for figure in figures] == ["F1-RadGraph", "F1-RadGraph-simple", "F1-RadGraph-complete"]
    assert figures[0].value() == expected


@pytest.mark.parametrize(
    ("label", "expected"), [("OBS-DP", "v1"), ("Observation::definitely present", "XL"), ("X", "unknown")]
)
def test_model_by_labels(label: str, expected: str) -> None:
    assert model_of([{"1": {"tokens": "a", "label": label}}]) == expected


@pytest.mark.parametrize(
    "graph",
    [{"entities": REFERENCE}, REFERENCE, {"0": {"text": "x", "entities": REFERENCE}}, {"text": "", "entities": {}}],
)
def test_accepted_forms(graph: Any) -> None:
    assert entities_of(graph, "row 0") == (graph["entities"] if graph.get("entities") == {} else REFERENCE)


@pytest.mark.parametrize(
    "graph",
    [
        "text",
        [1],
        {"entities": []},
        {"entities": {"1": {"tokens": "a"}}},
        {"entities": {"1": {"tokens": "a", "label": "OBS-DP", "relations": [["modify", "9"]]}}},
        {"entities": {"1": {"tokens": "a", "label": "OBS-DP", "relations": ["modify"]}}},
    ],
)
def test_rejected_forms(graph: Any) -> None:
    with pytest.raises(DataError, match="row 3"):
        entities_of(graph, "graphs.jsonl, row 3: prediction")
