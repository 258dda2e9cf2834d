"""Preference objective: losses of random pair trees equal those of padded sequences, one by one."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llava.data.collator import joined_rows
from llava.data.encode import Unit
from llava.data.flat_batch import FlatBatch, flatten, layout_rows
from llava.errors import ConfigError
from llava.train.objectives.pairs import REFERENCE, PairLoss, PairLossSpec
from llava.train.preference_losses import PAIR_LOSSES, Pairs
from llava.train.reference import sequence_logprobs
from tests.support.tiny import tiny_llava
from tests.support.trees import (
    IMAGE,
    assert_same_gradients,
    encoded,
    gradients,
    num_trained,
    random_images,
    random_sequences,
)

IMAGES = {key: pixels.double() for key, pixels in random_images().items()}
BETA = 0.3
SPECS = {name: PairLossSpec((name,), beta=BETA) for name in PAIR_LOSSES}
MIXED = PairLossSpec(("sigmoid", "bco_pair", "sft"), (0.8, 0.2, 1.0), beta=BETA)


@cache
def model() -> Any:
    found = tiny_llava().model.double()
    found.requires_grad_(True)
    return found


def random_pairs(chance: random.Random, num_pairs: int, *, size: int = 2) -> list[Unit]:
    """Return units with reference values and weights; every sequence has a trained token."""
    units: list[Unit] = []
    while len(units) < num_pairs:
        members = [s for s in random_sequences(chance, 3 * size) if num_trained([s])][:size]
        if len(members) == size:
            weight = chance.choice([1.0, 0.5])
            numbers = [{REFERENCE: -chance.uniform(1, 30)} for _ in members]
            units.append(tuple(replace(s, weight=weight, numbers=n) for s, n in zip(members, numbers, strict=True)))
    return units


def rows_of(units: list[Unit], limit: int | None = None, layout: Any = "tree") -> list[FlatBatch]:
    return layout_rows(units, IMAGES, image_token_id=IMAGE, max_tokens_per_row=limit, layout=layout)


def step_loss(objective: PairLoss, rows: list[FlatBatch]) -> Tensor:
    """Return the loss of a step as the trainer computes it."""
    num_items = torch.stack([objective.count(row) for row in rows]).sum(0).clamp(min=1.0)
    return torch.stack([objective(model(), row, num_items=num_items).loss for row in rows]).sum()


def expected_loss(spec: PairLossSpec, units: list[Unit]) -> Tensor:
    """Return the loss from one padded forward pass per sequence."""
    total = torch.zeros((), dtype=torch.float64)
    num_chosen = sum(num_trained([unit[0]]) for unit in units)
    for unit in units:
        logps = [sequence_logprobs(model(), flatten([s], IMAGES, image_token_id=IMAGE, layout="padded")) for s in unit]
        tokens = [torch.tensor([float(num_trained([s]))]) for s in unit]
        refs = [torch.tensor([s.numbers[REFERENCE]], dtype=torch.float64) for s in unit]
        third = (logps[2], refs[2]) if len(unit) > 2 else (None, None)
        pairs = Pairs(*logps[:2], *tokens[:2], *refs[:2], *third)
        for name, weight, loss in spec.functions():
            divisor = num_chosen if name == "sft" else len(units)
            total = total + weight * unit[0].weight * loss(pairs).sum() / divisor
    return total


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "orpo", "mdpo", "mixed"])
@given(seed=st.integers(0, 10**6), num_pairs=st.integers(1, 4), layout=st.sampled_from(["tree", "flat"]))
@settings(max_examples=2, deadline=None)
def test_loss_and_gradients_of_pair_trees(name: str, seed: int, num_pairs: int, layout: str) -> None:
    spec = MIXED if name == "mixed" else SPECS[name]
    units = random_pairs(random.Random(seed), num_pairs, size=3 if name == "mdpo" else 2)
    loss = step_loss(PairLoss(spec), rows_of(units, layout=layout))
    loss.backward()
    found = gradients(model())
    expected = expected_loss(spec, units)
    expected.backward()
    # The norms of the language model round to float32, also in a float64 model.
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-7)
    assert_same_gradients(found, gradients(model()), tolerance=1e-6)


@torch.no_grad()
def test_limits_of_rows_do_not_change_the_loss() -> None:
    units = random_pairs(random.Random(3), 6)
    losses = [step_loss(PairLoss(MIXED), rows_of(units, limit)) for limit in (None, 30, 1)]
    assert len(rows_of(units, 1)) == 6
    torch.testing.assert_close(losses, [losses[0]] * 3, rtol=0, atol=1e-12)


@torch.no_grad()
def test_an_idle_row_counts_for_nothing() -> None:
    units = random_pairs(random.Random(4), 2)
    [row] = rows_of(units)
    idle = replace(row, edge_weight=row.edge_weight * 0, sequence_unit=torch.full_like(row.sequence_unit, -1))
    objective = PairLoss(MIXED)
    alone = objective(model(), idle, num_items=torch.ones(2))
    assert alone.loss == 0 and not alone.metrics and objective.count(idle).tolist() == [0.0, 0.0]
    torch.testing.assert_close(step_loss(objective, [joined_rows(row, idle)]), step_loss(objective, [row]))


def test_an_idle_row_has_a_graph() -> None:
    [row] = rows_of(random_pairs(random.Random(4), 1))
    idle = replace(row, sequence_unit=torch.full_like(row.sequence_unit, -1))
    PairLoss(MIXED)(model(), idle, num_items=torch.ones(2)).loss.backward()
    assert all(not gradient.any() for gradient in gradients(model()).values())


@torch.no_grad()
def test_metrics_are_sums_over_pairs() -> None:
    units = random_pairs(random.Random(7), 4)
    objective = PairLoss(SPECS["sigmoid"])
    [row] = rows_of(units)
    metrics = objective(model(), row, num_items=torch.ones(1)).metrics
    assert tuple(sorted(metrics)) == tuple(sorted(objective.metric_names))
    logps = sequence_logprobs(model(), row).view(-1, 2)
    reference = row.sequence_values[REFERENCE].view(-1, 2)
    rewards = BETA * (logps - reference)
    assert metrics["rewards/margins"].tolist() == pytest.approx([float((rewards[:, 0] - rewards[:, 1]).sum()), 4.0])
    right = (rewards[:, 0] > rewards[:, 1]).sum()
    assert metrics["rewards/accuracies"].tolist() == [float(right), 4.0]
    assert metrics["chosen_below_reference"].tolist() == [float((logps[:, 0] < reference[:, 0]).sum()), 4.0]
    shorter = [num_trained([unit[0]]) < num_trained([unit[1]]) for unit in units]
    assert metrics["rewards/accuracies_chosen_shorter"][1] == sum(shorter)


@torch.no_grad()
def test_a_reference_function_is_used_instead_of_stored_values() -> None:
    [row] = rows_of(random_pairs(random.Random(8), 2))
    own = PairLoss(SPECS["sigmoid"], reference=partial(sequence_logprobs, model()))
    assert own(model(), row, num_items=torch.ones(1)).loss.item() == pytest.approx(2 * 0.6931471805599453, rel=1e-12)


def test_without_any_reference_there_is_an_error() -> None:
    pair = tuple(encoded([5, 6, 7 + n], trained=[2]) for n in range(2))
    with pytest.raises(ConfigError, match="--ref-mode"):
        PairLoss(SPECS["sigmoid"])(model(), rows_of([pair])[0], num_items=torch.ones(1))


@pytest.mark.parametrize("size", [1, 4])
@torch.no_grad()
def test_units_that_are_no_pairs(size: int) -> None:
    unit = tuple(encoded([5, 6, 7 + n], trained=[2]) for n in range(size))
    with pytest.raises(ConfigError, match="units of 2 or 3 sequences"):
        PairLoss(SPECS["simpo"])(model(), rows_of([unit])[0], num_items=torch.ones(1))


def test_weights_must_match_the_losses() -> None:
    with pytest.raises(ConfigError, match="--pref-loss-weights has 1 numbers"):
        PairLoss(PairLossSpec(("sigmoid", "sft"), (1.0,)))


def test_unknown_losses_are_named() -> None:
    with pytest.raises(ConfigError, match="sigmoidal"):
        PairLoss(PairLossSpec(("sigmoidal",)))
