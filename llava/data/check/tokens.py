"""Token counts of the rows with the tokenizer of a model, and the effect of a maximum length.

row --data.encode--> its length --all rows--> number of truncated rows, longest row, suggested length
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llava.data.check.images import ImageScan
from llava.data.check.row_index import as_array
from llava.data.check.rows import view_row
from llava.data.check.rules import FILE, NOT_TRAINABLE, CheckFindings
from llava.errors import ConfigError, DataError
from llava.imaging.anyres import Size
from llava.samples import Sample, with_placeholders
from llava.utils.json_rows import iter_rows
from llava.utils.log import with_progress

if TYPE_CHECKING:
    from llava.data.encode import Encoded
    from llava.processing import LlavaMedProcessor

STEP = 64
"""Divisor of suggested lengths."""

COVERED = 0.999
"""Fraction of the rows that fit into the shorter suggested length."""


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """Token counts; the length of a row is the smallest `--model-max-length` that does not truncate it.

    Attributes:
        model: model of the tokenizer.
        num_rows: number of rows counted.
        limit: maximum length to evaluate.
        num_shortened: number of rows longer than the limit.
        num_without_answer: number of those rows that lose their whole answer.
        longest: length of the longest row.
        longest_row: number of the longest row.
        median: median length.
        suggested: smallest multiple of 64 that fits every row.
        suggested_most: smallest multiple of 64 that fits 99.9 % of the rows.
        lengths: number of rows by length.
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
    lengths: dict[int, int] = field(default_factory=dict)


def count_tokens(
    path: Path, processor: LlavaMedProcessor, image_scan: ImageScan, findings: CheckFindings, *, model: str, limit: int
) -> TokenBudget:
    """Return the token counts of a file.

    Args:
        path: the file.
        processor: tokenizer and template of the model.
        image_scan: images of its rows; their sizes matter for a model with variable image sizes.
        findings: receives the rows that cannot be encoded.
        model: name of the model for the report.
        limit: `--model-max-length` to evaluate.

    Raises:
        ConfigError: the model needs the sizes of images that were not opened.
    """
    if processor.has_variable_images and not image_scan.opened:
        raise ConfigError(f"--model {model}: the number of tokens depends on the size of each image; pass --images DIR")
    lengths, rows, num_without = array("I"), array("I"), 0
    for row, sides, sizes in with_progress(_samples(path, image_scan), title="tokens", unit="row"):
        try:
            length = max(_length(side, processor, sizes) for side in sides)
        except DataError as error:
            findings.add("tokens", FILE, [row], str(error))
            continue
        lengths.append(length)
        rows.append(row)
        num_without += length > limit and not all(_keeps_answer(side, processor, sizes, limit) for side in sides)
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
        lengths=dict(Counter(lengths)),
    )


def _rounded(length: int) -> int:
    return -(-length // STEP) * STEP


def _samples(path: Path, image_scan: ImageScan) -> Iterator[tuple[int, tuple[Sample, ...], list[Size]]]:
    """Yield number, sample (or both sides of a pair) and image sizes of every row that can be trained on."""
    refs, passed = image_scan.of_ref[FILE], 0
    for row, value in iter_rows(path):
        seen = view_row(value, row)
        places = refs[passed : passed + len(seen.images)]
        passed += len(seen.images)
        bad = any(problem.rule in ("places", *NOT_TRAINABLE) for problem in seen.problems)
        if seen.sample is None or bad or any(image_scan.is_bad(place) for place in places):
            continue
        sizes = [(image_scan.widths[place], image_scan.heights[place]) for place in places] if image_scan.opened else []
        yield row, seen.sides(), sizes


def _encoded(sample: Sample, processor: LlavaMedProcessor, sizes: list[Size], limit: int | None) -> Encoded:
    from llava.data.encode import encode  # imports torch and transformers, which only this function needs

    keys = [str(place) for place in range(len(sample.images))]
    variable = sizes if processor.has_variable_images else None
    return encode(with_placeholders(sample), processor, images=keys, sizes=variable, max_length=limit)


def _length(sample: Sample, processor: LlavaMedProcessor, sizes: list[Size]) -> int:
    """Return the smallest maximum length that does not truncate a row."""
    return len(_encoded(sample, processor, sizes, None).input_ids)


def _keeps_answer(sample: Sample, processor: LlavaMedProcessor, sizes: list[Size], limit: int) -> bool:
    from llava.data.encode import num_learned

    try:
        encoded = _encoded(sample, processor, sizes, limit)
    except DataError:  # the images alone do not fit
        return False
    return num_learned(encoded, sample.conversation) > 0
