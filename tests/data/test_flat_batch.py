"""Flat batch: positions of tokens, targets of sequences, and rows of limited size."""

from __future__ import annotations

import random
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.data.encode import Encoded
from llava.data.flat_batch import FlatBatch, Layout, flatten, layout_rows
from llava.errors import DataError
from tests.support.trees import IMAGE, encoded, num_trained, random_images, random_sequences

IMAGES = random_images(2)
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


def flat(sequences: list[Encoded], layout: Layout = "tree") -> FlatBatch:
    return flatten(sequences, IMAGES, image_token_id=IMAGE, layout=layout)


@given(chance=st.randoms(use_true_random=False), num_sequences=st.integers(1, 8), layout=st.sampled_from(LAYOUTS))
@settings(max_examples=80, deadline=None)
def test_paths_targets_and_edges(chance: random.Random, num_sequences: int, layout: Layout) -> None:
    sequences = random_sequences(chance, num_sequences)
    batch = flat(sequences, layout)
    ids, depths = batch.input_ids.flatten(), batch.position_ids.flatten()
    for sequence, path in zip(sequences, batch.paths(), strict=True):
        assert ids[path].tolist() == list(sequence.input_ids)
        assert depths[path].tolist() == list(range(len(path)))
    assert len(batch.edge_target) == num_trained(sequences) == batch.edge_weight.sum()
    wanted = {(index, place) for index, s in enumerate(sequences) for place, y in enumerate(s.labels) if y != -100}
    found = set()
    for target, owner in zip(batch.edge_target.tolist(), batch.edge_sequence.tolist(), strict=True):
        path = batch.paths()[owner].tolist()
        place = path.index(int(batch.predictor[target])) + 1
        assert batch.target_ids[target] == sequences[owner].input_ids[place]
        found.add((owner, place))
    assert found == wanted
    assert batch.num_unshared_tokens == sum(len(sequence.input_ids) for sequence in sequences)
    assert (batch.num_sequences, batch.layout) == (num_sequences, layout)


@given(chance=st.randoms(use_true_random=False), layout=st.sampled_from(LAYOUTS))
@settings(max_examples=40, deadline=None)
def test_images_follow_the_order_of_their_placeholders(chance: random.Random, layout: Layout) -> None:
    sequences = random_sequences(chance, 8)
    batch = flat(sequences, layout)
    num_placeholders = int((batch.input_ids == IMAGE).sum())
    if batch.pixel_values is None:
        assert num_placeholders == 0
        return
    assert num_placeholders == 4 * len(batch.pixel_values)
    starts = {int(path[start]): key for s, path in zip(sequences, batch.paths(), strict=True)
              for (start, _), key in zip(s.image_spans, s.images, strict=True)}  # fmt: skip
    expected = torch.stack([IMAGES[starts[place]] for place in sorted(starts)])
    assert torch.equal(batch.pixel_values, expected)


def test_an_image_of_many_questions_is_there_once() -> None:
    batch = flat([encoded([5, "a", 6 + i, 7], trained=[6]) for i in range(4)])
    assert batch.pixel_values is not None and len(batch.pixel_values) == 1
    assert (batch.num_tokens, batch.num_unshared_tokens) == (5 + 4 * 2, 4 * 7)
    # The predictor of a branch's first token would be the stem's last: here the second is trained.
    assert batch.predictor.tolist() == [5, 7, 9, 11]


def test_the_first_token_of_a_branch_is_predicted_by_the_stem() -> None:
    batch = flat([encoded([5, "a", 6], trained=[5]), encoded([5, "a", 7], trained=[5])])
    assert batch.predictor.tolist() == [4, 4] and batch.target_ids.tolist() == [6, 7]


def test_a_shared_target_has_an_edge_for_each_sequence() -> None:
    batch = flat([encoded(["a", 6, 7, 8 + i], trained=[5], turn=3 + i) for i in range(2)])
    assert batch.target_ids.tolist() == [7]
    assert (batch.edge_target.tolist(), batch.edge_sequence.tolist()) == ([0, 0], [0, 1])
    assert batch.edge_turn.tolist() == [3, 4]
    assert batch.edge_weight.dtype == torch.float32


