"""Load samples from JSON arrays, JSON lines (plain or gzipped) and report tables.

    file --json_rows--> (row number, JSON value) --> Sample with its origin (file and row)

One piece of the text and one decoded row are held at a time.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from llava.data.quarantine import BadRow, Quarantine
from llava.data.report_rows import LeftOut, as_written, by_reason, by_view, read_annotation
from llava.data.report_tables import SOURCES, read_report_row
from llava.errors import DataError
from llava.imaging.decode import resolve_image_path
from llava.samples import CONVERSATION_KEYS, Origin, Sample, from_row, num_lost_turns
from llava.utils.json_rows import read_rows
from llava.utils.lookup import lookup

logger = logging.getLogger(__name__)


def load_samples(
    path: str | Path,
    *,
    image_folder: str | Path | None = None,
    skip_bad: bool = False,
    quarantine: Quarantine | None = None,
    loader: str = "default",
) -> list[Sample]:
    """Return the samples of a data file, in file order.

    >>> samples = load_samples(rows_file, image_folder=image_folder)
    >>> samples[0].images, str(samples[0].origin).rpartition(", ")[2]
    (('0.png',), 'row 0')

    Args:
        path: path of the data file.
        image_folder: if given, every image that a row names must exist in it (images are not opened).
        skip_bad: skip bad rows with one warning instead of raising.
        quarantine: list that skipped rows are added to.
        loader: layout of the rows, a name in `LOADERS`.

    Raises:
        DataError: the file cannot be read; or a row cannot be used and `skip_bad` is off (the message names file, row
            and id).
        ConfigError: unknown loader.
    """
    read = lookup(LOADERS, loader, "loader")
    samples: list[Sample] = []
    bad: list[BadRow] = []
    left_out: Counter[str] = Counter()
    num_lost = 0
    for row, value in SOURCES.get(loader, read_rows)(path):
        try:
            sample, lost = sample_of(value, Origin(str(path), row), read)
            if image_folder is not None:
                _check_files(sample, image_folder)
        except LeftOut as cause:
            left_out[str(cause)] += 1
        except DataError as error:
            found = BadRow(str(path), row, _id_of(value), str(error))
            if not skip_bad:
                raise DataError(str(found)) from error
            bad.append(found)
        else:
            samples.append(sample)
            num_lost += lost
    if quarantine is not None and skip_bad:
        quarantine.add(bad)
    _log_left_out(path, bad, len(samples), num_lost)
    if left_out:
        causes = ", ".join(f"{cause} {count}" for cause, count in left_out.most_common())
        logger.info("%s: %d rows; left out by --loader %s: %s", path, len(samples), loader, causes)
    if not samples:
        raise DataError(f"{path}: no row can be used" + _why_none(bad, left_out))
    return samples


def _why_none(bad: Sequence[BadRow], left_out: Mapping[str, int]) -> str:
    if bad:
        return f"; the first: {bad[0]}"
    if left_out:
        return "; all were left out: " + ", ".join(f"{cause} {count}" for cause, count in left_out.items())
    return "; the file is empty"


def _log_left_out(path: str | Path, bad: Sequence[BadRow], num_samples: int, num_lost: int) -> None:
    if bad:
        logger.warning("%s: skipped %d of %d rows; the first: %s", path, len(bad), len(bad) + num_samples, bad[0])
    if num_lost:
        logger.warning("%s: %d rows began with an answer, which was dropped", path, num_lost)


def sample_of(value: Any, origin: Origin, read: RowReader) -> tuple[Sample, int]:
    """Return the sample of a value of `json_rows` with its origin, and the number of dropped turns.

    Raises:
        DataError: the row cannot be used.
    """
    if isinstance(value, DataError):
        raise value
    if not isinstance(value, dict):
        raise DataError(f"a row must be a JSON object, got {type(value).__name__}")
    sample, lost = read(value, str(origin.row))
    return replace(sample, origin=origin), lost


def read_default(row: dict[str, Any], default_id: str) -> tuple[Sample, int]:
    """Return the sample of a row of the LLaVA-Med family, and the number of turns that were dropped.

    A row holds either conversations (alignment, instruction tuning, VQA) or a question of the chat evaluation
    (`question_id`, `text`), which becomes one open question. A row without an id gets `default_id`.

    Raises:
        DataError: a field is missing or cannot be used.
    """
    if any(key in row for key in CONVERSATION_KEYS):
        sample = from_row(row, default_id=default_id)
        return sample, num_lost_turns(row, sample)
    if "text" in row:
        identity = row.get("id", row.get("question_id", default_id))
        question = [{"from": "human", "value": row["text"]}]
        return from_row({**row, "id": identity, "conversations": question}), 0
    raise DataError(
        f"the row has no conversation: expected field 'conversations' (or 'text' in a question file), "
        f"got {', '.join(map(repr, row)) or 'no fields'}"
    )


def _check_files(sample: Sample, image_folder: str | Path) -> None:
    for ref in sample.images:
        path = resolve_image_path(ref, image_folder)
        if not path.is_file():
            raise DataError(f"image {path} does not exist")


def _id_of(value: Any) -> str:
    """Return the id of a JSON value for messages; empty if it is not an object with an id."""
    if not isinstance(value, dict):
        return ""
    return str(value.get("id", value.get("question_id", "")))


RowReader = Callable[[dict[str, Any], str], tuple[Sample, int]]
"""From a row and its default id to its sample and the number of dropped turns."""

LOADERS: dict[str, RowReader] = {
    "default": read_default,
    "mimic_train_findings": partial(read_annotation, rule=by_reason, split="train"),
    "mimic_test_findings": partial(read_annotation, rule=by_reason, split="test"),
    "mimic_cxr_all_frontal_findings": partial(read_annotation, rule=as_written),
    "mimic_cxr_all_views_findings": partial(read_annotation, rule=by_view),
    "openi_findings": read_report_row,
    "chexpert_plus_findings": read_report_row,
}
