"""Images as LLaVA-Med 1.0 assigned them in a batch with text-only rows, for replays of its runs.

Its collator gave every text-only row an empty image, but its model did not skip that image at such a row: the next row
with a placeholder got it, and every later row the image of an earlier one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from llava.data.collator import Collator
from llava.data.encode import Encoded, Unit, as_unit
from llava.data.flat_batch import FlatBatch

T = TypeVar("T")

EMPTY = "empty image of a text-only row"


class ShiftedImages(Collator):
    """Collator that reproduces the defect in every micro-batch."""

    @classmethod
    def of(cls, collator: Collator) -> ShiftedImages:
        """Return the same collator with the defect."""
        return cls(**{field.name: getattr(collator, field.name) for field in fields(collator)})

    def rows(
        self, units: Sequence[Unit], images: Mapping[str, Tensor], max_tokens_per_row: int | None
    ) -> list[FlatBatch]:
        """Return the flat rows of units of one sequence whose images are shifted."""
        size = self.micro_batch or max(1, len(units))
        moved: list[Encoded] = []
        for start in range(0, len(units), size):
            moved += shifted([sequence for (sequence,) in units[start : start + size]])
        height, width = self.dataset.processor.image_size
        given = {**images, EMPTY: torch.zeros(3, height, width)}
        return super().rows([as_unit(row) for row in moved], given, max_tokens_per_row)


def shifted(batch: list[Encoded]) -> list[Encoded]:
    """Return a batch in which the k-th row with an image gets the image of the k-th row of all."""
    given = handed_out([row.images[:1] or (EMPTY,) for row in batch], [bool(row.images) for row in batch])
    return [replace(row, images=images) if row.images else row for row, images in zip(batch, given, strict=True)]


def handed_out(images: Sequence[T], has_image: Sequence[bool]) -> list[T]:
    """Return the image of each row: the k-th row with an image gets that of the k-th row, others keep theirs."""
    waiting = iter(images)
    return [next(waiting) if has else own for own, has in zip(images, has_image, strict=True)]
