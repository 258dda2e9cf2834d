"""Images as LLaVA-Med 1.0 assigned them in a batch with text-only rows, for replays of its runs.

Its collator gave every text-only row an empty image, but its model did not skip that image at such a row: the next row
with a placeholder got it, and every later row the image of an earlier one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

import torch
from torch import Tensor

from llava.data.collator import Collator
from llava.data.encode import Encoded
from llava.data.flat_batch import FlatBatch

EMPTY = "empty image of a text-only row"


class ShiftedImages(Collator):
    """Collator that reproduces the defect in every micro-batch."""

    @classmethod
    def of(cls, collator: Collator) -> ShiftedImages:
        """Return the same collator with the defect."""
        return cls(**{field.name: getattr(collator, field.name) for field in fields(collator)})

    def rows(
        self, sequences: list[Encoded], images: Mapping[str, Tensor], max_tokens_per_row: int | None
    ) -> list[FlatBatch]:
        """Return the flat rows of sequences whose images are shifted."""
        size = self.micro_batch or max(1, len(sequences))
        moved: list[Encoded] = []
        for start in range(0, len(sequences), size):
            moved += shifted(sequences[start : start + size])
        height, width = self.dataset.processor.image_size
        return super().rows(moved, {**images, EMPTY: torch.zeros(3, height, width)}, max_tokens_per_row)


def shifted(batch: list[Encoded]) -> list[Encoded]:
    """Return a batch in which the k-th row with an image gets the image of the k-th row of all."""
    handed_out = iter([row.images[:1] or (EMPTY,) for row in batch])
    return [replace(row, images=next(handed_out)) if row.images else row for row in batch]
