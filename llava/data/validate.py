"""The check before training: every row's images decode, find their place in the text, and leave something to train.

samples --ImageIndex.verify--> files that decode --check_rows--> rows that can be trained on, and the others
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llava.data.image_store import ImageIndex
from llava.data.quarantine import BadRow, Quarantine, bad_row, report
from llava.data.row_check import RowCheck, check_rows
from llava.errors import DataError
from llava.samples import Sample

if TYPE_CHECKING:
    from llava.processing import LlavaMedProcessor

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checked:
    """What `check_trainable` found.

    Attributes:
        samples: the rows that can be trained on, in order.
        bad: the rows that were left out.
        num_images: distinct image files the rows name.
        num_shortened: kept rows that truncation shortened.
        num_cut_tokens: tokens it removed from them.
        num_trained_tokens: trained tokens of all kept rows.
    """

    samples: list[Sample]
    bad: list[BadRow]
    num_images: int
    num_shortened: int
    num_cut_tokens: int
    num_trained_tokens: int


def check_trainable(
    samples: Sequence[Sample],
    image_folder: str | Path | None,
    processor: LlavaMedProcessor,
    *,
    max_length: int | None = None,
    skip_bad: bool = False,
    quarantine: Quarantine | None = None,
    index: ImageIndex | None = None,
    num_threads: int | None = None,
) -> Checked:
    """Make sure before training that every row can be trained on.

    For each row: all its images exist and decode, its text has one place holder per image (or none at all: then they
    go in front), and at least one token is left to train after truncation. Image files are decoded by several threads,
    once per file: a later run with the same `index` looks only at their time and size.

    Args:
        samples: rows as loaded.
        image_folder: folder that image names are relative to.
        processor: turns conversations into tokens.
        max_length: longest sequence in tokens, images included; None for no limit.
        skip_bad: leave bad rows out instead of raising.
        quarantine: where skipped rows are listed.
        index: what is known about the image files; None uses the one of `image_folder` in the user's cache.
        num_threads: threads that decode images; None takes twice the processors, at most 16.

    Raises:
        DataError: rows cannot be used and `skip_bad` is off, or no row is left; names the first of them.
    """
    if index is None:
        index = ImageIndex.open(image_folder, dicom=processor.dicom)
    refs = list(dict.fromkeys(ref for sample in samples for ref in sample.images))
    index.verify(refs, num_threads=num_threads)
    found = check_rows(samples, processor, index, max_length=max_length)
    bad = [bad_row(samples[place], reason) for place, reason in found.bad.items()]
    good = [sample for place, sample in enumerate(samples) if place not in found.bad]
    if bad and not skip_bad:
        raise DataError(report(bad, len(samples)))
    if quarantine is not None:
        quarantine.add(bad)
    if not good:
        raise DataError(f"none of the {len(samples)} rows can be trained on; " + report(bad, len(samples)))
    _log(found, quarantine, len(samples), max_length)
    return Checked(good, bad, len(refs), found.num_shortened, found.num_cut_tokens, found.num_trained_tokens)


def _log(found: RowCheck, quarantine: Quarantine | None, num_rows: int, max_length: int | None) -> None:
    if found.bad:
        where = "" if quarantine is None or quarantine.path is None else f", listed in {quarantine.path}"
        logger.warning("skipped %d of %d rows that cannot be used%s", len(found.bad), num_rows, where)
    if found.num_shortened:
        logger.warning(
            "%d of %d rows are longer than %s tokens and were shortened, by %d tokens together",
            found.num_shortened,
            num_rows,
            max_length,
            found.num_cut_tokens,
        )
