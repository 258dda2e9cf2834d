"""Values of class fields that the report shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava.data.check.report import check_file, report_data, report_summary
from llava.data.check.scan import CLASS_FIELDS
from llava.data.check.vocabulary import OTHER, shown_counts
from tests.support.check_files import row, write_rows

SECRETS = ["Jane Roe", "roe, jane", "fell from a ladder", "Station 5 West", "J. R. of Lyon", "4711-Roe"]


@pytest.mark.parametrize("name", CLASS_FIELDS)
def test_rare_values_are_not_shown(tmp_path: Path, name: str) -> None:
    rows = [row(number, **{name: secret}) for number, secret in enumerate(SECRETS)]
    rows += [row(number, **{name: "Station 7"}) for number in range(10, 15)]
    rows += [row(20, **{name: [SECRETS[0]] * 9}), row(21, **{name: {SECRETS[1]: True}})]
    report = check_file(write_rows(tmp_path / "rows.json", rows))
    assert report_data(report, strict=False)["files"]["file"]["classes"][name] == {OTHER: 8, "Station 7": 5}
    shown = report_summary(report, strict=False) + str(report_data(report, strict=False))
    assert not [secret for secret in SECRETS if secret in shown]


WORDS = [("answer_type", "Closed"), ("answer_type", "yes/no"), ("modality", "MRI"), ("modality", "X-ray")]
WORDS += [
    ("label", "7"),
    ("question_type", "PRES"),
    ("image_organ", "CHEST"),
    ("view", "PA"),
    ("official_split", "test"),
]


@pytest.mark.parametrize(("name", "word"), WORDS)
def test_known_values_are_shown_from_the_first_row_on(name: str, word: str) -> None:
    assert shown_counts(name, {word: 1}) == {word: 1}


def test_limits() -> None:
    counts = {"four rows": 4, "five rows": 5, "x" * 40: 5, "y" * 41: 50}
    assert shown_counts("source", counts) == {OTHER: 54, "five rows": 5, "x" * 40: 5}
