"""Validate rows before training: images decode, placeholders match, and a token is trained.

samples --ImageIndex.verify--> files that decode --check_rows--> usable rows, and reasons for the others
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llava import __version__
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN
from llava.data.encode import Encoded, encode, num_learned
from llava.data.image_store import CHECKED_AGAIN, ImageIndex, hide_names, show_names
from llava.data.quarantine import BadRow, Quarantine, bad_row, bad_rows_message
from llava.errors import DataError
from llava.imaging.decode import key_of_digest
from llava.samples import Conversation, Sample, Turn, sample_label, with_placeholders
from llava.utils.files import write_cache
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
        left_out: index of each row that teaches nothing, since its answers are empty.
        num_empty: number of empty answers in the usable rows, which are not trained.
        num_shortened: number of rows that truncation shortened.
        num_cut_tokens: number of tokens that truncation removed.
        num_trained_tokens: number of trained tokens.
    """

    bad: dict[int, str] = field(default_factory=dict)
    left_out: list[int] = field(default_factory=list)
    num_empty: int = 0
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
            shown = {place: show_names(why, _names(samples[place], index)) for place, why in known.bad.items()}
            return replace(known, bad=shown)
    found = RowCheck()
    for place, sample in enumerate(with_progress(samples, title="checking rows", unit="row")):
        try:
            encoded = _encode(sample, processor, index, limit)
        except DataError as error:
            found.bad[place] = str(error)
            continue
        conversation = sample.conversation
        if not num_learned(encoded, conversation):
            if conversation.has_only_empty_answers and not processor.template.trains_empty:
                found.left_out.append(place)
            else:
                found.bad[place] = _no_token(encoded, limit)
            continue
        found.num_empty += 0 if processor.template.trains_empty else conversation.num_empty_answers
        found.num_shortened += encoded.num_cut > 0
        found.num_cut_tokens += encoded.num_cut
        found.num_trained_tokens += _num_trained(encoded)
    if path is not None:
        hidden = {place: hide_names(why, _names(samples[place], index)) for place, why in found.bad.items()}
        write_cache(path, json.dumps(asdict(replace(found, bad=hidden))), lost=CHECKED_AGAIN)
    return found


def _names(sample: Sample, index: ImageIndex) -> list[str]:
    """Return the names that a message about a row may contain, which must not be in the cache."""
    root = "" if index.root is None else str(index.root)
    file = "" if sample.origin is None else sample.origin.file
    return [*sample.images, sample.id, file, root, str(Path(root).resolve())]


def _encode(sample: Sample, processor: LlavaMedProcessor, index: ImageIndex, limit: _Limit) -> Encoded:
    """Return the tokens of a row.

    Raises:
        DataError: the row cannot be encoded.
    """
    keys = [key_of_digest(index.digest(ref), processor.image_fingerprint) for ref in sample.images]
    sizes = [index.dimensions(ref) for ref in sample.images] if processor.has_variable_images else None
    return encode(with_placeholders(sample), processor, images=keys, sizes=sizes, **asdict(limit))


def _no_token(encoded: Encoded, limit: _Limit) -> str:
    """Return the reason why a row without a token to learn is unusable."""
    cut = f" after {encoded.num_cut} tokens were cut to fit {limit.max_length}" if encoded.num_cut else ""
    return f"no token is left to train{cut}; expected at least one answer that is not empty"


def _num_trained(encoded: Encoded) -> int:
    return len(encoded.labels) - encoded.labels.count(IGNORE_INDEX)


def _fingerprint(samples: Sequence[Sample], processor: LlavaMedProcessor, index: ImageIndex, limit: _Limit) -> str:
    """Return a hash of the rows, the state of their images, and how the processor turns text into tokens."""
    # Encoding a probe conversation covers all settings of the processor without listing them here.
    texts = (f"{IMAGE_TOKEN} q ", "a", f"q {IMAGE_TOKEN}", " a", "q", "")
    turns = (Turn("gpt" if number % 2 else "human", text) for number, text in enumerate(texts))
    probe = encode(Conversation(tuple(turns)), processor, images=("x", "y"), sizes=PROBE_SIZES, max_length=None)
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


@dataclass(frozen=True, slots=True)
class Checked:
    """Result of `check_trainable`.

    Attributes:
        samples: usable rows, in order.
        bad: skipped rows.
        num_left_out: number of rows that are left out, since their answers are empty.
        num_empty: number of empty answers in the usable rows, which are not trained.
        num_images: number of distinct image files that the rows name.
        num_shortened: number of usable rows that truncation shortened.
        num_cut_tokens: number of tokens that truncation removed from them.
        num_trained_tokens: number of trained tokens of all usable rows.
    """

    samples: list[Sample]
    bad: list[BadRow]
    num_left_out: int
    num_empty: int
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
    put in front), and at least one token is left to train after truncation. Rows without other than empty answers are
    left out and counted, unless the template trains empty answers. Image files are decoded once, by several
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
    unused = found.bad.keys() | set(found.left_out)
    good = [sample for place, sample in enumerate(samples) if place not in unused]
    if bad and not skip_bad:
        raise DataError(bad_rows_message(bad, len(samples)))
    if quarantine is not None:
        quarantine.add(bad)
    if not good:
        raise DataError(f"none of the {len(samples)} rows can be used for training; {_why(samples, found, bad)}")
    _log(found, quarantine, samples, max_length)
    return Checked(
        good,
        bad,
        num_left_out=len(found.left_out),
        num_empty=found.num_empty,
        num_images=len(refs),
        num_shortened=found.num_shortened,
        num_cut_tokens=found.num_cut_tokens,
        num_trained_tokens=found.num_trained_tokens,
    )


def _why(samples: Sequence[Sample], found: RowCheck, bad: Sequence[BadRow]) -> str:
    """Return why no row is usable."""
    reasons = []
    if found.left_out:
        first = sample_label(samples[found.left_out[0]])
        reasons.append(
            f"{len(found.left_out)} have empty answers only (the first: {first}); expected at least one answer with "
            "text (--compat empty_answers trains empty ones)"
        )
    if bad:
        reasons.append(bad_rows_message(bad, len(samples)))
    return "; ".join(reasons)


def _log(found: RowCheck, quarantine: Quarantine | None, samples: Sequence[Sample], max_length: int | None) -> None:
    num_rows = len(samples)
    if found.left_out:
        logger.warning(
            "%d of %d rows are left out, since their answers are empty (the first: %s)",
            len(found.left_out),
            num_rows,
            sample_label(samples[found.left_out[0]]),
        )
    if found.num_empty:
        logger.warning("%d empty answers in the other rows are not trained", found.num_empty)
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
