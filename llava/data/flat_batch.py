"""Flat batch: many sequences as one row of tokens in which shared prefixes appear once.

    Encoded... -> prefix trees -> FlatBatch -> model(**batch.model_inputs()) -> logits of the supervised positions only

It is exact: loss and gradients equal those of padded rows with one sequence each (`docs/architecture.md`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX
from llava.data import prefix_tree
from llava.data.attention_plan import attention_plan
from llava.data.encode import Encoded, Unit, as_unit
from llava.data.image_batch import ImageBatch, Place, image_places, shown_images
from llava.errors import DataError

Layout = Literal["tree", "flat", "padded"]
"""`tree` shares prefixes, `flat` only removes padding, `padded` is the usual [B, T] batch of transformers."""


class CausalModel(Protocol):
    """Protocol of the model for a batch: a callable that returns an object with `logits`."""

    def __call__(self, **inputs: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class FlatBatch:
    """Flat row of T tokens (`padded`: B rows), K sequences, S nodes, M targets, E edges, N images.

    Attributes:
        input_ids: [1, T] token ids.
        position_ids: [1, T] depth in the tree, equal to the position in the unshared sequence.
        tree_lengths: number of tokens of each independent tree; no token attends across trees.
        segment_ids: [T] node of each token.
        parents: [S] parent of each node, -1 for a root.
        predictor: [M] index of the token whose hidden state predicts each target (into B * T when padded).
        target_ids: [M] token id of each target.
        edge_target, edge_sequence, edge_turn: [E] target of each edge, and the sequence (and its turn) that trains it.
        edge_source: [E] mixture source of the sequence.
        edge_weight: [E] float32 weight of each edge in the loss of its sequence, never negative; 0 in an idle row.
        edge_values: named [E] float32 columns of the sequences, see `Encoded.columns`.
        sequence_unit: [K] unit of each sequence, numbered from 0; -1 in an idle row, which counts for nothing.
        sequence_place: [K] place of each sequence in its unit: 0 for the chosen side of a pair, 1 for the rejected.
        sequence_values: named [K] float64 numbers of the sequences: `weight`, and see `Encoded.numbers`.
        pixel_values: [N, 3, H, W] pixels or [N, P, Dv] tower features in the order of their placeholders, or None;
            tiles or padded images where `image_sizes` is given, see `batch_images`.
        num_sequences: number of sequences in the row.
        num_unshared_tokens: number of tokens without prefix sharing.
        layout: layout of the sequences.
        attention_mask: [B, T] of a padded batch, else None.
        path_positions: for each sequence, [its length] positions of its tokens in the row.
        image_sizes: [N, 2] width and height of each image where its number of tokens depends on them, else None.
    """

    input_ids: Tensor
    position_ids: Tensor
    tree_lengths: tuple[int, ...]
    segment_ids: Tensor
    parents: Tensor
    predictor: Tensor
    target_ids: Tensor
    edge_target: Tensor
    edge_sequence: Tensor
    edge_turn: Tensor
    edge_source: Tensor
    edge_weight: Tensor
    edge_values: Mapping[str, Tensor]
    sequence_unit: Tensor
    sequence_place: Tensor
    sequence_values: Mapping[str, Tensor]
    pixel_values: Tensor | None
    num_sequences: int
    num_unshared_tokens: int
    layout: Layout
    path_positions: tuple[Tensor, ...]
    attention_mask: Tensor | None = None
    image_sizes: Tensor | None = None

    @property
    def images(self) -> ImageBatch:
        """Return the images of the row."""
        return ImageBatch(self.pixel_values, self.image_sizes)

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens that the model computes."""
        return self.input_ids.numel()

    @property
    def num_units(self) -> int:
        """Return the number of units; an idle row has none."""
        return int(self.sequence_unit.max()) + 1

    def paths(self) -> tuple[Tensor, ...]:
        """Return, for each sequence, the positions of its tokens in the row."""
        return self.path_positions

    def model_inputs(self) -> dict[str, Any]:
        """Return keyword arguments for the model, whose head runs on the supervised positions only."""
        inputs: dict[str, Any] = {"input_ids": self.input_ids, "use_cache": False, **self.images.keywords()}
        if self.layout == "padded":
            return {**inputs, "attention_mask": self.attention_mask}
        return {
            **inputs,
            "position_ids": self.position_ids,
            # transformers passes 4-D masks on unchanged; an empty one keeps it from building a mask of [T, T]. The tree
            # attention uses its own masks.
            "attention_mask": torch.empty(1, 1, 0, 0, dtype=torch.bool, device=self.input_ids.device),
            "logits_to_keep": self.predictor,
            "tree_plan": attention_plan(self.segment_ids, self.parents, self.position_ids[0]),
        }

    def to(self, device: torch.device | str) -> FlatBatch:
        """Return the batch with every tensor on `device`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: v.to(device) for name, v in values.items() if isinstance(v, Tensor)}
        for name in ("edge_values", "sequence_values"):
            moved[name] = {key: tensor.to(device) for key, tensor in values[name].items()}
        return replace(self, **moved)


def target_logits(model: CausalModel, batch: FlatBatch) -> Tensor:
    """Run the model on the batch and return the logits [M, V] that predict each supervised target."""
    logits: Tensor = model(**batch.model_inputs()).logits
    if batch.layout == "padded":
        return logits.flatten(0, 1)[batch.predictor]
    # The backward pass of an index would copy the gradient to a tensor of zeros.
    return logits.squeeze(0)


def _trained_positions(sequence: Encoded, index: int) -> np.ndarray:
    """Return the positions of the trained tokens of a sequence."""
    trained = np.flatnonzero(np.asarray(sequence.labels) != IGNORE_INDEX)
    if len(trained) and trained[0] == 0:
        raise DataError(f"sequence {index}: its first token is trained, but no token before it can predict it")
    return trained


def _edges(sequences: Sequence[Encoded], places: Sequence[np.ndarray]) -> dict[str, Any]:
    """Return targets and edges for the row positions of each sequence; a shared token is one target."""
    wanted = [_trained_positions(sequence, index) for index, sequence in enumerate(sequences)]
    occupied = np.concatenate([place[at] for place, at in zip(places, wanted, strict=True)])
    before = np.concatenate([place[at - 1] for place, at in zip(places, wanted, strict=True)])
    ids = np.concatenate([np.asarray(s.labels)[at] for s, at in zip(sequences, wanted, strict=True)])
    turns = np.concatenate([np.asarray(s.turns)[at] for s, at in zip(sequences, wanted, strict=True)])
    owner = np.repeat(np.arange(len(sequences)), [len(at) for at in wanted])
    _, first, edge_target = np.unique(occupied, return_index=True, return_inverse=True)
    as_long = {
        "predictor": before[first],
        "target_ids": ids[first],
        "edge_target": edge_target,
        "edge_sequence": owner,
        "edge_turn": turns,
        "edge_source": np.asarray([s.source for s in sequences])[owner],
    }
    tensors = {name: torch.from_numpy(np.ascontiguousarray(v, dtype=np.int64)) for name, v in as_long.items()}
    pairs = list(zip(sequences, wanted, strict=True))
    values = {
        name: torch.from_numpy(np.concatenate([np.asarray(s.columns[name], np.float32)[at] for s, at in pairs]))
        for name in _common_names([sequence.columns for sequence in sequences], "columns")
    }
    return {**tensors, "edge_weight": torch.ones(len(owner), dtype=torch.float32), "edge_values": values}


def _common_names(named: Sequence[Mapping[str, object]], what: str) -> list[str]:
    """Return the names that all sequences of a row have.

    Raises:
        DataError: some have other names.
    """
    for index, found in enumerate(named):
        if found.keys() != named[0].keys():
            raise DataError(f"sequence {index} has {what} {sorted(found)}, but sequence 0 has {sorted(named[0])}")
    return sorted(named[0])


def _sequence_values(sequences: Sequence[Encoded], unit_sizes: Sequence[int] | None) -> dict[str, Any]:
    """Return the unit of each sequence, its place in the unit, and the named numbers."""
    sizes = [1] * len(sequences) if unit_sizes is None else list(unit_sizes)
    if sum(sizes) != len(sequences) or min(sizes) < 1:
        raise DataError(f"units of {sizes} sequences do not add up to the {len(sequences)} sequences of the row")
    names = _common_names([sequence.numbers for sequence in sequences], "numbers")
    values = {name: [sequence.numbers[name] for sequence in sequences] for name in names}
    values["weight"] = [sequence.weight for sequence in sequences]
    return {
        "sequence_unit": torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)),
        "sequence_place": torch.cat([torch.arange(size) for size in sizes]),
        "sequence_values": {name: torch.tensor(column, dtype=torch.float64) for name, column in values.items()},
    }


def _places(nodes: Sequence[prefix_tree.Node], sequences: Sequence[Encoded]) -> list[Place]:
    """Return the images in the order of their placeholders in the row."""
    return [
        (sequences[node.sequences[0]], number)
        for node in nodes
        for number, (start, _) in enumerate(sequences[node.sequences[0]].image_spans)
        if node.start <= start < node.stop
    ]


def flatten(
    sequences: Sequence[Encoded],
    images: Mapping[str, Tensor],
    *,
    image_token_id: int,
    pad_token_id: int = 0,
    layout: Layout = "tree",
    unit_sizes: Sequence[int] | None = None,
) -> FlatBatch:
    """Return sequences laid out as one batch.

    Example::

        batch = flatten(sequences, dataset.images_for(sequences), image_token_id=processor.image_token_id)
        logits = target_logits(model, batch)

    Args:
        sequences: at least one, none empty.
        images: pixels [3, H, W] or tower features [P, Dv] by image key.
        image_token_id: id of the image placeholder tokens; text tokens must not have it.
        pad_token_id: id that fills padded rows.
        layout: see `Layout`.
        unit_sizes: number of sequences of each unit, in order; None where each sequence is a unit.

    Raises:
        DataError: a sequence is empty, holds stray image placeholders, or its first token is trained.
    """
    for index, sequence in enumerate(sequences):
        _check(sequence, index, image_token_id)
    if layout == "padded":
        return _padded(sequences, images, pad_token_id, unit_sizes)
    forest = prefix_tree.build_forest(sequences, share=layout == "tree")
    runs = [np.arange(node.offset, node.offset + node.length) for node in forest.nodes]
    places = [np.concatenate([runs[node.index] for node in path]) for path in forest.paths]
    ids = np.concatenate([np.asarray(sequences[n.sequences[0]].input_ids[n.start : n.stop]) for n in forest.nodes])
    lengths = [node.length for node in forest.nodes]
    return FlatBatch(
        input_ids=torch.from_numpy(ids.astype(np.int64))[None],
        position_ids=torch.from_numpy(np.concatenate([np.arange(n.start, n.stop) for n in forest.nodes]))[None],
        tree_lengths=forest.tree_lengths,
        segment_ids=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        parents=torch.tensor([node.parent for node in forest.nodes]),
        **shown_images(_places(forest.nodes, sequences), images)._asdict(),
        num_sequences=len(sequences),
        num_unshared_tokens=sum(len(sequence.input_ids) for sequence in sequences),
        layout=layout,
        path_positions=tuple(torch.from_numpy(place) for place in places),
        **_sequence_values(sequences, unit_sizes),
        **_edges(sequences, places),
    )


def _check(sequence: Encoded, index: int, image_token_id: int) -> None:
    if not sequence.input_ids:
        raise DataError(f"sequence {index} is empty, expected at least one token")
    found = sequence.input_ids.count(image_token_id)
    expected = sum(stop - start for start, stop in sequence.image_spans)
    if found != expected or len(sequence.images) != len(sequence.image_spans):
        raise DataError(
            f"sequence {index}: {found} image placeholders and {len(sequence.images)} image keys, expected {expected} "
            f"placeholders of {len(sequence.image_spans)} images"
        )


def _padded(
    sequences: Sequence[Encoded], images: Mapping[str, Tensor], pad_token_id: int, unit_sizes: Sequence[int] | None
) -> FlatBatch:
    """Return the usual batch of transformers: one right-padded row per sequence."""
    num_rows, longest = len(sequences), max(len(sequence.input_ids) for sequence in sequences)
    ids = np.full((num_rows, longest), pad_token_id, dtype=np.int64)
    mask = np.zeros((num_rows, longest), dtype=bool)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence.input_ids)] = sequence.input_ids
        mask[row, : len(sequence.input_ids)] = True
    places = [row * longest + np.arange(len(sequence.input_ids)) for row, sequence in enumerate(sequences)]
    return FlatBatch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.arange(longest).expand(num_rows, longest),
        tree_lengths=(longest,) * num_rows,
        segment_ids=torch.arange(num_rows).repeat_interleave(longest),
        parents=torch.full((num_rows,), -1),
        **shown_images(image_places(sequences), images)._asdict(),
        num_sequences=num_rows,
        num_unshared_tokens=sum(len(sequence.input_ids) for sequence in sequences),
        layout="padded",
        path_positions=tuple(torch.from_numpy(place) for place in places),
        attention_mask=torch.from_numpy(mask),
        **_sequence_values(sequences, unit_sizes),
        **_edges(sequences, places),
    )


def layout_rows(
    units: Sequence[Encoded | Unit],
    images: Mapping[str, Tensor],
    *,
    image_token_id: int,
    pad_token_id: int = 0,
    max_tokens_per_row: int | None = None,
    layout: Layout = "tree",
    alone_above: int | None = None,
) -> list[FlatBatch]:
    """Return units laid out in as few rows as possible.

    A unit is never split, and units that begin with the same images stay together, unless one is computed alone.

    Args:
        units: at least one; a single sequence is a unit of its own.
        images: model inputs by image key.
        image_token_id: id of the image placeholder tokens.
        pad_token_id: id that fills padded rows.
        max_tokens_per_row: limit of a row, counted without sharing between groups of other images; a longer unit gets
            a row of its own. None for one row.
        layout: see `Layout`.
        alone_above: length in tokens above which a sequence gets a row of its own, see `model.rope`.
    """
    long: list[list[Unit]] = []
    groups: dict[object, list[Unit]] = {}
    for index, unit in enumerate(map(as_unit, units)):
        if alone_above is not None and max(len(sequence.input_ids) for sequence in unit) > alone_above:
            long.append([unit])
        else:
            groups.setdefault(unit[0].images or index, []).append(unit)
    rows: list[list[Unit]] = [[]]
    used = 0
    for group in groups.values():
        for part in _parts(group, max_tokens_per_row, layout):
            # Padding grows with the longest sequence; in other layouts sharing between parts only saves more.
            together = _row_size(rows[-1] + part, layout) if layout == "padded" else used + _row_size(part, layout)
            if rows[-1] and max_tokens_per_row is not None and together > max_tokens_per_row:
                rows.append([])
                together = _row_size(part, layout)
            rows[-1].extend(part)
            used = together
    return [
        flatten(
            [sequence for unit in row for sequence in unit],
            images,
            image_token_id=image_token_id,
            pad_token_id=pad_token_id,
            layout=layout,
            unit_sizes=[len(unit) for unit in row],
        )
        for row in [*rows, *long]
        if row
    ]


def _row_size(units: Sequence[Unit], layout: Layout) -> int:
    sequences = [sequence for unit in units for sequence in unit]
    if layout == "padded":
        return len(sequences) * max(len(sequence.input_ids) for sequence in sequences)
    return sum(prefix_tree.build_forest(sequences, share=layout == "tree").tree_lengths)


def _parts(group: Sequence[Unit], limit: int | None, layout: Layout) -> list[list[Unit]]:
    """Return a group halved until each part fits the limit or is one unit."""
    if limit is None or len(group) == 1 or _row_size(group, layout) <= limit:
        return [list(group)]
    middle = len(group) // 2
    return _parts(group[:middle], limit, layout) + _parts(group[middle:], limit, layout)
