"""Preference pairs: reading files of any known layout, and the dataset that encodes both sides.

file --read_preferences--> Preference... --PreferenceDataset--> (chosen, rejected) of Encoded, one unit
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack

from llava.constants import IGNORE_INDEX
from llava.data.dataset import RowDataset, RowSettings
from llava.data.encode import Encoded, Unit
from llava.data.image_negatives import ImageNegative
from llava.data.preference_formats import read_preference
from llava.data.quarantine import BadRow, Quarantine, bad_row, bad_rows_message, read_usable
from llava.errors import DataError
from llava.samples import Origin, Preference, sample_label, with_placeholders
from llava.utils.log import with_progress

if TYPE_CHECKING:
    from llava.processing import LlavaMedProcessor

logger = logging.getLogger(__name__)

NUM_DRAWS = 64
"""Number of rows drawn for other images before all are searched."""


def read_preferences(
    path: str | Path, *, skip_bad: bool = False, quarantine: Quarantine | None = None
) -> list[Preference]:
    """Return the preference pairs of a file, in file order.

    Example::

        pairs = read_preferences("pairs.json")

    Args:
        path: JSON array or JSON lines, plain or gzipped; each row in a layout of `data.preference_formats`.
        skip_bad: skip bad rows with one warning instead of raising.
        quarantine: list that skipped rows are added to.

    Raises:
        DataError: the file cannot be read, holds no usable row, or has a bad row and `skip_bad` is off; the message
            names file and row.
    """
    return read_usable(path, _preference, skip_bad=skip_bad, quarantine=quarantine)


def _preference(value: Any, origin: Origin) -> Preference:
    pair = replace(read_preference(value, default_id=str(origin.row)), origin=origin)
    for side in pair.sides():
        with_placeholders(replace(side, origin=None))
    return pair


def sequence_key(encoded: Encoded) -> str:
    """Return a hash of a sequence's tokens, trained flags and images.

    Sequences with equal keys have equal log-probabilities.
    """
    content = [encoded.input_ids, encoded.labels, encoded.images]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


class PreferenceDataset(RowDataset[Unit]):
    """Map-style dataset of units `(chosen, rejected)` or `(chosen, rejected, negative)`, one per pair.

    `negative` is the chosen side beside damaged images. A pair without images has its chosen side again there, whose
    difference from the chosen side is 0.

    Example::

        dataset = PreferenceDataset(pairs, processor, image_folder="images", max_length=2048)
        batch = flatten(dataset[0], dataset.images_for(dataset[0]), image_token_id=processor.image_token_id)

    Args:
        preferences: the pairs.
        processor: turns conversations into tokens and images into pixels.
        settings: see `RowDataset`.
        numbers: numbers that the sequences carry (`Encoded.numbers`), by name and `sequence_key`.
        negative: damaged images of the third sequence; None for pairs.
    """

    def __init__(
        self,
        preferences: Sequence[Preference],
        processor: LlavaMedProcessor,
        *,
        numbers: Mapping[str, Mapping[str, float]] | None = None,
        negative: ImageNegative | None = None,
        **settings: Unpack[RowSettings],
    ) -> None:
        super().__init__([pair.sides()[0] for pair in preferences], processor, **settings)  # the chosen side of each
        self.preferences = preferences
        self.numbers = numbers or {}
        self.negative = negative
        self._image_sets: list[tuple[str, ...]] | None = None

    def num_variants(self, epochs: int) -> int:
        """Return in how many of this number of epochs the sequences differ."""
        return epochs if self.negative is not None and self.negative.varies else 1

    def with_numbers(self, numbers: Mapping[str, Mapping[str, float]]) -> Self:
        """Return a dataset of the same pairs whose sequences carry these numbers, by name and `sequence_key`."""
        made = copy.copy(self)
        made.numbers = numbers
        return made

    def checked(self, *, skip_bad: bool = False, quarantine: Quarantine | None = None) -> Self:
        """Return the dataset of the pairs that can be trained.

        Raises:
            DataError: a pair cannot be used and `skip_bad` is off, or none can; the message lists the first ones.
        """
        bad: list[BadRow] = []
        good: list[Preference] = []
        num_shortened = 0
        for pair in with_progress(self.preferences, title="checking pairs", unit="pair"):
            try:
                num_shortened += any(side.num_cut for side in self._encode(pair))
            except DataError as error:
                bad.append(bad_row(pair, str(error)))
            else:
                good.append(pair)
        if bad and not (skip_bad and good):
            raise DataError(bad_rows_message(bad, len(self.preferences)))
        if quarantine is not None and skip_bad:
            quarantine.add(bad)
        if bad:
            logger.warning("skipped %d of %d pairs that cannot be used", len(bad), len(self.preferences))
        if num_shortened:
            logger.warning("%d pairs are longer than %s tokens and were shortened", num_shortened, self.max_length)
        made = copy.copy(self)
        made.preferences, made.samples = good, [pair.sides()[0] for pair in good]
        return made

    def __getitem__(self, row: int) -> Unit:
        return self.in_epoch(row, 0)

    def in_epoch(self, row: int, epoch: int) -> Unit:
        """Return a unit with the damaged images that are drawn in an epoch."""
        pair = self.preferences[row]
        try:
            unit = self._encode(pair)
            if self.negative is not None:
                unit = (*unit, self._negative(self.negative, row, epoch, unit[0]))
            return tuple(self._with_numbers(side) for side in unit)
        except DataError as error:
            raise DataError(f"{sample_label(pair)}: {error}") from error

    def _negative(self, negative: ImageNegative, row: int, epoch: int, chosen: Encoded) -> Encoded:
        """Return the chosen side of a row beside damaged images.

        Raises:
            DataError: no other row has as many images.
        """
        if not chosen.images:
            return chosen
        if negative.kind != "swap":
            return replace(chosen, images=tuple(negative.key_of(key, epoch, row) for key in chosen.images))
        pair = self.preferences[row]
        images = self._other_images(pair.images, negative.draw(epoch, row))
        encoded = self.encode(with_placeholders(replace(pair.sides()[0], origin=None)), images)
        return replace(encoded, weight=pair.weight)

    def _other_images(self, images: tuple[str, ...], draw: random.Random) -> tuple[str, ...]:
        """Return the images of a row that shares none with these and has as many.

        Raises:
            DataError: there is none.
        """
        if self._image_sets is None:
            self._image_sets = list(dict.fromkeys(pair.images for pair in self.preferences if pair.images))
        own, sets = {self.store.key(name) for name in images}, self._image_sets

        def fits(other: tuple[str, ...]) -> bool:
            return len(other) == len(images) and own.isdisjoint(map(self.store.key, other))

        drawn = (sets[draw.randrange(len(sets))] for _ in range(NUM_DRAWS))
        found = next(filter(fits, itertools.chain(drawn, sets)), None)
        if found is None:
            raise DataError("no other row has as many images to swap with; use --image-negative crop, noise or blank")
        return found

    def _with_numbers(self, encoded: Encoded) -> Encoded:
        """Return the sequence with its numbers.

        Raises:
            DataError: it has none of some name.
        """
        if not self.numbers:
            return encoded
        key = sequence_key(encoded)
        for name, values in self.numbers.items():
            if key not in values:
                raise DataError(f"no {name} value is known for this sequence {key[:12]}")
        return replace(encoded, numbers={name: values[key] for name, values in self.numbers.items()})

    def _encode(self, pair: Preference) -> Unit:
        """Return both sides.

        Raises:
            DataError: an image cannot be read, or truncation leaves nothing to compare.
        """
        found = []
        for name, side in zip(("chosen", "rejected"), pair.sides(), strict=True):
            conversation = with_placeholders(replace(side, origin=None))
            last = len(conversation.turns) - 1
            if conversation.turns[last].train is None:  # an answer without text is compared by its end mark
                compared = replace(conversation.turns[last], train=True)
                conversation = replace(conversation, turns=(*conversation.turns[:last], compared))
            encoded = self.encode(conversation, pair.images)
            if all(y == IGNORE_INDEX for y, turn in zip(encoded.labels, encoded.turns, strict=True) if turn == last):
                raise DataError(
                    f"the {name} answer is cut away entirely: {encoded.num_cut} tokens exceed the maximum length of "
                    f"{self.max_length}; raise --model-max-length or shorten the question"
                )
            found.append(replace(encoded, weight=pair.weight))
        if found[0].input_ids == found[1].input_ids:
            raise DataError(
                f"both answers are equal within the maximum length of {self.max_length} tokens; raise "
                "--model-max-length or remove the row"
            )
        return tuple(found)
