"""The check before training: every row's images decode, find their place in the text, and leave something to train.

samples --ImageIndex.verify--> files that decode --with_places, encode--> rows that can be trained on, and the others
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llava.constants import IGNORE_INDEX
from llava.data.encode import Encoded, encode
from llava.data.image_store import ImageIndex
from llava.data.images import key_of_digest
from llava.data.placing import with_places
from llava.data.quarantine import BadRow, Quarantine, bad_row, report
from llava.errors import DataError
from llava.samples import Sample
from llava.utils.log import progress

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
        index = ImageIndex.open(image_folder)
    refs = list(dict.fromkeys(ref for sample in samples for ref in sample.images))
    index.verify(refs, num_threads=num_threads)
    good: list[Sample] = []
    bad: list[BadRow] = []
    num_shortened = num_cut = num_trained = 0
    for sample, found in _encode_all(samples, processor, index, max_length):
        if isinstance(found, DataError):
            bad.append(bad_row(sample, str(found)))
            continue
        good.append(sample)
        num_shortened += found.num_cut > 0
        num_cut += found.num_cut
        num_trained += _num_trained(found)
    if bad and not skip_bad:
        raise DataError(report(bad, len(samples)))
    if quarantine is not None:
        quarantine.add(bad)
    if not good:
        raise DataError(f"none of the {len(samples)} rows can be trained on; " + report(bad, len(samples)))
    _log(bad, quarantine, len(samples), num_shortened=num_shortened, num_cut=num_cut, max_length=max_length)
    return Checked(good, bad, len(refs), num_shortened, num_cut, num_trained)


def _encode_all(
    samples: Sequence[Sample], processor: LlavaMedProcessor, index: ImageIndex, max_length: int | None
) -> Iterator[tuple[Sample, Encoded | DataError]]:
    """Yield each row with its tokens, or with the reason why it cannot be trained on."""
    fingerprint = processor.image_fingerprint
    for sample in progress(samples, title="checking rows", unit="row"):
        try:
            keys = [key_of_digest(index.digest(ref), fingerprint) for ref in sample.images]
            encoded = encode(with_places(sample), processor, images=keys, max_length=max_length)
            if not _num_trained(encoded):
                cut = f" after {encoded.num_cut} tokens were cut to fit {max_length}" if encoded.num_cut else ""
                raise DataError(f"no token is left to train{cut}; expected at least one answer")
        except DataError as error:
            yield sample, error
        else:
            yield sample, encoded


def _num_trained(encoded: Encoded) -> int:
    return len(encoded.labels) - encoded.labels.count(IGNORE_INDEX)


def _log(
    bad: Sequence[BadRow],
    quarantine: Quarantine | None,
    num_rows: int,
    *,
    num_shortened: int,
    num_cut: int,
    max_length: int | None,
) -> None:
    if bad:
        where = "" if quarantine is None or quarantine.path is None else f", listed in {quarantine.path}"
        logger.warning("skipped %d of %d rows that cannot be used%s", len(bad), num_rows, where)
    if num_shortened:
        logger.warning(
            "%d of %d rows are longer than %s tokens and were shortened, by %d tokens together",
            num_shortened,
            num_rows,
            max_length,
            num_cut,
        )
