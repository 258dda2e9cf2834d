"""Bounds of trained weights hold for a run with other rounding, and fail for another training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.fidelity.weight_bounds import UNIT_ROUNDOFF, WeightBounds, gradient_rounding, update_limit

NUM_STEPS, NUM_TOKENS, NUM_WORDS, WIDTH = 6, 40, 12, 16
UNSEEN = NUM_WORDS - 1


def start() -> nn.Module:
    """Return a float32 network with the same weights on every CPU, because uniform draws do not round."""
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Embedding(NUM_WORDS, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 5))
    for parameter in network.parameters():
        parameter.data = (torch.rand(parameter.shape, generator=generator) - 0.5) / 2
    return network


def train(network: nn.Module, bounds: WeightBounds | None = None, **options: Any) -> dict[str, Tensor]:
    """Return the last weights of a short training; `bounds` gets every step."""
    settings: dict[str, Any] = {"lr": 2e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0} | options
    optimizer = torch.optim.AdamW(network.parameters(), **settings)
    generator = torch.Generator().manual_seed(1)
    for _ in range(NUM_STEPS):
        ids = torch.randint(0, UNSEEN, (NUM_TOKENS,), generator=generator)
        targets = torch.randint(0, 5, (NUM_TOKENS,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(ids), targets).backward()
        if bounds is not None:
            bounds.on_pre_optimizer_step(None, None, None, optimizer=optimizer)
        optimizer.step()
    return {name: parameter.detach().double() for name, parameter in network.named_parameters()}


def bounded() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the last weights in float32, and their bounds."""
    network = start()
    bounds = WeightBounds(network, NUM_TOKENS)
    return train(network, bounds), bounds.bounds


def share(ours: dict[str, Tensor], other: dict[str, Tensor], bounds: dict[str, Tensor]) -> float:
    """Return the largest difference in units of its bound."""
    shares = [((ours[name] - other[name]).abs() / bounds[name]).nan_to_num(0) for name in ours]
    return max(float(each.max()) for each in shares)


def test_exact_arithmetic_is_within_the_bounds() -> None:
    ours, bounds = bounded()
    exact = train(copy.deepcopy(start()).double())
    assert 0 < share(ours, exact, bounds) <= 1
    assert all(float(bound.median()) < 1e-5 for bound in bounds.values())


@pytest.mark.parametrize(
    "options", [{"lr": 2.002e-3}, {"eps": 1e-6}, {"betas": (0.9, 0.99)}, {"weight_decay": 0.01}], ids=str
)
def test_another_training_is_outside(options: dict[str, Any]) -> None:
    ours, bounds = bounded()
    assert share(ours, train(start(), **options), bounds) > 1


def test_a_row_without_gradient_is_not_allowed_to_move() -> None:
    ours, bounds = bounded()
    assert torch.equal(ours["0.weight"][UNSEEN], start().state_dict()["0.weight"][UNSEEN].double())
    assert (bounds["0.weight"][UNSEEN] == 0).all() and (bounds["0.weight"][:UNSEEN] > 0).all()


def test_the_rounding_of_a_gradient_counts_terms_of_sums() -> None:
    terms = (WIDTH + WIDTH) + (WIDTH + 5) + NUM_TOKENS
    assert gradient_rounding(start(), NUM_TOKENS) == pytest.approx(UNIT_ROUNDOFF * terms**0.5)


def test_no_gradients_give_a_larger_update() -> None:
    assert update_limit((0.9, 0.999), 1) == pytest.approx(1.0)
    generator = torch.Generator().manual_seed(0)
    for step in (2, 5):
        limit = update_limit((0.9, 0.999), step)
        parameter = nn.Parameter(torch.zeros(1000, dtype=torch.float64))
        optimizer = torch.optim.AdamW([parameter], lr=1.0, betas=(0.9, 0.999), eps=0.0, weight_decay=0.0)
        moved = torch.zeros(1000, dtype=torch.float64)
        for _ in range(step):
            parameter.grad = torch.rand(1000, generator=generator, dtype=torch.float64) - 0.2
            before = parameter.detach().clone()
            optimizer.step()
            moved = (parameter.detach() - before).abs()
        assert float(moved.max()) <= limit < 1.1
