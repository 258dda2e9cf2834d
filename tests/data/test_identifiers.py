"""Patterns of identifiers: text that each rule matches, and text that it must not match."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from llava.data.check.page import write_page
from llava.data.check.report import check_file, report_data, report_summary
from llava.data.identifiers import identifier_rules
from tests.support.check_files import row, write_rows


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("Seen on 03/14/2019 again", "date"),
        ("seen on 3.4.19, later worse", "date"),
        ("seen 2019-03-14", "date"),
        ("on 14 March 2019 she", "date"),
        ("on March 14th, 2019 she", "date"),
        ("in Sept. 2019 he", "date"),
        ("the 2nd of May 2020", "date"),
        ("record 00412345 shows", "number"),
        ("MRN: 48213", "number"),
        ("Accession No. A-48213", "number"),
        ("medical record number 4821", "number"),
        ("call (555) 123-4567 now", "phone"),
        ("call 555-123-4567", "phone"),
        ("call +44 20 7946 0958", "phone"),
        ("ssn 078-05-1120", "phone"),
        ("write to jane.roe@clinic.example.org", "email"),
        ("seen by Dr. Roe", "name"),
        ("Mrs Doe was", "name"),
        ("Patient name: Doe", "name"),
        ("referring physician is Roe", "name"),
    ],
)
def test_found(text: str, rule: str) -> None:
    assert f"identifier-{rule}" in identifier_rules([text])


@pytest.mark.parametrize(
    "text",
    [
        "The mass measures 2.5 x 3.1 x 4.0 cm at L4-L5, T2/FLAIR, 1.5 T",
        "grade 3/4, BI-RADS 4, a ratio of 10.5/2.1, 120/80 mmHg",
        "in 2019 the 70 year old may have had 3 lesions, may 2 be seen",
        "version 1.2.3 at 50-60 Hz, 5-10-15 mm",
        "see https://example.org/2019/03/14/00412345 and doi 10.1148/radiol.2019190613",
        "magnification 1000000x, 1,234,567 cells, 0.1234567 mm",
        "Is there a patient in the image? The doctor says yes. MS plaques; MR The brain",
        "Dr Who? no: Drs",
        "Figure 12-3, p. 123-125",
        "HU 400-500, 512 512 512",
        "",
    ],
)
def test_left_alone(text: str) -> None:
    found = identifier_rules([text])
    assert found == ([] if "Dr Who" not in text else ["identifier-name"])


def test_long_texts_cost_little() -> None:
    start = time.process_time()
    for piece in ("1", "1-", "a@", "(1", "+1 ", "Dr", "1.", "a.", "1/", "may 1 ", "mrn ", "10.", "+1 (1) "):
        identifier_rules([piece * (60_000 // len(piece))])
    assert time.process_time() - start < 60  # a second, unless an expression takes the square of the length


def test_no_output_shows_what_was_found(tmp_path: Path) -> None:
    secrets = ["Dr. Quimbleton", "jane.roe@clinic.example", "00412345", "03/14/2019", "(555) 123-4567"]
    rows = [row(number, note=secret) for number, secret in enumerate(secrets)]
    rows.append(row(9, conversations=[{"from": "human", "value": secrets[0]}, {"from": "gpt", "value": secrets[3]}]))
    report = check_file(write_rows(tmp_path / "rows.json", rows))
    write_page(tmp_path / "page.html", report, strict=False)
    shown = report_summary(report, strict=False) + json.dumps(report_data(report, strict=False))
    shown += (tmp_path / "page.html").read_text()
    assert not [secret for secret in secrets if secret in shown]
    found = {rule["rule"]: rule["rows"] for rule in report_data(report, strict=False)["rules"]}
    assert found == {
        "identifier-date": [3, 5],
        "identifier-number": [2],
        "identifier-phone": [4],
        "identifier-email": [1],
        "identifier-name": [0, 5],
    }
