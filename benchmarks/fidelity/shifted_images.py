"""Pictures as LLaVA-Med 1.0 handed them out in a batch with text-only rows, for replays of its runs.

Its collator gave every text-only row an empty picture, but its model did not skip that picture at such a row: the next
row with a place holder got it, and every row after that the picture of an earlier one (specification llava-med 1.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

import torch
from torch import Tensor

from llava.data.collator import Collator
from llava.data.encode import Encoded
from llava.data.flat_batch import FlatBatch

EMPTY = "empty picture of a text-only row"


class ShiftedImages(Collator):
    """A collator that repeats the mistake in every micro-batch."""

    @classmethod
    def of(cls, collator: Collator) -> ShiftedImages:
        """The same collator, with the mistake."""
        return cls(**{field.name: getattr(collator, field.name) for field in fields(collator)})

    def rows(
        self, sequences: list[Encoded], images: Mapping[str, Tensor], max_tokens_per_row: int | None
    ) -> list[FlatBatch]:
        """Lay sequences out after their pictures have moved."""
        size = self.micro_batch or max(1, len(sequences))
        moved: list[Encoded] = []
        for start in range(0, len(sequences), size):
            moved += shifted(sequences[start : start + size])
        height, width = self.dataset.processor.image_size
        return super().rows(moved, {**images, EMPTY: torch.zeros(3, height, width)}, max_tokens_per_row)


def shifted(batch: list[Encoded]) -> list[Encoded]:
    """The rows of a batch, each with at most one picture: the k-th row with a picture gets that of the k-th row."""
    handed_out = iter([row.images[:1] or (EMPTY,) for row in batch])
    return [replace(row, images=next(handed_out)) if row.images else row for row in batch]