def test_a_token_trained_in_one_sequence_only_has_one_edge() -> None:
    batch = flat([encoded(["a", 6, 7, 8], trained=[5, 6]), encoded(["a", 6, 7, 8], trained=[6])])
    assert len(batch.target_ids) == 2 and batch.edge_sequence.tolist() == [0, 0, 1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_without_any_target(layout: Layout) -> None:
    batch = flat([encoded([5, 6])], layout)
    assert len(batch.predictor) == len(batch.edge_weight) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_refusals(layout: Layout) -> None:
    with pytest.raises(DataError, match=r"sequence 1.*first token"):
        flat([encoded([5, 6]), encoded([5, 6], trained=[0])], layout)
    with pytest.raises(DataError, match="sequence 0 is empty"):
        flat([encoded([])], layout)
    stray = Encoded((IMAGE, 5), (-100, -100), (0, 0))
    with pytest.raises(DataError, match="1 image placeholders and 0 image keys"):
        flat([stray], layout)


def test_moving_keeps_everything() -> None:
    batch = flat([encoded(["a", 6], trained=[4])])
    moved = batch.to("cpu")
    assert torch.equal(moved.input_ids, batch.input_ids) and moved.layout == batch.layout


def test_the_flat_row_carries_no_square_mask() -> None:
    inputs = flat([encoded(["a", 6, 7])]).model_inputs()
    assert inputs["attention_mask"].dim() == 4 and inputs["attention_mask"].numel() == 0
    assert "attention_mask" in flat([encoded([5])], "padded").model_inputs()


def rows(sequences: list[Encoded], limit: int | None, layout: Layout = "tree") -> list[FlatBatch]:
    return layout_rows(sequences, IMAGES, image_token_id=IMAGE, max_tokens_per_row=limit, layout=layout)


@given(
    chance=st.randoms(use_true_random=False), limit=st.sampled_from([None, 1, 20, 60]), layout=st.sampled_from(LAYOUTS)
)
@settings(max_examples=40, deadline=None)
def test_rows_hold_every_sequence_within_the_limit(chance: random.Random, limit: int | None, layout: Layout) -> None:
    sequences = random_sequences(chance, 9)
    laid_out = rows(sequences, limit, layout)
    found = sorted(tuple(row.input_ids.flatten()[path].tolist()) for row in laid_out for path in row.paths())
    assert found == sorted(sequence.input_ids for sequence in sequences)
    assert sum(len(row.edge_weight) for row in laid_out) == num_trained(sequences)
    if limit is None:
        assert len(laid_out) == 1
    else:
        assert all(row.num_tokens <= limit or row.num_sequences == 1 for row in laid_out)


def test_questions_about_an_image_stay_together() -> None:
    mixed = [encoded(["ab"[i % 2], 5 + i, 6, 7]) for i in range(6)]
    first, second = rows(mixed, 14)
    assert (first.num_tokens, second.num_tokens) == (4 + 9, 4 + 9)
    assert first.pixel_values is not None and len(first.pixel_values) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [3, 4, 7])
def test_a_row_may_be_exactly_as_long_as_the_limit(layout: Layout, size: int) -> None:
    two = [encoded([*range(5, 5 + size)]), encoded([*range(30, 30 + size)])]
    assert [row.num_sequences for row in rows(two, 2 * size, layout)] == [2]
    assert [row.num_sequences for row in rows(two, 2 * size - 1, layout)] == [1, 1]
    shared = [encoded(["a", 5, 6]), encoded(["a", 5, 7])]
    [whole] = rows(shared, sum(len(sequence.input_ids) for sequence in shared), layout)
    assert whole.num_sequences == 2
    assert [row.num_sequences for row in rows(shared, whole.num_tokens, layout)] == [2]
    assert [row.num_sequences for row in rows(shared, whole.num_tokens - 1, layout)] == [1, 1]
