"""Flat batch against transformers' Llava on padded rows: loss, every gradient, and operations."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from llava.data.encode import Encoded
from llava.data.flat_batch import FlatBatch, Layout, flatten, target_logits
from llava.train.objectives.sft import SFT
from tests.support.tiny import tiny_llava
from tests.support.trees import (
    IMAGE,
    assert_same_gradients,
    encoded,
    gradients,
    library_twin,
    num_trained,
    padded_inputs,
    random_images,
    random_sequences,
    twin_name,
)

IMAGES = random_images()
WINDOW = 7
STEM = [5, 6, "a", 7, 8]


@cache
def pair(lm: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Return a tiny model of ours and the library's with the same weights."""
    ours = tiny_llava(lm="mistral" if lm == "window" else lm).model
    if lm == "window":
        ours.config.text_config.sliding_window = WINDOW
        for layer in ours.model.language_model.layers:
            layer.self_attn.sliding_window = WINDOW
    assert ours.config.image_token_id == IMAGE
    ours.requires_grad_(True)
    library = library_twin(ours)
    return ours.to(dtype), library.to(dtype)


def flat(sequences: list[Encoded], layout: Layout = "tree") -> FlatBatch:
    return flatten(sequences, IMAGES, image_token_id=IMAGE, layout=layout)


def own_loss(model: Any, batch: FlatBatch, num_items: int) -> Tensor:
    return SFT()(model, batch, num_items=torch.tensor(float(max(num_items, 1)))).loss


def check(
    sequences: list[Encoded], lm: str = "llama", layout: Layout = "tree", dtype: torch.dtype = torch.float32
) -> None:
    """Check that loss and gradients equal the library's on one padded row per sequence."""
    ours, library = pair(lm, dtype)
    count = num_trained(sequences)
    loss = own_loss(ours, flat(sequences, layout), count)
    loss.backward()
    found = gradients(ours)
    if not count:  # the library divides by zero here
        assert loss == 0 and all(not gradient.any() for gradient in found.values())
        return
    expected_loss = library(**padded_inputs(sequences, IMAGES)).loss
    expected_loss.backward()
    expected = gradients(library)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6, check_dtype=False)
    assert_same_gradients(found, {name: expected[twin_name(name)] for name in found})


@given(
    chance=st.randoms(use_true_random=False),
    num_sequences=st.integers(1, 8),
    lm=st.sampled_from(["llama", "window", "qwen2"]),
    layout=st.sampled_from(["tree", "tree", "flat", "padded"]),
)
@settings(max_examples=40, deadline=None)
def test_loss_and_gradients_on_random_trees(chance: random.Random, num_sequences: int, lm: str, layout: Layout) -> None:
    # In double precision, because shrunk examples repeat one token, whose true query gradients are zero up to rounding.
    check(random_sequences(chance, num_sequences), lm, layout, torch.float64)


@pytest.mark.parametrize("lm", ["llama", "window", "qwen2"])
def test_loss_and_gradients_in_single_precision(lm: str) -> None:
    for seed in range(12):
        check(random_sequences(random.Random(seed), 7), lm)


CASES: dict[str, list[Encoded]] = {
    "text only": [encoded([5, 6, 7, 8 + i], trained=[2, 3]) for i in range(3)],
    "several images": [encoded(["a", 6, "b", 7 + i, "c", 8], trained=[9, 14]) for i in range(3)],
    "image inside": [encoded([5, 6, 7, "a", 8, 9 + i], trained=[7, 8]) for i in range(3)],
    "image last": [encoded([5, 6 + i, 7, "a"], trained=[1, 2]) for i in range(2)],
    "same image twice": [encoded(["a", "a", 5 + i], trained=[8]) for i in range(2)],
    "nothing shared": [encoded([5 + i, "abc"[i], 9, 8, 7], trained=[5, 6, 7]) for i in range(3)],
    "all shared": [encoded([*STEM, 9], trained=[7, 8])] * 3,
    "equal sequences, other targets": [encoded([*STEM, 9], trained=[6 + i, 8]) for i in range(3)],
    "one is the beginning of another": [encoded([*STEM, 9][: 4 + i], trained=[6]) for i in range(3)],
    "one without targets": [encoded([*STEM, 9], trained=[7]), encoded([*STEM, 10, 11])],
    "no target at all": [encoded([*STEM, 9 + i]) for i in range(2)],
    "text and images": [encoded([*STEM, 9], trained=[8]), encoded([5, 6, 10, 11], trained=[2, 3])],
    "long branches": [encoded([*STEM, *([9 + i] * (30 + 20 * i))], trained=range(9, 25)) for i in range(4)],
    "branches of branches": [
        encoded([*([5] * 40), *([6 + i // 2] * 30), *([9 + i] * 35)], trained=range(50, 100)) for i in range(4)
    ],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("lm", ["llama", "window"])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_of_named_cases(name: str, lm: str, dtype: torch.dtype) -> None:
    check(CASES[name], lm, dtype=dtype)


def test_gradient_checkpointing_changes_nothing() -> None:
    ours, _ = pair("llama")
    batch, count = flat(CASES["long branches"]), num_trained(CASES["long branches"])
    own_loss(ours, batch, count).backward()
    expected = gradients(ours)
    ours.train()
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        own_loss(ours, batch, count).backward()
    finally:
        ours.gradient_checkpointing_disable()
        ours.eval()
    assert_same_gradients(gradients(ours), expected)


def test_a_wrong_tree_would_be_noticed() -> None:
    """The same row with one branch one node too low has another loss."""
    ours, _ = pair("llama")
    batch = flat(CASES["several images"])
    assert len(batch.parents) == 4
    wrong = batch.parents.clone()
    wrong[2] = 1
    with torch.no_grad():
        change = own_loss(ours, replace(batch, parents=wrong), 6) - own_loss(ours, batch, 6)
    assert abs(float(change)) > 1e-4


def flops(batch: FlatBatch) -> int:
    """Return the operations of one step."""
    ours, _ = pair("llama")
    with FlopCounterMode(display=False) as counter:
        target_logits(ours, batch).logsumexp(-1).sum().backward()
    gradients(ours)
    return int(counter.get_total_flops())


def questions(keys: str, num_questions: int, length: int = 30) -> list[Encoded]:
    return [
        encoded([10 + number, key, *([20 + question] * length)], trained=[length + 2])
        for number, key in enumerate(keys)
        for question in range(num_questions)
    ]


def test_a_row_costs_the_sum_of_its_trees() -> None:
    trees = [questions("abc"[i], 1 + 2 * i, 20 + 15 * i) for i in range(3)]
    stems = [[encoded([50 + i, *sequence.input_ids[1:1], "abc"[i], *sequence.input_ids[5:]], trained=[7])
              for sequence in tree] for i, tree in enumerate(trees)]  # fmt: skip
    together = flat([sequence for tree in stems for sequence in tree])
    assert len(together.tree_lengths) == 3
    assert flops(together) == sum(flops(flat(tree)) for tree in stems)


def test_ten_chains_cost_ten_times_one() -> None:
    """No term grows with the square of the row."""
    one = [encoded([5, *([7] * 40), 9], trained=[41])]
    ten = [encoded([5 + i, *([7] * 40), 9], trained=[41]) for i in range(10)]
    assert flops(flat(ten)) == 10 * flops(flat(one))


def test_eight_questions_cost_less_than_two_alone() -> None:
    """Tower and image tokens are computed once; the padded batch repeats them for each question."""
    sequences = questions("a", 8, length=1)
    assert flops(flat(sequences)) < 0.35 * flops(flat(sequences, "padded"))
