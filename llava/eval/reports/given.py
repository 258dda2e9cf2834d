"""Values from other tools that a user passes in: labels, graphs, and per-report scores.

    --labels FILE                 {"index", "prediction": {14 findings}, "reference": {14 findings}}, or CheXpert tables
    --radgraph-annotations FILE   {"index", "prediction": graph, "reference": graph}
    --extra-scores FILE           {"name", "direction", "values": [one per report]}, one object or several

Rows are in the order of the reports. Messages name file and row, and both counts where they differ.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.data.converters.tables import Row
from llava.errors import DataError
from llava.eval.reports.figures import ReportFigure, mean_figure
from llava.eval.reports.label_scores import LabelPair, label_array
from llava.eval.reports.rows import read_rows
from llava.report_labels.findings import FINDINGS, Label
from llava.samples import Origin
from llava.utils.jsonl import JSON_ERRORS, read_text

logger = logging.getLogger(__name__)

SIDES = ("prediction", "reference")

OLD_NAMES = {"Airspace Opacity": "Lung Opacity"}
"""Other published names of findings."""

DIRECTIONS = ("higher", "lower")


def read_labels(paths: Sequence[str | Path], *, num_reports: int, reports: str | Path) -> LabelPair:
    """Return given labels of predictions and references.

    Args:
        paths: one file with both sides, or a CheXpert table of the predictions and one of the references.
        num_reports: number of reports.
        reports: file of the reports, for messages.

    Raises:
        DataError: a file cannot be read, has another number of rows, or a label is not 1, 0, -1 or empty.
    """
    source = f"given ({', '.join(Path(path).name for path in paths)})"
    if len(paths) == 2:
        sides = [[_one_side(row, origin) for origin, row in read_rows(path)] for path in paths]
        for path, name, rows in zip(paths, SIDES, sides, strict=True):
            check_number(path, len(rows), num_reports, reports)
            _warn_missing(path, name, rows)
        return LabelPair(label_array(sides[0]), label_array(sides[1]), source)
    if len(paths) != 1:
        raise DataError(f"expected one file with both sides, or two CheXpert tables, got {len(paths)} label files")
    pairs = [_both_sides(row, origin) for origin, row in read_rows(paths[0])]
    check_number(paths[0], len(pairs), num_reports, reports)
    for place, name in enumerate(SIDES):
        _warn_missing(paths[0], name, [pair[place] for pair in pairs])
    return LabelPair(label_array(pair[0] for pair in pairs), label_array(pair[1] for pair in pairs), source)


def _warn_missing(path: str | Path, side: str, rows: Sequence[Mapping[str, Label]]) -> None:
    """Warn about findings that no row of a side names, since they distort figures of all 14 findings."""
    missing = [name for name in FINDINGS if not any(name in row for row in rows)]
    if missing and rows:
        logger.warning(
            "%s: %s: no row names %s; counted as not mentioned: do not compare figures of 14 findings with others",
            *(path, side, ", ".join(missing)),
        )


def check_number(path: str | Path, num_rows: int, num_reports: int, reports: str | Path) -> None:
    """Check that a file has one row per report.

    Raises:
        DataError: the numbers differ; names both and the first row without counterpart.
    """
    if num_rows == num_reports:
        return
    row = min(num_rows, num_reports)
    fact = "is missing" if num_rows < num_reports else "has no report"
    raise DataError(
        f"{path}, row {row}: {fact}; the file has {num_rows} rows, but {reports} has {num_reports} reports. Rows "
        f"must be in the order of the reports"
    )


def _both_sides(row: Row, origin: Origin) -> tuple[dict[str, Label], dict[str, Label]]:
    _check_index(row, origin)
    if all(isinstance(row.get(side), Mapping) for side in SIDES):
        return _labels(row["prediction"], origin, "prediction"), _labels(row["reference"], origin, "reference")
    sides = [_columns(row, side) for side in SIDES]
    if all(sides):
        return _labels(sides[0], origin, "prediction"), _labels(sides[1], origin, "reference")
    if any(name in row for name in FINDINGS):
        raise DataError(
            f"{origin}: a table of one side; pass two tables, first of the predictions, then of the references"
        )
    raise DataError(f"{origin}: expected objects 'prediction' and 'reference' with the 14 findings")


def _columns(row: Row, side: str) -> dict[str, Any]:
    """Return the columns `prediction_Edema` of one side by finding."""
    return {name: row[key] for name in FINDINGS for mark in "_.: " if (key := f"{side}{mark}{name}") in row}


def _one_side(row: Row, origin: Origin) -> dict[str, Label]:
    given = {OLD_NAMES.get(name, name): value for name, value in row.items()}
    known = {name: given[name] for name in FINDINGS if name in given}
    if not known:
        raise DataError(f"{origin}: no column is one of the 14 findings, such as {FINDINGS[0]!r}")
    return _labels(known, origin, "table")


def _labels(given: Mapping[str, Any], origin: Origin, side: str) -> dict[str, Label]:
    labels: dict[str, Label] = {}
    for key, value in given.items():
        name = OLD_NAMES.get(key, key)
        if name not in FINDINGS:
            raise DataError(f"{origin}: {side}: unknown finding {str(key)[:60]!r}; known: {', '.join(FINDINGS)}")
        labels[name] = _label(value, origin, f"{side}, {name}")
    if not labels:
        raise DataError(f"{origin}: {side}: no labels; expected the 14 findings")
    return labels


def _label(value: Any, origin: Origin, what: str) -> Label:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str):
        if value.strip().lower() in ("", "nan", "null", "none"):
            return None
        try:
            value = float(value)
        except ValueError:
            value = "text"
    if not isinstance(value, bool) and isinstance(value, int | float) and value in (1, 0, -1):
        return int(value)
    shown = value if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__
    raise DataError(f"{origin}: {what} is {shown}; expected 1, 0, -1, or null for not mentioned")


def _check_index(row: Row, origin: Origin) -> None:
    index = row.get("index")
    if index is None or (isinstance(index, str) and not index.strip()):
        return
    if str(index).strip() not in (str(origin.row), f"{origin.row}.0"):
        raise DataError(
            f"{origin}: 'index' is {str(index)[:20]}; expected {origin.row}, the number of the report's row"
        )


def read_graphs(path: str | Path, *, num_reports: int, reports: str | Path) -> list[tuple[Any, Any]]:
    """Return given graphs of predictions and references, unchecked (`radgraph.entities_of` checks them).

    Raises:
        DataError: the file cannot be read or has another number of rows.
    """
    pairs = []
    for origin, row in read_rows(path):
        _check_index(row, origin)
        if not all(side in row for side in SIDES):
            raise DataError(f"{origin}: expected graphs 'prediction' and 'reference'")
        pairs.append((row["prediction"], row["reference"]))
    check_number(path, len(pairs), num_reports, reports)
    return pairs


def read_extra_scores(path: str | Path, *, num_reports: int, reports: str | Path) -> list[ReportFigure]:
    """Return the figures of per-report values of other tools.

    Raises:
        DataError: the file cannot be read, a field is missing, or a value is not a finite number.
    """
    figures = []
    for number, given in enumerate(_objects(path)):
        where = f"{path}, row {number}"
        name, direction, values = given.get("name"), given.get("direction"), given.get("values")
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"{where}: 'name' is missing; expected the name of the score")
        if direction not in DIRECTIONS:
            raise DataError(f"{where}: 'direction' of {name!r} must be {' or '.join(DIRECTIONS)}")
        if not isinstance(values, list):
            raise DataError(f"{where}: 'values' of {name!r} must be a list with one number per report")
        bad = next((i for i, value in enumerate(values) if not _is_number(value)), None)
        if bad is not None:
            raise DataError(f"{path}, row {bad}: the value of {name!r} is not a finite number")
        check_number(path, len(values), num_reports, reports)
        scale = str(given.get("scale", "as given"))
        source = str(given.get("source", f"given ({Path(path).name})"))
        figures.append(mean_figure(name, values, scale=scale, direction=direction, source=source))
    names = [figure.name for figure in figures]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise DataError(f"{path}: scores repeat the names {', '.join(sorted(repeated))}")
    return figures


def _objects(path: str | Path) -> list[dict[str, Any]]:
    text = read_text(path)
    try:
        value = json.loads(text)
    except JSON_ERRORS:  # not one JSON value: one per line
        return [row for _, row in read_rows(path)]
    rows = value if isinstance(value, list) else [value]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: expected one object or a list of objects with name, direction and values")
    return rows


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
