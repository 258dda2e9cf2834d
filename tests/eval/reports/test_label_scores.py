"""F1 of the 14 findings: golden values, breakdown, and the four-way table."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.eval.reports.figures import Resampler
from llava.eval.reports.label_scores import (
    BLANK,
    LabelPair,
    breakdown,
    four_way_table,
    label_array,
    label_figures,
    report_f1,
)
from llava.report_labels.findings import FINDINGS, Label

CM, ED, PNX, PE, LO = "Cardiomegaly", "Edema", "Pneumothorax", "Pleural Effusion", "Lung Opacity"

PREDICTIONS: list[dict[str, Label]] = [
    {CM: 1, ED: 0, PNX: 0, PE: 0},
    {LO: 1, "Pneumonia": -1, "Atelectasis": 1, "Support Devices": 1},
    {CM: 0, PNX: 0, PE: 0, "No Finding": 1},
    {LO: 1, ED: -1, PE: 1},
]
REFERENCES: list[dict[str, Label]] = [
    {CM: 1, ED: 0, PNX: 0, PE: -1},
    {LO: 1, "Atelectasis": 1, "Support Devices": 1},
    {CM: 0, ED: 0, PNX: 0, PE: 0, "No Finding": 1},
    {"Enlarged Cardiomediastinum": -1, CM: 1, LO: 1, ED: 1, PE: 1},
]


@pytest.fixture
def pair() -> LabelPair:
    """Labels of four reports with published figures."""
    return LabelPair(label_array(PREDICTIONS), label_array(REFERENCES), "given")


def test_published_figures(pair: LabelPair) -> None:
    values = {figure.name: figure.value() for figure in label_figures(pair)}
    assert values == pytest.approx(
        {
            "Micro-F1-14": 0.875,
            "Micro-F1-5": 0.75,
            "Macro-F1-14": 0.404762,
            "Macro-F1-5": 0.533333,
            "Micro-F1-14+": 0.8,
            "Micro-F1-5+": 0.8,
            "Macro-F1-14+": 0.452381,
            "Macro-F1-5+": 0.666667,
        },
        abs=1e-6,
    )
    assert list(values)[:4] == ["Micro-F1-14", "Micro-F1-5", "Macro-F1-14", "Macro-F1-5"]


def test_published_interval(pair: LabelPair) -> None:
    facts = Resampler(range(4)).estimate(label_figures(pair)[0])
    assert [facts["median"], facts["ci_l"], facts["ci_h"]] == pytest.approx([0.875, 0.75, 1.0])


CELL = st.sampled_from([1, 0, -1, BLANK])


@given(st.lists(st.lists(CELL, min_size=28, max_size=28), min_size=1, max_size=6))
def test_figures_equal_their_definition(rows: list[list[int]]) -> None:
    cells = np.array(rows, dtype=np.int8)
    pair = LabelPair(cells[:, :14], cells[:, 14:], "given")
    values = {figure.name: figure.value() for figure in label_figures(pair)}
    for mark, positive in (("", {1}), ("+", {1, -1})):
        found, asked = np.isin(pair.predictions, list(positive)), np.isin(pair.references, list(positive))
        each = []
        for column in range(14):
            total = found[:, column].sum() + asked[:, column].sum()
            each.append(2.0 * (found[:, column] & asked[:, column]).sum() / total if total else 0.0)
        total = found.sum() + asked.sum()
        micro = 2.0 * (found & asked).sum() / total if total else 0.0
        assert values[f"Micro-F1-14{mark}"] == pytest.approx(micro)
        assert values[f"Macro-F1-14{mark}"] == pytest.approx(np.mean(each))
        assert values[f"Macro-F1-5{mark}"] == pytest.approx(np.mean([each[i] for i in (1, 4, 5, 7, 9)]))


def test_breakdown(pair: LabelPair) -> None:
    table = breakdown(pair, with_uncertain=True)
    assert list(table) == [*sorted(FINDINGS), "micro avg", "macro avg"]
    assert table[CM] == {"precision": 1.0, "recall": 0.5, "f1-score": pytest.approx(2 / 3), "support": 2.0}
    assert table["micro avg"]["f1-score"] == pytest.approx(0.8)
    assert table["macro avg"]["f1-score"] == pytest.approx(0.452381, abs=1e-6)


def test_four_way_table(pair: LabelPair) -> None:
    table = four_way_table(pair)
    assert list(table) == [*FINDINGS, "average"]
    assert table[CM]["positive"] == pytest.approx(2 / 3)
    assert table[CM]["negation"] == 1.0
    assert table[CM]["mention"] == pytest.approx(0.8)
    # Two of three mentioned references are positive, one is negative.
    assert table[CM]["weighted"] == pytest.approx((2 * 2 / 3 + 1) / 3)
    assert table["No Finding"]["negation"] is None
    assert table[PNX]["kappa"] == 1.0


def test_averages_of_the_four_way_table() -> None:
    labels = label_array([{name: -1 for name in FINDINGS[:12]} | {"Support Devices": 1, "No Finding": 1}])
    average = four_way_table(LabelPair(labels, labels, "given"))["average"]
    assert average["uncertain"] == 1.0  # of the first twelve
    assert average["negation"] == 0.0
    assert average["positive"] == pytest.approx(2 / 14)


def test_kappa_with_one_class_is_undefined() -> None:
    labels = label_array([{"Edema": 1}, {"Edema": 1}])
    assert four_way_table(LabelPair(labels, labels, "given"))["Edema"]["kappa"] is None


def test_f1_of_each_report(pair: LabelPair) -> None:
    assert report_f1(pair) == pytest.approx([1.0, 1.0, 1.0, 2 * 2 / (2 * 2 + 2)])
