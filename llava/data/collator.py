"""Collator: the units of one optimizer step on one rank, laid out as rows for the model.

    StepSampler -> row numbers -> units of Encoded + images -> rows (FlatBatch) -> StepBatch

The loader is not passed to accelerate: its samplers know their rank, and its steps have unequal sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from llava.data.encode import Encoded, Unit, as_unit
from llava.data.flat_batch import FlatBatch, Layout, flatten, layout_rows
from llava.data.image_batch import join_images
from llava.errors import ConfigError
from llava.samples import Sample

NumberedRow = tuple[int, Encoded | Unit | None]
"""Number of a data row and what it holds, which is None for a row that another rank of the step trains on."""

Complete = Callable[[Sequence[Unit], Sequence[Unit]], list[Unit]]
"""Function of the units of this rank and those of the ranks after it, in a circle, that returns this rank's, completed
with what depends on the step."""


class _LaterUnits(Sequence[Unit]):
    """Units of other ranks, which are encoded when they are read."""

    def __init__(self, dataset: RowData, numbers: Sequence[int]) -> None:
        self._dataset = dataset
        self._numbers = numbers
        self._read: dict[int, Unit] = {}

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: Any) -> Any:
        number = self._numbers[place]
        if number not in self._read:
            self._read[number] = as_unit(self._dataset[number])
        return self._read[number]


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Units of one optimizer step on one rank, laid out as rows.

    Attributes:
        units: kept so that a smaller layout can be built after running out of memory; empty in some last steps.
        images: pixels or tower features by image key.
        rows: inputs of the forward passes, in order.
        row_ids: numbers of the data rows, for logging.
    """

    units: list[Unit]
    images: Mapping[str, Tensor]
    rows: list[FlatBatch]
    row_ids: list[int]

    @property
    def sequences(self) -> list[Encoded]:
        """Return the sequences of all units, in order."""
        return [sequence for unit in self.units for sequence in unit]

    @property
    def num_supervised(self) -> float:
        """Return the sum of all edge weights."""
        return float(sum(row.edge_weight.sum().item() for row in self.rows))

    @property
    def num_edges(self) -> int:
        """Return the number of edges: supervised tokens, counted once per sequence that trains them."""
        return sum(len(row.edge_weight) for row in self.rows)

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens that the model computes."""
        return sum(row.num_tokens for row in self.rows)

    @property
    def num_unshared_tokens(self) -> int:
        """Return the number of tokens without prefix sharing."""
        return sum(row.num_unshared_tokens for row in self.rows)


class RowData(Protocol):
    """Interface of datasets for the collator: sequence or unit by row, images, and sample rows."""

    @property
    def samples(self) -> Sequence[Sample]: ...

    def __getitem__(self, row: int) -> Encoded | Unit: ...

    def __len__(self) -> int: ...

    def images_for(self, sequences: Iterable[Encoded]) -> Mapping[str, Tensor]: ...

    def label_rows(self, rows: Sequence[int]) -> str: ...


@dataclass(frozen=True, slots=True)
class Collator:
    """Picklable callable that lays out the units of a step in as few rows as possible.

    Attributes:
        dataset: source of sequences and images.
        image_token_id: id of the image placeholder tokens.
        pad_token_id: id that fills padded rows.
        layout: see `Layout`.
        max_tokens_per_row: limit of a row; None for one row per step.
        micro_batch: units per micro-batch. Each micro-batch is laid out separately, and its edges are weighted so
            that all micro-batches count the same, however many tokens they train. None: every token counts the same.
        alone_above: length in tokens above which a sequence is laid out alone, see `layout_rows`.
        complete: adds to the units what depends on the step, for example mismatched answers; None adds nothing.
    """

    dataset: RowData
    image_token_id: int
    pad_token_id: int
    layout: Layout = "tree"
    max_tokens_per_row: int | None = None
    micro_batch: int | None = None
    alone_above: int | None = None
    complete: Complete | None = None

    def __call__(self, numbered: list[NumberedRow]) -> StepBatch:
        """Return the step of the numbered data rows."""
        own = [number for number, row in numbered if row is not None]
        others = [number for number, row in numbered if row is None]
        units = self._completed([as_unit(row) for _, row in numbered if row is not None], others)
        images = self.dataset.images_for([sequence for unit in units for sequence in unit])
        rows = self.rows(units, images, self.max_tokens_per_row)
        return StepBatch(units, images, rows, own)

    def _completed(self, units: list[Unit], others: Sequence[int] = ()) -> list[Unit]:
        return units if self.complete is None else self.complete(units, _LaterUnits(self.dataset, others))

    def rows(
        self, units: Sequence[Unit], images: Mapping[str, Tensor], max_tokens_per_row: int | None
    ) -> list[FlatBatch]:
        """Return units laid out as rows; an empty step has no row."""
        size = self.micro_batch or max(1, len(units))
        parts = [units[start : start + size] for start in range(0, len(units), size)]
        laid_out = [
            layout_rows(
                part,
                images,
                image_token_id=self.image_token_id,
                pad_token_id=self.pad_token_id,
                layout=self.layout,
                max_tokens_per_row=max_tokens_per_row,
                alone_above=self.alone_above,
            )
            for part in parts
        ]
        if self.micro_batch is not None:
            laid_out = [_weighing(rows, 1 / len(parts)) for rows in laid_out]
        return [row for rows in laid_out for row in rows]

    @property
    def has_both_kinds(self) -> bool:
        """Return whether some rows of the data have images and others do not."""
        kinds = {bool(sample.images) for sample in self.dataset.samples}
        return len(kinds) == 2

    def idle_row(self) -> FlatBatch:
        """Return a row of zero weight, which a rank without units runs so that collective calls match."""
        samples = self.dataset.samples
        number = next((number for number, sample in enumerate(samples) if sample.images), 0)
        [unit] = self._completed([as_unit(self.dataset[number])])
        images = self.dataset.images_for(unit)
        row = flatten(
            unit, images, image_token_id=self.image_token_id, pad_token_id=self.pad_token_id, layout=self.layout
        )
        return replace(
            row,
            edge_weight=torch.zeros_like(row.edge_weight),
            sequence_unit=torch.full_like(row.sequence_unit, -1),
            num_unshared_tokens=row.num_tokens,
        )

    def with_image(self, row: FlatBatch) -> FlatBatch:
        """Return the row, joined with an idle one if it has no image.

        Raises:
            ConfigError: the layout is padded.
        """
        # Ranks that shard weights must all run the vision tower.
        return row if row.pixel_values is not None else joined_rows(row, self.idle_row())


def _weighing(rows: Sequence[FlatBatch], weight: float) -> list[FlatBatch]:
    """Return the rows with edge weights that sum to `weight`; rows without edges stay unchanged."""
    total = sum(float(row.edge_weight.sum()) for row in rows)
    return [replace(row, edge_weight=row.edge_weight * (weight / max(total, 1.0))) for row in rows]


def matched_rows(
    rows: Sequence[FlatBatch], collator: Collator, *, device: torch.device, with_images: bool
) -> list[FlatBatch]:
    """Return the rows filled up with idle ones, so that all ranks have the same number, at least one.

    Args:
        rows: rows of this rank.
        collator: makes the missing idle rows; they are put first.
        device: device of the collective call.
        with_images: weights are sharded, so all ranks must run the vision tower if one does.
    """
    found = list(rows)
    if with_images and collator.has_both_kinds:
        found = [collator.with_image(row) for row in found]
    wanted = max(1, len(found))
    if dist.is_initialized() and dist.get_world_size() > 1:
        most = torch.tensor(wanted, device=device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        wanted = int(most)
    return [collator.idle_row() for _ in range(wanted - len(found))] + found


def joined_rows(first: FlatBatch, second: FlatBatch) -> FlatBatch:
    """Return two rows as one; their trees stay independent.

    Raises:
        ConfigError: the rows are padded.
    """
    if "padded" in (first.layout, second.layout):
        raise ConfigError(
            "Rows with and without images cannot be mixed when weights are sharded and the language model needs "
            "padded rows. Train on one kind of rows, or without sharding."
        )
    shifts = {
        "predictor": first.num_tokens,
        "parents": len(first.parents),
        "segment_ids": len(first.parents),
        "edge_target": len(first.target_ids),
        "edge_sequence": first.num_sequences,
    }
    shifted = {name: getattr(second, name) + shift for name, shift in shifts.items()}
    shifted["parents"] = torch.where(second.parents < 0, second.parents, shifted["parents"])
    units = second.sequence_unit
    shifted["sequence_unit"] = torch.where(units < 0, units, units + first.num_units)
    plain = ("input_ids", "position_ids", "target_ids", "edge_turn", "edge_source", "edge_weight", "sequence_place")
    shifted |= {name: getattr(second, name) for name in plain}
    tensors: dict[str, Any] = {
        name: torch.cat([getattr(first, name), tensor], dim=-1) for name, tensor in shifted.items()
    }
    return replace(
        first,
        **tensors,
        edge_values=_joined_columns(first.edge_values, second.edge_values, len(second.edge_weight)),
        sequence_values=_joined_columns(first.sequence_values, second.sequence_values, second.num_sequences),
        tree_lengths=first.tree_lengths + second.tree_lengths,
        **join_images(first.images, second.images)._asdict(),
        num_sequences=first.num_sequences + second.num_sequences,
        num_unshared_tokens=first.num_unshared_tokens + second.num_unshared_tokens,
        path_positions=first.path_positions + tuple(path + first.num_tokens for path in second.path_positions),
    )


def _joined_columns(first: Mapping[str, Tensor], second: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """Return the columns of `first`, continued by those of `second`, or by zeros where it has none."""
    return {name: torch.cat([column, second.get(name, column.new_zeros(length))]) for name, column in first.items()}
