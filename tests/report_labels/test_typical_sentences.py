"""Rule labels of sentences as reports of many hospitals write them; sentences and labels are our own."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from llava.report_labels.findings import FINDINGS, NO_FINDING, Label
from llava.report_labels.labeler import label_report

FILE = Path(__file__).with_name("typical_sentences.tsv")


def typical_sentences() -> list[tuple[str, dict[str, Label]]]:
    """Return sentences with the labels of all findings that they mention."""
    with FILE.open(newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
    pairs = [[part.rsplit(" ", 1) for part in filter(None, row["labels"].split(", "))] for row in rows]
    return [
        (row["sentence"], {name: int(value) for name, value in parts}) for row, parts in zip(rows, pairs, strict=True)
    ]


@pytest.mark.parametrize(("sentence", "expected"), typical_sentences())
def test_labels(sentence: str, expected: dict[str, Label]) -> None:
    labels = label_report(sentence).labels
    assert {name: value for name, value in labels.items() if value is not None and name != NO_FINDING} == expected


@pytest.mark.parametrize(
    "typography", [{" ": "\u00a0", "-": "\u2011", "'": "\u2019"}, {" ": "\u2009", "-": "\u2013", "?": "\uff1f"}]
)
def test_typography_changes_nothing(typography: dict[str, str]) -> None:
    for sentence, _ in typical_sentences():
        found = label_report(sentence.translate(str.maketrans(typography)))
        assert found == label_report(sentence), sentence


def test_every_finding_has_every_value() -> None:
    values = {(name, value) for _, labels in typical_sentences() for name, value in labels.items()}
    assert values >= {(name, value) for name in FINDINGS[:-1] for value in (1, 0, -1)}
