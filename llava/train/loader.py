"""From row numbers to what one optimiser step of one rank computes.

    StepSampler -> row numbers -> Encoded... + images -> rows (FlatBatch) -> StepBatch

The loader is never handed to accelerate: its samplers know their rank, and its steps have unequal sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from llava.data.encode import Encoded
from llava.data.flat_batch import FlatBatch, Layout, flatten, layout_rows
from llava.data.samplers import StepSampler
from llava.data.sft import SFTDataset


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The sequences of one optimiser step on one rank, laid out in rows; kept to lay them out smaller if need be.

    Attributes:
        sequences: may be empty in a short last step.
        images: pixels or tower features by image key.
        rows: what the model computes, one after the other.
        row_ids: numbers of the data rows, for the record.
    """

    sequences: list[Encoded]
    images: Mapping[str, Tensor]
    rows: list[FlatBatch]
    row_ids: list[int]

    @property
    def num_supervised(self) -> float:
        """Sum of all edge weights."""
        return float(sum(row.edge_weight.sum().item() for row in self.rows))

    @property
    def num_tokens(self) -> int:
        """Tokens the model computes."""
        return sum(row.num_tokens for row in self.rows)

    @property
    def num_unshared_tokens(self) -> int:
        """Tokens there would be without sharing."""
        return sum(row.num_unshared_tokens for row in self.rows)


@dataclass(frozen=True, slots=True)
class Collator:
    """Lays the sequences of a step out in as few rows as `max_tokens_per_row` allows; picklable."""

    dataset: SFTDataset
    image_token_id: int
    pad_token_id: int
    layout: Layout = "tree"
    max_tokens_per_row: int | None = None

    def __call__(self, numbered: list[tuple[int, Encoded]]) -> StepBatch:
        """Make the step's rows."""
        sequences = [encoded for _, encoded in numbered]
        images = self.dataset.images_for(sequences)
        rows = self.rows(sequences, images, self.max_tokens_per_row)
        return StepBatch(sequences, images, rows, [number for number, _ in numbered])

    def rows(
        self, sequences: list[Encoded], images: Mapping[str, Tensor], max_tokens_per_row: int | None
    ) -> list[FlatBatch]:
        """Lay sequences out; an empty step has no row."""
        if not sequences:
            return []
        return layout_rows(
            sequences,
            images,
            image_token_id=self.image_token_id,
            pad_token_id=self.pad_token_id,
            layout=self.layout,
            max_tokens_per_row=max_tokens_per_row,
        )

    def idle_row(self) -> FlatBatch:
        """A row that a rank without sequences runs so that collective calls match: its weights are zero."""
        encoded = self.dataset[0]
        images = self.dataset.images_for([encoded])
        row = flatten(
            [encoded], images, image_token_id=self.image_token_id, pad_token_id=self.pad_token_id, layout=self.layout
        )
        return replace(row, edge_weight=torch.zeros_like(row.edge_weight), num_unshared_tokens=row.num_tokens)


class _Numbered(torch.utils.data.Dataset[tuple[int, Encoded]]):
    """Pairs each sequence with its row number."""

    def __init__(self, dataset: SFTDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> tuple[int, Encoded]:
        return row, self.dataset[row]


class StepLoader(DataLoader[StepBatch]):
    """Yields one `StepBatch` per optimiser step."""

    def __init__(self, sampler: StepSampler, collator: Collator, *, num_workers: int = 0, seed: int = 0) -> None:
        generator = torch.Generator()
        generator.manual_seed(seed)
        super().__init__(
            _Numbered(collator.dataset),  # type: ignore[arg-type]
            batch_sampler=sampler,
            collate_fn=collator,
            num_workers=num_workers,
            generator=generator,  # its own, so that fetching never moves the model's random state
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass; called by the trainer."""
        sampler = self.batch_sampler
        assert isinstance(sampler, StepSampler)
        sampler.set_epoch(epoch)
