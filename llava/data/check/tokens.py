"""How many tokens every row takes with a model's own tokenizer, and what a limit would cut.

row --data.encode--> its length --all rows--> how many are shortened, the longest, a length to suggest
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llava.constants import IGNORE_INDEX
from llava.data.check.images import ImageScan
from llava.data.check.row_index import as_array
from llava.data.check.rows import view_row
from llava.data.check.rules import FILE, CheckFindings
from llava.data.records import stream_rows
from llava.errors import ConfigError, DataError
from llava.imaging.anyres import Size
from llava.samples import Sample, with_places
from llava.utils.log import progress

if TYPE_CHECKING:
    from llava.data.encode import Encoded
    from llava.processing import LlavaMedProcessor

STEP = 64
"""Suggested lengths are multiples of this."""

COVERED = 0.999
"""Share of rows that a shorter limit should hold, to be worth its name."""


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """What the rows need; lengths are what `--model_max_length` must be for a row not to be shortened.

    Attributes:
        model: the model whose tokenizer counted.
        num_rows: rows counted.
        limit: the length asked about.
        num_shortened: rows longer than it.
        num_without_answer: those of them whose whole answer is cut away.
        longest: longest row, and its number `longest_row`.
        median: median length.
        suggested: shortest multiple of 64 that holds every row.
        suggested_most: the same for 99.9 % of the rows.
    """

    model: str
    num_rows: int
    limit: int
    num_shortened: int
    num_without_answer: int
    longest: int
    longest_row: int
    median: int
    suggested: int
    suggested_most: int


def count_tokens(
    path: Path, processor: LlavaMedProcessor, image_scan: ImageScan, findings: CheckFindings, *, model: str, limit: int
) -> TokenBudget:
    """Return what the rows of a file need.

    Args:
        path: the file.
        processor: the model's tokenizer and template.
        pictures: the pictures of its rows; their sizes count where the model takes pictures of any shape.
        findings: where rows that cannot be encoded are reported.
        model: name of the model, for the report.
        limit: the `--model_max_length` to judge.

    Raises:
        ConfigError: the model needs the sizes of pictures that nobody opened.
    """
    if processor.has_variable_images and not image_scan.opened:
        raise ConfigError(f"the tokens of {model} depend on the size of each picture; give --images DIR")
    lengths, rows, num_without = array("I"), array("I"), 0
    for row, sample, sizes in progress(_samples(path, image_scan), title="tokens", unit="row"):
        try:
            length = _length(sample, processor, sizes)
        except DataError as error:
            findings.add("tokens", FILE, [row], str(error))
            continue
        lengths.append(length)
        rows.append(row)
        num_without += length > limit and not _keeps_answer(sample, processor, sizes, limit)
    counted = as_array(lengths)
    if not len(counted):
        return TokenBudget(model, 0, limit, 0, 0, 0, -1, 0, STEP, STEP)
    most = int(np.quantile(counted, COVERED, method="higher"))
    return TokenBudget(
        model=model,
        num_rows=len(counted),
        limit=limit,
        num_shortened=int((counted > limit).sum()),
        num_without_answer=num_without,
        longest=int(counted.max()),
        longest_row=rows[int(counted.argmax())],
        median=int(np.median(counted)),
        suggested=_rounded(int(counted.max())),
        suggested_most=_rounded(most),
    )


def _rounded(length: int) -> int:
    return -(-length // STEP) * STEP


def _samples(path: Path, image_scan: ImageScan) -> Iterator[tuple[int, Sample, list[Size]]]:
    """Yield every row that can be trained on with the sizes of its pictures."""
    refs, passed = image_scan.of_ref[FILE], 0
    for row, value in stream_rows(path):
        seen = view_row(value, row)
        places = refs[passed : passed + len(seen.images)]
        passed += len(seen.images)
        bad = any(problem.rule in ("places", "no-answer") for problem in seen.problems)
        if seen.sample is None or bad or any(image_scan.is_bad(place) for place in places):
            continue
        sizes = [(image_scan.widths[place], image_scan.heights[place]) for place in places] if image_scan.opened else []
        yield row, seen.sample, sizes


def _encoded(sample: Sample, processor: LlavaMedProcessor, sizes: list[Size], limit: int | None) -> Encoded:
    from llava.data.encode import encode  # brings torch and transformers, which nothing else here needs

    keys = [str(place) for place in range(len(sample.images))]
    variable = sizes if processor.has_variable_images else None
    return encode(with_places(sample), processor, images=keys, sizes=variable, max_length=limit)


def _length(sample: Sample, processor: LlavaMedProcessor, sizes: list[Size]) -> int:
    """Return the smallest maximum length that cuts nothing from a row."""
    encoded = _encoded(sample, processor, sizes, None)
    free = sum(stop - start - 1 for start, stop in encoded.image_spans) if processor.image_counts_as_one else 0
    return len(encoded.input_ids) - free


def _keeps_answer(sample: Sample, processor: LlavaMedProcessor, sizes: list[Size], limit: int) -> bool:
    try:
        labels = _encoded(sample, processor, sizes, limit).labels
    except DataError:  # the images alone do not fit
        return False
    return len(labels) > labels.count(IGNORE_INDEX)
