"""Loaders of public report tables give LLaVA-Rad's questions, and count what they leave out by cause."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import pytest

from llava.data.records import load_samples
from llava.data.report_rows import WITHOUT_REASON
from llava.errors import DataError

PROJECTIONS = [
    {"uid": "1", "filename": "1_IM-0001-4001.dcm.png", "projection": "Frontal"},
    {"uid": "1", "filename": "1_IM-0001-3001.dcm.png", "projection": "Lateral"},
    {"uid": "2", "filename": "2_IM-0652-1001.dcm.png", "projection": "Frontal"},
    {"uid": "3", "filename": "3_IM-1384-1001.dcm.png", "projection": "Frontal"},
]
REPORTS = [
    {
        "uid": "1",
        "indication": "Positive\nTB test",
        "comparison": "",
        "findings": "Lungs are clear.",
        "impression": "x",
    },
    {"uid": "2", "indication": "", "comparison": "", "findings": "Heart is large.", "impression": ""},
    {"uid": "3", "indication": "pain", "comparison": "", "findings": "", "impression": "Normal."},
    {"uid": "4", "indication": "pain", "comparison": "", "findings": "No image here.", "impression": ""},
]


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_open_i_tables(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_csv(tmp_path / "indiana_projections.csv", PROJECTIONS)
    path = write_csv(tmp_path / "indiana_reports.csv", REPORTS)
    with caplog.at_level(logging.INFO, logger="llava"):
        first, second = load_samples(path, loader="openi_findings")
    assert first.id == "1_1_IM-0001-4001.dcm" and first.images == ("1_IM-0001-4001.dcm.png",)
    question = first.conversation.turns[0].text
    assert question.startswith("<image>\nProvide a description of the findings in the radiology image given the")
    assert question.endswith("following indication: Positive TB test")
    assert first.conversation.turns[1].text == "Lungs are clear." and first.meta["view"] == "Frontal"
    assert second.conversation.turns[0].text == f"<image>\n{WITHOUT_REASON['findings']}"
    assert "not a frontal view 1, no findings 1, no image 1" in caplog.text


def test_open_i_xml_reports_take_views_from_the_table(tmp_path: Path) -> None:
    write_csv(tmp_path / "indiana_projections.csv", PROJECTIONS)
    folder = tmp_path / "ecgen-radiology"
    folder.mkdir()
    (folder / "1.xml").write_text(
        '<eCitation><uId id="CXR1"/><Abstract><AbstractText Label="INDICATION">cough</AbstractText>'
        '<AbstractText Label="FINDINGS">No effusion.</AbstractText></Abstract>'
        '<parentImage id="CXR1_1_IM-0001-4001"/><parentImage id="CXR1_1_IM-0001-3001"/></eCitation>'
    )
    [sample] = load_samples(folder, loader="openi_findings")
    assert sample.images == ("CXR1_1_IM-0001-4001.png",) and sample.conversation.turns[1].text == "No effusion."
    (tmp_path / "indiana_projections.csv").unlink()
    with pytest.raises(DataError, match=r"indiana_projections\.csv is missing.*--header-table"):
        load_samples(folder, loader="openi_findings")


CHEXPERT = [
    ("train/patient1/study1/view1_frontal.jpg", "Frontal", "AP", "dyspnea", "Edema."),
    ("train/patient1/study1/view2_lateral.jpg", "Lateral", "", "dyspnea", "Edema."),
    ("train/patient2/study5/view1_frontal.jpg", "Frontal", "", "", "Clear lungs."),
    ("train/patient3/study1/view1_frontal.jpg", "Frontal", "PA", "", ""),
]


def test_chexpert_plus(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ("path_to_image", "frontal_lateral", "ap_pa", "section_clinical_history", "section_findings")
    path = write_csv(tmp_path / "plus.csv", [dict(zip(names, row, strict=True)) for row in CHEXPERT])
    with caplog.at_level(logging.INFO, logger="llava"):
        first, second = load_samples(path, loader="chexpert_plus_findings")
    assert first.id == "patient1_study1_view1_frontal" and first.meta["view"] == "AP"
    assert first.conversation.turns[0].text.endswith("indication: dyspnea")
    assert second.meta["view"] == "Frontal"
    assert "not a frontal view 1, no findings 1" in caplog.text


def test_a_table_of_something_else_is_refused(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "other.csv", [{"a": "1", "b": "2"}])
    with pytest.raises(DataError, match="no column 'path_to_image'"):
        load_samples(path, loader="chexpert_plus_findings")
