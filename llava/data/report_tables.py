"""Loaders of public report tables (Open-i, CheXpert Plus) in the schema of LLaVA-Rad.

    indiana_reports.csv + indiana_projections.csv, or a folder of XML reports --+
    df_chexpert_plus.csv -------------------------------------------------------+--> {id, image, view, reason, findings}
                                              row --read_report_row--> Sample | LeftOut(cause)

The reason for the examination is the indication. Ids begin with the patient (Open-i: the report), then `_`, as in
LLaVA-Rad's files, so that scores resample patients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from llava.constants import IMAGE_TOKEN
from llava.data.converters.iu_xray import (
    PROJECTIONS,
    Study,
    image_views,
    read_projections,
    read_study,
    table_studies,
)
from llava.data.converters.tables import cell_text, read_table
from llava.data.report_rows import LeftOut, first_text, is_frontal, report_question
from llava.errors import DataError
from llava.samples import Sample, from_row

NumberedValue = tuple[int, Any]
RowSource = Callable[[str | Path], Iterator[NumberedValue]]
"""Function from a path to numbered rows; a row that cannot be used is a `DataError`."""

REASONS = ("section_indication", "section_clinical_history", "section_history")
"""Columns of CheXpert Plus with the reason for the examination, the most direct first."""


def read_report_row(row: dict[str, Any], default_id: str) -> tuple[Sample, int]:
    """Return the sample of a row of `SOURCES`, and 0 dropped turns.

    Raises:
        LeftOut: the row has no findings, no image, or not a frontal view.
        DataError: a field is missing or cannot be used.
    """
    if not row["findings"]:
        raise LeftOut("no findings")
    if not row["image"]:
        raise LeftOut("no image")
    if not is_frontal(row["view"]):
        raise LeftOut("not a frontal view")
    question = f"{IMAGE_TOKEN}\n{report_question('findings', row['reason'])}"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": row["findings"]}]
    found = {"id": row["id"] or default_id, "image": row["image"], "conversations": turns, "view": row["view"]}
    return from_row(found, default_id=default_id), 0


def open_i_rows(path: str | Path) -> Iterator[NumberedValue]:
    """Yield a row for each image of each report of Open-i.

    Args:
        path: `indiana_reports.csv`, or a folder of XML reports; `indiana_projections.csv`, which states the views, is
            in the same folder (for XML also in the one above).

    Raises:
        DataError: a file is missing or cannot be read.
    """
    place, number = Path(path), 0
    for study in _xml_studies(place) if place.is_dir() else _table_studies(place):
        rows = [study] if isinstance(study, DataError) else _study_rows(study)
        for row in rows:
            yield number, row
            number += 1


def _table_studies(path: Path) -> Iterator[Study | DataError]:
    images = read_projections(_projections(path.parent))
    for study in table_studies(path, images):
        yield study if isinstance(study, Study) else DataError(study.reason)


def _xml_studies(folder: Path) -> Iterator[Study | DataError]:
    files = sorted(folder.rglob("*.xml"), key=lambda path: (len(path.stem), path.stem))
    if not files:
        raise DataError(f"{folder}: no XML report; expected the folder ecgen-radiology or indiana_reports.csv")
    views = image_views(read_projections(_projections(folder, folder.parent)))
    for file in files:
        try:
            yield read_study(file, views)
        except DataError as error:
            yield error


def _projections(*folders: Path) -> Path:
    for folder in folders:
        if (folder / PROJECTIONS).is_file():
            return folder / PROJECTIONS
    raise DataError(
        f"{folders[0]}: {PROJECTIONS} is missing, which states the view of each image; add it, or convert the reports "
        "with `llava data iu-xray --header-table`"
    )


def _study_rows(study: Study) -> list[dict[str, Any]]:
    texts = {"reason": study.texts.get("indication", ""), "findings": study.texts.get("findings", "")}
    images = study.images or (("", ""),)
    return [
        {"id": f"{study.uid}_{PurePosixPath(name).stem}", "image": name, "view": view, **texts} for name, view in images
    ]


def chexpert_plus_rows(path: str | Path) -> Iterator[NumberedValue]:
    """Yield a row for each image of the table of CheXpert Plus.

    Raises:
        DataError: the table cannot be read or lacks a column.
    """
    for origin, row in read_table(path, columns=("path_to_image", "frontal_lateral", "section_findings")):
        yield origin.row, row if isinstance(row, DataError) else _chexpert_row(row)


def _chexpert_row(row: dict[str, Any]) -> dict[str, Any]:
    image = cell_text(row, "path_to_image")
    side, projection = cell_text(row, "frontal_lateral"), cell_text(row, "ap_pa")
    is_side = side.lower() not in ("", "frontal")
    return {
        "id": "_".join(PurePosixPath(image).with_suffix("").parts[-3:]),
        "image": image,
        "view": side if is_side or not projection else projection,
        "reason": first_text(" ".join(cell_text(row, name).split()) for name in REASONS),
        "findings": " ".join(cell_text(row, "section_findings").split()),
    }


SOURCES: dict[str, RowSource] = {"openi_findings": open_i_rows, "chexpert_plus_findings": chexpert_plus_rows}
"""Readers of the files of these loaders; those of the others are JSON."""
