"""Converter for MIMIC-CXR: the JPG release, its split and metadata tables, and the free-text reports.

    mimic-cxr-2.0.0-split.csv.gz     dicom_id, study_id, subject_id, split (train, validate, test)
    mimic-cxr-2.0.0-metadata.csv.gz  dicom_id, ..., ViewPosition, ..., PatientOrientationCodeSequence_CodeMeaning
    mimic-cxr-2.0.0-chexpert.csv.gz  subject_id, study_id, 14 labels of 1, 0, -1 or blank (optional)
    files/p10/p10000032/s50414267/DICOM_ID.jpg    and, in mimic-cxr-reports,    files/p10/p10000032/s50414267.txt

With --annotations, the files of LLaVA-Rad for the same images are read instead of tables and reports. Access to the
data is credentialed, so no text of a report is logged.

Command:
    llava data mimic-cxr mimic-cxr-jpg mimic-cxr-reports.zip --out data/mimic-cxr --target findings
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from llava.data.converters.base import Converter, Job, run_converter
from llava.data.converters.dataset_cards import ANNOTATIONS, MIMIC_CXR
from llava.data.converters.items import SPLIT_WORDS, ConvertedItem, Event, Excluded
from llava.data.converters.radiology_reports import RadiologyReport, parse_report
from llava.data.converters.tables import Row, cell_text, column_names, read_table
from llava.data.quarantine import BadRow
from llava.data.report_rows import (
    PREFIX,
    RULE_BASED,
    TARGETS,
    VIEWS,
    LeftOut,
    QuestionRule,
    as_written,
    by_reason,
    by_view,
    findings_of,
    first_text,
    is_frontal,
    report_question,
)
from llava.errors import DataError
from llava.samples import Origin
from llava.utils.cli import Parser
from llava.utils.file_kinds import utf8_text
from llava.utils.log import with_progress
from llava.utils.lookup import lookup

FILES = {
    split: f"chat_{word}_MIMIC_CXR_all_gpt4extract_rulebased_v1.json"
    for split, word in {"train": "train", "val": "dev", "test": "test"}.items()
}

LOADERS: dict[str, QuestionRule] = {
    "mimic_findings": by_reason,
    "mimic_cxr_all_frontal_findings": as_written,
    "mimic_cxr_all_views_findings": by_view,
}
"""`mimic_findings` is `mimic_train_findings` on the training file and `mimic_test_findings` on the test file."""


def read_annotations(job: Job) -> Iterator[Event]:
    """Yield the rows of the annotation files that exist.

    Raises:
        DataError: none exists.
    """
    rule = lookup(LOADERS, job.args.loader, "loader")
    found = {split: job.sources.file(name) for split, name in FILES.items()}
    if not any(found.values()):
        raise DataError(f"{job.missing(FILES['train'])}\n{ANNOTATIONS.how_to_get}")
    for split, path in found.items():
        if path is None:
            continue
        job.inputs[path.name] = path
        for origin, row in read_table(path, columns=("id", "image", "conversations")):
            if job.is_full(split):
                break
            yield _event(job, rule, origin, row, split)


def _event(job: Job, rule: QuestionRule, origin: Origin, row: Row | DataError, split: str) -> Event:
    if isinstance(row, DataError):
        return BadRow(*origin, "", str(row))
    try:
        answer = findings_of(row)
        asked = rule(row, split)
    except LeftOut as cause:
        return Excluded(split, str(cause))
    name = str(row["image"]).removeprefix(PREFIX)
    method = first_text([row.get("generate_method")])
    identity = f"{row['id']}_{Path(name).stem}" + ("" if method in ("", RULE_BASED) else f"_{method}")
    try:
        image = job.sources.image(name, "files")
    except DataError as error:
        return BadRow(*origin, identity, str(error))
    patient, _, study = str(row["id"]).partition("_")
    meta = {
        "answer_type": "OPEN",
        "question_type": "findings",
        "image_organ": "CHEST",
        "modality": "X-ray",
        "official_split": split,
        "view": first_text([row.get("view")]),
        "orientation": first_text([row.get("orientation")]),
        "patient": patient,
        "study": study,
        "generate_method": method,
        "reason": first_text([row.get("reason")]),
        "chexpert_labels": _annotated_labels(row),
        "source": ANNOTATIONS.name,
        "license": ANNOTATIONS.license,
    }
    return ConvertedItem(identity, split, asked, answer.strip(), image, name, meta, origin)


def _annotated_labels(row: Row) -> dict[str, float]:
    labels = row.get("chexpert_labels")
    numbers = labels.items() if isinstance(labels, dict) else ()
    return {name: value for name, value in numbers if isinstance(value, int | float) and math.isfinite(value)}


SPLIT_TABLE = "mimic-cxr-2.0.0-split.csv"
METADATA = "mimic-cxr-2.0.0-metadata.csv"
CHEXPERT = "mimic-cxr-2.0.0-chexpert.csv"
ORIENTATION = "PatientOrientationCodeSequence_CodeMeaning"
REPORT_FOLDERS = ("mimic-cxr-reports/files", "files")


class ViewInfo(NamedTuple):
    """View of one image in the metadata table."""

    position: str
    orientation: str


class _Reports:
    """Reports by study; caches the last one, as images of one study are adjacent in the table."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._last: tuple[str, RadiologyReport] = ("", RadiologyReport(()))

    def of(self, subject: str, study: str) -> RadiologyReport:
        """Return the report of a study.

        Raises:
            DataError: the file is missing or is not UTF-8 text.
        """
        if self._last[0] != study:
            path = self._job.sources.image(f"p{subject[:2]}/p{subject}/s{study}.txt", *REPORT_FOLDERS)
            try:
                text = utf8_text(path.read_bytes())
            except (OSError, ValueError) as error:
                raise DataError(f"{path}: cannot be read ({error})") from None
            self._last = (study, parse_report(text))
        return self._last[1]


