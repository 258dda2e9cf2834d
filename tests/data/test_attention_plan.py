"""Attention plan: pieces cover the row, and together their masks equal the mask of the tree."""

from __future__ import annotations

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from llava.data.attention_plan import AttentionPlan, attention_plan, chain_cost
from llava.data.flat_batch import FlatBatch, flatten
from tests.support.trees import IMAGE, encoded, random_images, random_sequences


def plan_of(batch: FlatBatch) -> AttentionPlan:
    return attention_plan(batch.segment_ids, batch.parents, batch.position_ids[0])


def true_mask(batch: FlatBatch, window: int | None = None) -> Tensor:
    """Return the mask [T, T], by walking up from every node."""
    parents, depth = batch.parents.tolist(), batch.position_ids[0]
    above = torch.zeros(len(parents), len(parents), dtype=torch.bool)
    for node in range(len(parents)):
        walk = node
        while walk >= 0:
            above[node, walk] = True
            walk = parents[walk]
    nodes = batch.segment_ids
    seen = above[nodes[:, None], nodes[None, :]].tril()
    return seen if window is None else seen & (depth[:, None] - depth[None, :] < window)


def put_together(plan: AttentionPlan, window: int | None) -> Tensor:
    """Return the mask [T, T] that the pieces give together."""
    seen = torch.zeros(len(plan.stops), len(plan.stops), dtype=torch.bool)
    for index, piece in enumerate(plan.pieces):
        runs = [plan.pieces[number] for number in piece.above] + [piece]
        keys = torch.cat([torch.arange(run.start, run.start + run.length) for run in runs])
        mask = plan.mask(index, window)
        if mask is None:
            mask = torch.ones(len(keys), len(keys), dtype=torch.bool).tril()[piece.num_above :]
        assert mask.any(1).all(), "a query that sees nothing gives NaN"
        seen[torch.arange(piece.start, piece.start + piece.length)[:, None], keys] = mask
    return seen


def random_batch(chance: random.Random, num_sequences: int, longest: int) -> FlatBatch:
    sequences = random_sequences(chance, num_sequences, longest=longest)
    return flatten(sequences, random_images(2), image_token_id=IMAGE)


@given(
    chance=st.randoms(use_true_random=False),
    num_sequences=st.integers(1, 10),
    longest=st.sampled_from([3, 12, 60]),
    window=st.sampled_from([None, 1, 5, 30]),
)
@settings(max_examples=40, deadline=None)
def test_pieces_see_what_the_tree_says(
    chance: random.Random, num_sequences: int, longest: int, window: int | None
) -> None:
    batch = random_batch(chance, num_sequences, longest)
    plan = plan_of(batch)
    assert sum(plan.lengths) == batch.num_tokens
    assert [piece.start for piece in plan.pieces] == [sum(plan.lengths[:i]) for i in range(len(plan.pieces))]
    assert torch.equal(put_together(plan, window), true_mask(batch, window))


@given(chance=st.randoms(use_true_random=False), window=st.sampled_from([None, 7]))
@settings(max_examples=20, deadline=None)
def test_the_block_mask_function_equals_the_dense_mask(chance: random.Random, window: int | None) -> None:
    batch = random_batch(chance, 8, 40)
    mask = plan_of(batch).block_mask(window)
    size = batch.num_tokens
    assert torch.equal(create_mask(mask.mask_mod, None, None, size, size, device="cpu")[0, 0], true_mask(batch, window))


def questions(lengths: list[int], opening: int = 250) -> FlatBatch:
    """Return a batch of branches that differ from their first token on."""
    stem = [token % 200 for token in range(opening)]
    tails = [[200 + number, *([7] * (length - 1))] for number, length in enumerate(lengths)]
    return flatten([encoded([*stem, *tail]) for tail in tails], {}, image_token_id=IMAGE)


def test_long_branches_run_apart_and_short_ones_together() -> None:
    assert len(plan_of(questions([200] * 4)).pieces) == 5
    assert len(plan_of(questions([4] * 8)).pieces) == 2
    assert len(plan_of(questions([300])).pieces) == 1


def test_pieces_cost_less_than_a_dense_mask() -> None:
    batch = questions([20, 70, 150, 40, 90, 10, 200, 30])
    plan = plan_of(batch)
    pairs = sum(piece.length * (piece.num_above + piece.length) for piece in plan.pieces)
    assert pairs < 0.5 * batch.num_tokens**2
    assert chain_cost(300, 0) < chain_cost(300, 250)


def test_masks_are_made_once() -> None:
    plan = plan_of(questions([30, 40]))
    last = len(plan.pieces) - 1
    assert plan.mask(last, 20) is plan.mask(last, 20)
    assert plan.block_mask() is plan.block_mask()
