"""Agreement of rule labels with index terms: `scripts/label_agreement.py` on reports written here."""

from __future__ import annotations

from types import ModuleType
from xml.etree.ElementTree import Element, fromstring

import pytest

from tests.support.scripts import load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("label_agreement")


def document(findings: str, *terms: str) -> Element:
    major = "".join(f"<major>{term}</major>" for term in terms)
    return fromstring(f'<r><AbstractText Label="FINDINGS">{findings}</AbstractText><MeSH>{major}</MeSH></r>')


REPORTS = [
    ("both", document("There is a small  pneumothorax.", "Pneumothorax/right")),
    ("uncertain", document("Possible pneumothorax.")),
    ("denied", document("No pneumothorax.", "hydropneumothorax/left")),
    ("scar", document("Scarring of the left lung.", "Cicatrix/lung/base/left")),
    ("round", document("There is a round density.", "density/lung/round")),
    ("none", document("", "pneumothorax")),
]


def test_counts_and_disagreements(script: ModuleType) -> None:
    found = script.compare(REPORTS)
    assert found["Pneumothorax"].row == (2, 2, 0.5, 0.5, 0.5)
    rows = [(row["report"], row["rules"], row["terms"]) for row in found["Pneumothorax"].disagreements]
    assert rows == [("uncertain", -1, []), ("denied", 0, ["hydropneumothorax/left"])]
    assert found["Lung Opacity"].row[:2] == (1, 1) and found["Lung Lesion"].row[0] == 1


def test_the_table_ends_with_the_micro_average(script: ModuleType) -> None:
    lines = script.table(script.compare(REPORTS)).splitlines()
    assert len(lines) == 2 + 12 + 1
    name, terms, rules, *scores = lines[-1].split()
    assert (name, terms, rules) == ("micro", "5", "3") and scores == ["0.67", "0.40", "0.50"]
