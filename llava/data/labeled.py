"""Single answers labeled good or bad for KTO, and the mismatched answers that its estimate needs.

file --read_labeled--> Labeled... --LabeledDataset--> (answer,) of Encoded with the number `kind`
units of a step --with_mismatched--> units, each with the answers of another one after its own questions
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from llava.constants import IGNORE_INDEX
from llava.data.dataset import RowDataset, RowSettings
from llava.data.encode import Encoded, Unit
from llava.data.label_rows import Labeled, is_labeled_row, read_label
from llava.data.quarantine import Quarantine, read_usable
from llava.errors import DataError
from llava.samples import Origin, sample_label, with_placeholders
from llava.utils.json_rows import read_rows

if TYPE_CHECKING:
    from llava.processing import LlavaMedProcessor

logger = logging.getLogger(__name__)

KIND = "kind"
"""Number of a sequence: `GOOD` or `BAD`, or `MISMATCHED` for an answer to other questions."""

GOOD, BAD, MISMATCHED = 1.0, 0.0, -1.0


def holds_labels(path: str | Path) -> bool:
    """Return whether the first row of a file is a single answer with a label."""
    return any(
        is_labeled_row(value) for _, value in zip(range(1), (value for _, value in read_rows(path)), strict=False)
    )


def read_labeled(path: str | Path, *, skip_bad: bool = False, quarantine: Quarantine | None = None) -> list[Labeled]:
    """Return the labeled answers of a file, in file order.

    A row has `label`, `kto_tag` or `desirable` (true or false) and `prompt` and `completion`, `messages`, or
    `conversations`.

    Raises:
        DataError: the file cannot be read, holds no usable row, or has a bad row and `skip_bad` is off; the message
            names file and row.
    """
    return read_usable(path, _labeled, skip_bad=skip_bad, quarantine=quarantine)


def _labeled(value: Any, origin: Origin) -> Labeled:
    found = read_label(value, default_id=str(origin.row))
    with_placeholders(found.sample)
    return replace(found, sample=replace(found.sample, origin=origin))


class LabeledDataset(RowDataset[Unit]):
    """Map-style dataset: `dataset[i]` is the unit `(answer,)` of row i, whose number `kind` is its label.

    Args:
        rows: the labeled answers.
        processor: turns conversations into tokens and images into pixels.
        settings: see `RowDataset`.
    """

    def __init__(self, rows: Sequence[Labeled], processor: LlavaMedProcessor, **settings: Unpack[RowSettings]) -> None:
        super().__init__([row.sample for row in rows], processor, **settings)
        self.rows = rows

    def __getitem__(self, row: int) -> Unit:
        found = self.rows[row]
        try:
            encoded = self.encode(with_placeholders(replace(found.sample, origin=None)), found.sample.images)
            if all(label == IGNORE_INDEX for label in encoded.labels):
                raise DataError(
                    f"the answer is cut away entirely by the maximum length of {self.max_length}; raise "
                    "--model-max-length or shorten the question"
                )
        except DataError as error:
            raise DataError(f"{sample_label(found.sample)}: {error}") from error
        kind = GOOD if found.desirable else BAD
        return (replace(encoded, weight=found.weight, numbers={KIND: kind}),)


def with_mismatched(units: Sequence[Unit], others: Sequence[Unit] = ()) -> list[Unit]:
    """Return units with a `kind`, each followed by another unit's answers to its own questions.

    Pairs are a good and a bad answer. The other unit is the next one of the step with another question, so it does not
    depend on the number of ranks; of a step whose units all ask the same there are no mismatched answers.

    Args:
        units: units of this rank.
        others: units of the ranks after this one, in a circle, as far as they are read.
    """
    labeled = [_with_kinds(unit) for unit in units]
    found: list[Unit] = []
    for place, unit in enumerate(labeled):
        prompt = _prompt(unit[0])
        circle = itertools.chain(labeled[place + 1 :], others, labeled[:place])
        other = next((one for one in circle if _prompt(one[0]) != prompt), ())
        found.append((*unit, *(_answering(unit[0], sequence) for sequence in other)))
    return found


def _with_kinds(unit: Unit) -> Unit:
    if all(KIND in sequence.numbers for sequence in unit):
        return unit
    kinds = (GOOD, BAD)
    return tuple(replace(one, numbers={**one.numbers, KIND: kind}) for one, kind in zip(unit, kinds, strict=True))


def _answer_start(sequence: Encoded) -> int:
    """Return the place of the first trained token of the last answer."""
    trained = [place for place, label in enumerate(sequence.labels) if label != IGNORE_INDEX]
    last = sequence.turns[trained[-1]]
    return next(place for place in trained if sequence.turns[place] == last)


def _prompt(sequence: Encoded) -> tuple[tuple[int, ...], tuple[str, ...]]:
    return sequence.input_ids[: _answer_start(sequence)], sequence.images


def _answering(asked: Encoded, answered: Encoded) -> Encoded:
    """Return one sequence's questions with another's last answer, which alone counts."""
    start, other = _answer_start(asked), _answer_start(answered)
    last = asked.turns[start]
    return replace(
        asked,
        input_ids=asked.input_ids[:start] + answered.input_ids[other:],
        labels=(IGNORE_INDEX,) * start + answered.labels[other:],
        turns=asked.turns[:start] + (last,) * (len(answered.turns) - other),
        numbers={KIND: MISMATCHED},
    )
