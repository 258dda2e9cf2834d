"""Validate rows before training: images decode, placeholders match, and a token is trained.

samples --ImageIndex.verify--> files that decode --check_rows--> usable rows, and reasons for the others
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llava import __version__
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN
from llava.data.encode import Encoded, encode
from llava.data.image_store import ImageIndex
from llava.data.quarantine import BadRow, Quarantine, bad_row, bad_rows_message
from llava.errors import DataError
from llava.imaging.decode import key_of_digest
from llava.samples import Conversation, Sample, Turn, with_placeholders
from llava.utils.jsonl import write_json
from llava.utils.log import with_progress

if TYPE_CHECKING:
    from llava.processing import LlavaMedProcessor

logger = logging.getLogger(__name__)


MIN_REMEMBERED = 2000
"""Smallest number of rows whose check results are cached; fewer are checked within seconds."""

PROBE_SIZES = ((512, 512), (640, 480))
"""Sizes of the images of the probe conversation in `_fingerprint`."""


@dataclass(slots=True)
class RowCheck:
    """Results of tokenizing every row; counts cover the usable rows only.

    Attributes:
        bad: index of each unusable row in the list, and the reason.
        num_shortened: number of rows that truncation shortened.
        num_cut_tokens: number of tokens that truncation removed.
        num_trained_tokens: number of trained tokens.
    """

    bad: dict[int, str] = field(default_factory=dict)
    num_shortened: int = 0
    num_cut_tokens: int = 0
    num_trained_tokens: int = 0


@dataclass(frozen=True, slots=True)
class _Limit:
    """Longest sequence, and whether each image counts as one token of it; arguments of `encode`."""

    max_length: int | None
    image_counts_as_one: bool


def check_rows(
    samples: Sequence[Sample],
    processor: LlavaMedProcessor,
    index: ImageIndex,
    *,
    max_length: int | None,
    image_counts_as_one: bool = False,
) -> RowCheck:
    """Return unusable rows with reasons, and token counts; results of an equal call are reused.

    Args:
        samples: rows to check.
        processor: turns conversations into tokens.
        index: index of the image files, after `ImageIndex.verify`.
        max_length: longest sequence in tokens; None for no limit.
        image_counts_as_one: count each image as one token of `max_length`, see `encode`.
    """
    limit = _Limit(max_length, image_counts_as_one)
    path: Path | None = None
    if index.path is not None and len(samples) >= MIN_REMEMBERED:
        path = index.path.with_name(f"rows-{_fingerprint(samples, processor, index, limit)[:32]}.json")
        if (known := _remembered(path)) is not None:
            return known
    found = RowCheck()
    for place, sample in enumerate(with_progress(samples, title="checking rows", unit="row")):
        try:
            encoded = _encode(sample, processor, index, limit)
        except DataError as error:
            found.bad[place] = str(error)
            continue
        found.num_shortened += encoded.num_cut > 0
        found.num_cut_tokens += encoded.num_cut
        found.num_trained_tokens += _num_trained(encoded)
    if path is not None:
        _remember(path, found)
    return found


def _encode(sample: Sample, processor: LlavaMedProcessor, index: ImageIndex, limit: _Limit) -> Encoded:
    """Return the tokens of a row.

    Raises:
        DataError: the row cannot be used for training.
    """
    keys = [key_of_digest(index.digest(ref), processor.image_fingerprint) for ref in sample.images]
    sizes = [index.dimensions(ref) for ref in sample.images] if processor.has_variable_images else None
    encoded = encode(with_placeholders(sample), processor, images=keys, sizes=sizes, **asdict(limit))
    if not _num_trained(encoded):
        cut = f" after {encoded.num_cut} tokens were cut to fit {limit.max_length}" if encoded.num_cut else ""
        raise DataError(f"no token is left to train{cut}; expected at least one answer that is not empty")
    return encoded


def _num_trained(encoded: Encoded) -> int:
    return len(encoded.labels) - encoded.labels.count(IGNORE_INDEX)


def _fingerprint(samples: Sequence[Sample], processor: LlavaMedProcessor, index: ImageIndex, limit: _Limit) -> str:
    """Return a hash of the rows, the state of their images, and how the processor turns text into tokens."""
    # Encoding a probe conversation covers all settings of the processor without listing them here.
    turns = (Turn("human", f"{IMAGE_TOKEN} q "), Turn("gpt", "a"), Turn("human", f"q {IMAGE_TOKEN}"), Turn("gpt", " a"))
    probe = encode(Conversation(turns), processor, images=("x", "y"), sizes=PROBE_SIZES, max_length=None)
    backend = cast(Any, processor.tokenizer).backend_tokenizer.to_str()
    images = [processor.image_fingerprint, asdict(processor.image_grid), limit.image_counts_as_one]
    settings = [__version__, images, limit.max_length, asdict(probe)]
    digest = hashlib.sha256(json.dumps(settings).encode() + backend.encode())
    for sample in samples:
        state = [index.digest_or_error(ref) for ref in sample.images]
        digest.update(repr((sample.id, sample.origin, sample.conversation, state)).encode())
    return digest.hexdigest()


def _remembered(path: Path) -> RowCheck | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return RowCheck(**{**content, "bad": {int(place): reason for place, reason in content["bad"].items()}})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("check results %s cannot be read (%s); all rows are checked again", path, error)
        return None


def _remember(path: Path, found: RowCheck) -> None:
    try:
        write_json(path, asdict(found))
    except OSError as error:
        logger.warning(
            "check results %s cannot be written (%s); rows will be checked again in the next run", path, error
        )


@dataclass(frozen=True, slots=True)
class Checked:
    """Result of `check_trainable`.

    Attributes:
        samples: usable rows, in order.
        bad: skipped rows.
        num_images: number of distinct image files that the rows name.
        num_shortened: number of usable rows that truncation shortened.
        num_cut_tokens: number of tokens that truncation removed from them.
        num_trained_tokens: number of trained tokens of all usable rows.
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
    image_counts_as_one: bool = False,
    skip_bad: bool = False,
    quarantine: Quarantine | None = None,
    index: ImageIndex | None = None,
    num_threads: int | None = None,
) -> Checked:
    """Return the rows that can be used for training; raise for the others, or skip them.

    A row is usable if all its images exist and decode, its text has one placeholder per image (or none, then they are
    put in front), and at least one token is left to train after truncation. Image files are decoded once, by several
    threads; a later run with the same `index` compares only their times and sizes.

    Args:
        samples: rows as loaded.
        image_folder: folder that image names are relative to.
        processor: turns conversations into tokens.
        max_length: longest sequence in tokens, images included; None for no limit.
        image_counts_as_one: count each image as one token of `max_length`, see `encode`.
        skip_bad: skip bad rows instead of raising.
        quarantine: list that skipped rows are added to.
        index: index of the image files; None uses that of `image_folder` in the user's cache.
        num_threads: threads that decode images; None takes two per processor, at most 16.

    Raises:
        DataError: rows cannot be used and `skip_bad` is off, or no row is usable; the message lists the first ones.
    """
    if index is None:
        index = ImageIndex.open(image_folder, dicom=processor.dicom)
    refs = list(dict.fromkeys(ref for sample in samples for ref in sample.images))
    index.verify(refs, num_threads=num_threads)
    found = check_rows(samples, processor, index, max_length=max_length, image_counts_as_one=image_counts_as_one)
    bad = [bad_row(samples[place], reason) for place, reason in found.bad.items()]
    good = [sample for place, sample in enumerate(samples) if place not in found.bad]
    if bad and not skip_bad:
        raise DataError(bad_rows_message(bad, len(samples)))
    if quarantine is not None:
        quarantine.add(bad)
    if not good:
        raise DataError(
            f"none of the {len(samples)} rows can be used for training; " + bad_rows_message(bad, len(samples))
        )
    _log(found, quarantine, len(samples), max_length)
    return Checked(good, bad, len(refs), found.num_shortened, found.num_cut_tokens, found.num_trained_tokens)


def _log(found: RowCheck, quarantine: Quarantine | None, num_rows: int, max_length: int | None) -> None:
    if found.bad:
        where = "" if quarantine is None or quarantine.path is None else f", listed in {quarantine.path}"
        logger.warning("skipped %d of %d rows that cannot be used%s", len(found.bad), num_rows, where)
    if found.num_shortened:
        logger.warning(
            "%d of %d rows are longer than %s tokens and were shortened, by %d tokens in total",
            found.num_shortened,
            num_rows,
            max_length,
            found.num_cut_tokens,
        )
