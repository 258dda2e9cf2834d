"""Rule labels against labels of 80 reports by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llava.report_labels.findings import Label
from llava.report_labels.labeler import label_report
from tests.support.iu_reports import iu_findings

PREDICATES: dict[str, Callable[[Label], bool]] = {
    "positive": lambda value: value == 1,
    "positive or uncertain": lambda value: value in (1, -1),
    "negative": lambda value: value == 0,
    "uncertain": lambda value: value == -1,
}


def micro_f1(expected: dict[str, dict[str, Label]], is_hit: Callable[[Label], bool]) -> float:
    """Return the F1 of one kind of value over all labeled cells."""
    texts = iu_findings()
    hits = false = missed = 0
    for uid, row in expected.items():
        labels = label_report(texts[uid]).labels
        for name, value in row.items():
            asked, given = is_hit(value), is_hit(labels[name])
            hits, false, missed = hits + (asked and given), false + (given > asked), missed + (asked > given)
    return 2 * hits / (2 * hits + false + missed)


@pytest.mark.parametrize(
    ("kind", "least"),
    [("positive", 0.97), ("positive or uncertain", 0.97), ("negative", 0.98), ("uncertain", 0.85)],
)
def test_labels_by_hand(shared: Path, kind: str, least: float) -> None:
    expected = json.loads((shared / "data" / "iu-labels" / "labels_shared.json").read_text())
    assert micro_f1(expected, PREDICATES[kind]) >= least