class StudyTables(NamedTuple):
    """Contents of the other tables by image and study, and the reports."""

    views: dict[str, ViewInfo]
    labels: dict[str, dict[str, float]]
    reports: _Reports


def read_events(job: Job) -> Iterator[Event]:
    """Yield a question for each image whose report has the target section."""
    if job.args.annotations:
        job.variant = f"annotations, {job.args.loader}"
        yield from read_annotations(job)
        return
    job.variant = f"reports, {job.args.target}, {job.args.views} views"
    table = job.require_file(SPLIT_TABLE, f"{SPLIT_TABLE}.gz")
    known = StudyTables(_views(job, job.require_file(METADATA, f"{METADATA}.gz")), _labels(job), _Reports(job))
    for origin, row in read_table(table, columns=("dicom_id", "study_id", "subject_id", "split")):
        if isinstance(row, DataError):
            yield BadRow(*origin, "", str(row))
        else:
            yield from _events(job, origin, row, known)


def _events(job: Job, origin: Origin, row: Row, known: StudyTables) -> Iterator[Event]:
    dicom, study, subject = cell_text(row, "dicom_id"), cell_text(row, "study_id"), cell_text(row, "subject_id")
    identity = f"{subject}_{study}_{dicom}"
    split = SPLIT_WORDS.get(cell_text(row, "split").lower())
    if split is None:
        yield BadRow(*origin, identity, "column 'split' must be train, validate or test")
        return
    if job.is_full(split):
        return
    view = known.views.get(dicom, ViewInfo("", ""))
    if job.args.views == "frontal" and not is_frontal(view.position):
        yield Excluded(split, "not a frontal view (AP or PA)" if view.position else "view not stated")
        return
    try:
        report = known.reports.of(subject, study)
        name = f"p{subject[:2]}/p{subject}/s{study}/{dicom}.jpg"
        answer = report.text(job.args.target)
        if not answer:
            yield Excluded(split, f"report without {job.args.target}")
            return
        image = job.sources.image(name, "files")
    except DataError as error:
        yield BadRow(*origin, identity, str(error))
        return
    meta = {
        "answer_type": "OPEN",
        "question_type": job.args.target,
        "image_organ": "CHEST",
        "modality": "X-ray",
        "official_split": split,
        "view": view.position,
        "orientation": view.orientation,
        "patient": subject,
        "study": study,
        "reason": report.reason,
        "chexpert_labels": known.labels.get(study),
        "source": job.card.name,
        "license": job.card.license,
    }
    asked = report_question(job.args.target, report.reason if job.args.reason else None)
    yield ConvertedItem(identity, split, asked, answer, image, name, meta, origin)


def _views(job: Job, path: Path) -> dict[str, ViewInfo]:
    """Return the view of each image by DICOM id."""
    orientation = ORIENTATION if ORIENTATION in column_names(path) else None
    shared: dict[ViewInfo, ViewInfo] = {}  # one object per distinct view: the table has 377,110 rows
    views: dict[str, ViewInfo] = {}
    rows = read_table(path, columns=("dicom_id", "ViewPosition"))
    for origin, row in with_progress(rows, title="reading views", unit="row"):
        if isinstance(row, DataError):
            raise DataError(f"{origin}: {row}")
        view = ViewInfo(cell_text(row, "ViewPosition"), cell_text(row, orientation))
        views[cell_text(row, "dicom_id")] = shared.setdefault(view, view)
    return views


def _labels(job: Job) -> dict[str, dict[str, float]]:
    """Return the CheXpert labels of each study without blank ones (not mentioned)."""
    if job.sources.file(CHEXPERT, f"{CHEXPERT}.gz") is None:
        job.facts["chexpert_labels"] = "not there"
        return {}
    path = job.require_file(CHEXPERT, f"{CHEXPERT}.gz")
    labels: dict[str, dict[str, float]] = {}
    for origin, row in read_table(path, columns=("subject_id", "study_id")):
        if isinstance(row, DataError):
            raise DataError(f"{origin}: {row}")
        given = {name: cell_text(row, name) for name in row if name not in ("subject_id", "study_id")}
        try:
            labels[cell_text(row, "study_id")] = {name: float(value) for name, value in given.items() if value}
        except ValueError:
            raise DataError(f"{origin}: a label is not a number; expected 1, 0, -1 or blank") from None
    return labels


def add_options(parser: Parser) -> None:
    """Add the options of this converter."""
    parser.add_argument("--target", choices=TARGETS, default="findings", help="report section that is the answer")
    parser.add_argument("--views", choices=VIEWS, default="frontal", help="views to include")
    parser.add_switch("--reason", default=True, help="add the reason for the examination to the question")
    parser.add_switch("--annotations", help="read the annotation files of LLaVA-Rad instead of tables and reports")
    parser.add_argument(
        "--loader",
        choices=sorted(LOADERS),
        default="mimic_findings",
        help="selection of rows and questions, with --annotations",
    )


CONVERTER = Converter("mimic-cxr", MIMIC_CXR, read_events, add_options)


def main(argv: Sequence[str] | None = None) -> None:
    """Run `llava data mimic-cxr`."""
    run_converter(CONVERTER, argv)
