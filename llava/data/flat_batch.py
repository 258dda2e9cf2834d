"""Flat batch: many sequences as one row of tokens in which shared prefixes appear once.

    Encoded... -> prefix trees -> FlatBatch -> model(**batch.model_inputs()) -> logits of the supervised positions only

It is exact: loss and gradients equal those of padded rows with one sequence each (`docs/architecture.md`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from llava.constants import IGNORE_INDEX
from llava.data import prefix_tree
from llava.data.attention_plan import attention_plan
from llava.data.encode import Encoded
from llava.errors import DataError
from llava.imaging.anyres import Size


class ImageBatch(NamedTuple):
    """Images of a batch.

    Attributes:
        pixel_values: pixels, tiles or tower features; None without images.
        image_sizes: [N, 2] int64 width and height of the images, where their inputs have no common shape; else None.
    """

    pixel_values: Tensor | None
    image_sizes: Tensor | None

    def keywords(self) -> dict[str, Tensor]:
        """Return keyword arguments for the model; None values are left out."""
        named = {"pixel_values": self.pixel_values, "image_sizes": self.image_sizes}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def batch_images(images: Sequence[Tensor], sizes: Sequence[Size] = ()) -> ImageBatch:
    """Return images as one batch.

    Args:
        images: model input of each image.
        sizes: width and height of each image; empty where all inputs have one shape.
    """
    if not images:
        return ImageBatch(None, None)
    if not sizes:
        return ImageBatch(torch.stack(list(images)), None)
    known = torch.tensor(sizes, dtype=torch.int64)
    if images[0].dim() == 4:
        return ImageBatch(torch.cat(list(images)), known)
    return ImageBatch(torch.stack(_to_one_shape(images)), known)


def join_images(first: ImageBatch, second: ImageBatch) -> ImageBatch:
    """Return the images of two batches, those of `first` first."""
    if first.pixel_values is None or second.pixel_values is None:
        return second if first.pixel_values is None else first
    pixels = torch.cat(_to_one_shape([first.pixel_values, second.pixel_values]))
    if first.image_sizes is None or second.image_sizes is None:
        return ImageBatch(pixels, None)
    return ImageBatch(pixels, torch.cat([first.image_sizes, second.image_sizes]))


def _to_one_shape(images: Sequence[Tensor]) -> list[Tensor]:
    """Return images [..., h, w] zero-padded at the right and the bottom to a common height and width."""
    height, width = (max(image.shape[axis] for image in images) for axis in (-2, -1))
    return [pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2])) for image in images]


Layout = Literal["tree", "flat", "padded"]
"""`tree` shares prefixes, `flat` only removes padding, `padded` is the usual [B, T] batch of transformers."""


class CausalModel(Protocol):
    """Model as the batch sees it: a callable that returns an object with `logits`."""

    def __call__(self, **inputs: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class FlatBatch:
    """One row of T tokens (`padded`: B rows), S nodes, M supervised targets, E edges, N images.

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
        edge_weight: [E] float32, 1 for supervised fine-tuning.
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
        return replace(self, **moved)


def target_logits(model: CausalModel, batch: FlatBatch) -> Tensor:
    """Run the model on the batch and return the logits [M, V] that predict each supervised target."""
    logits: Tensor = model(**batch.model_inputs()).logits
    if batch.layout == "padded":
        return logits.flatten(0, 1)[batch.predictor]
    return logits[0]


def _trained_positions(sequence: Encoded, index: int) -> np.ndarray:
    """Return the positions of the trained tokens of a sequence."""
    trained = np.flatnonzero(np.asarray(sequence.labels) != IGNORE_INDEX)
    if len(trained) and trained[0] == 0:
        raise DataError(f"sequence {index}: its first token is trained, but no token before it can predict it")
    return trained


def _edges(sequences: Sequence[Encoded], places: Sequence[np.ndarray]) -> dict[str, Tensor]:
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
    return {**tensors, "edge_weight": torch.ones(len(owner), dtype=torch.float32)}


Place = tuple[Encoded, int]
"""An image in a batch: a sequence, and the index of one of its images."""


def image_places(sequences: Sequence[Encoded]) -> list[Place]:
    """Return all images of sequences that share nothing."""
    return [(sequence, number) for sequence in sequences for number in range(len(sequence.images))]


def shown_images(places: Sequence[Place], images: Mapping[str, Tensor]) -> ImageBatch:
    """Return the model inputs of the placed images as one batch, in order."""
    inputs = [images[sequence.images[number]] for sequence, number in places]
    return batch_images(inputs, [s.image_sizes[number] for s, number in places if s.image_sizes])


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

    Raises:
        DataError: a sequence is empty, holds stray image placeholders, or its first token is trained.
    """
    for index, sequence in enumerate(sequences):
        _check(sequence, index, image_token_id)
    if layout == "padded":
        return _padded(sequences, images, pad_token_id)
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


def _padded(sequences: Sequence[Encoded], images: Mapping[str, Tensor], pad_token_id: int) -> FlatBatch:
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
        **_edges(sequences, places),
    )


def layout_rows(
    sequences: Sequence[Encoded],
    images: Mapping[str, Tensor],
    *,
    image_token_id: int,
    pad_token_id: int = 0,
    max_tokens_per_row: int | None = None,
    layout: Layout = "tree",
) -> list[FlatBatch]:
    """Return sequences laid out in as few rows as possible.

    A sequence is never split, and sequences that share images stay together.

    Args:
        sequences: at least one.
        images: model inputs by image key.
        image_token_id: id of the image placeholder tokens.
        pad_token_id: id that fills padded rows.
        max_tokens_per_row: limit of a row, counted without sharing inside an image group; a longer sequence gets a
            row of its own. None for one row.
        layout: see `Layout`.
    """
    groups: dict[object, list[Encoded]] = {}
    for index, sequence in enumerate(sequences):
        groups.setdefault(sequence.images or index, []).append(sequence)
    rows: list[list[Encoded]] = [[]]
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
        flatten(row, images, image_token_id=image_token_id, pad_token_id=pad_token_id, layout=layout) for row in rows
    ]


def _row_size(sequences: Sequence[Encoded], layout: Layout) -> int:
    if layout == "padded":
        return len(sequences) * max(len(sequence.input_ids) for sequence in sequences)
    return sum(prefix_tree.build_forest(sequences, share=layout == "tree").tree_lengths)


def _parts(group: Sequence[Encoded], limit: int | None, layout: Layout) -> list[list[Encoded]]:
    """Return a group halved until each part fits the limit or is one sequence."""
    if limit is None or len(group) == 1 or _row_size(group, layout) <= limit:
        return [list(group)]
    middle = len(group) // 2
    return _parts(group[:middle], limit, layout) + _parts(group[middle:], limit, layout)
