"""Preference losses against values computed by hand, and their behavior at the ends of the number range."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from llava.errors import ConfigError
from llava.train import preference_losses
from llava.train.preference_losses import PAIR_LOSSES, WITHOUT_REFERENCE, Pairs, kto

LN2 = math.log(2)


def log_s(x: float) -> float:
    """Return log(1 / (1 + exp(-x)))."""
    return -math.log1p(math.exp(-x))


def pair(dtype: torch.dtype = torch.float64, **changed: float) -> Pairs:
    """Return one pair: log-ratios 2 (chosen, 4 tokens), -1 (rejected, 2 tokens) and 0.5 (damaged image)."""
    values = {
        "chosen": -6.0, "rejected": -5.0, "chosen_tokens": 4.0, "rejected_tokens": 2.0, "ref_chosen": -8.0,
        "ref_rejected": -4.0, "negative": -7.0, "ref_negative": -7.5,
    }  # fmt: skip
    return Pairs(**{name: torch.tensor([value], dtype=dtype) for name, value in (values | changed).items()})


def odds(mean: float) -> float:
    return math.exp(mean) / (1 - math.exp(mean))


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("sigmoid", {"beta": 0.5}, -log_s(1.5)),
        ("sigmoid", {"beta": 0.5, "label_smoothing": 0.2}, -0.8 * log_s(1.5) - 0.2 * log_s(-1.5)),
        ("robust", {"beta": 0.5, "label_smoothing": 0.2}, (-0.8 * log_s(1.5) + 0.2 * log_s(-1.5)) / 0.6),
        ("robust", {"beta": 0.5, "label_smoothing": 0.0}, -log_s(1.5)),
        ("hinge", {"beta": 0.1}, 0.7),
        ("hinge", {"beta": 1.0}, 0.0),
        ("ipo", {"beta": 0.25}, (0.5 + 0.5 - 2.0) ** 2),
        ("ipo", {"beta": 0.25, "average": False}, (3.0 - 2.0) ** 2),
        ("sigmoid_norm", {"beta": 2.0}, -log_s(2.0)),
        ("sigmoid_norm", {"beta": 2.0, "label_smoothing": 0.1}, -0.9 * log_s(2.0) - 0.1 * log_s(-2.0)),
        ("simpo", {"beta": 2.0, "gamma": 0.5}, -log_s(2.0 * (-1.5 + 2.5) - 0.5)),
        ("orpo", {"weight": 0.3}, 1.5 - 0.3 * log_s(math.log(odds(-1.5) / odds(-2.5)))),
        ("bco_pair", {"beta": 0.5, "shift": 0.25}, -log_s(1.0 - 0.25) - log_s(0.5 + 0.25)),
        ("mdpo", {"beta": 0.5, "anchor": 0.1}, -log_s(1.5) - log_s(0.75) - log_s(1.0 - 0.1)),
        ("sft", {}, 6.0),
    ],
)
def test_value_by_hand(name: str, settings: dict[str, float], expected: float) -> None:
    assert PAIR_LOSSES[name](pair(), **settings).tolist() == pytest.approx([expected], rel=1e-12)


def leaves(pairs: Pairs) -> list[Tensor]:
    """Return the policy's values, which now require a gradient."""
    found = [pairs.chosen, pairs.rejected, pairs.negative]
    return [tensor.requires_grad_() for tensor in found if tensor is not None]


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_gradient_is_that_of_finite_differences(name: str) -> None:
    base = pair()

    def loss(chosen: Tensor, rejected: Tensor, negative: Tensor) -> Tensor:
        values = {field.name: getattr(base, field.name) for field in fields(base)}
        return PAIR_LOSSES[name](Pairs(**values | {"chosen": chosen, "rejected": rejected, "negative": negative}))

    inputs = [tensor.clone().requires_grad_() for tensor in leaves(base)]
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("difference", [600.0, -600.0])
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_large_differences_are_finite(name: str, difference: float, dtype: torch.dtype) -> None:
    pairs = pair(dtype, chosen=-600.0 + min(difference, 0), rejected=-600.0 - max(difference, 0), ref_chosen=-600.0)
    inputs = leaves(pairs)
    value = PAIR_LOSSES[name](pairs)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    gradients = torch.autograd.grad(value.sum(), inputs, allow_unused=True)
    assert value.isfinite().all() and all(g.isfinite().all() for g in gradients if g is not None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sides", [(0.0, 0.0), (0.0, -1.0), (-1e-9, -1e-9), (-1.0, 0.0)])
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_certain_answers_of_one_token_are_finite(name: str, sides: tuple[float, float], dtype: torch.dtype) -> None:
    pairs = pair(dtype, chosen=sides[0], rejected=sides[1], chosen_tokens=1.0, rejected_tokens=1.0)
    inputs = leaves(pairs)
    value = PAIR_LOSSES[name](pairs)
    gradients = torch.autograd.grad(value.sum(), inputs, allow_unused=True)
    assert value.isfinite().all() and all(g.isfinite().all() for g in gradients if g is not None)


def test_odds_near_certainty_are_exact() -> None:
    pairs = pair(chosen=-1e-6, rejected=-2e-6, chosen_tokens=1.0, rejected_tokens=1.0)
    assert PAIR_LOSSES["orpo"](pairs, weight=1.0).item() == pytest.approx(1e-6 - log_s(LN2), rel=1e-5)


@pytest.mark.parametrize("name", sorted(PAIR_LOSSES.keys() - WITHOUT_REFERENCE))
def test_a_missing_reference_is_an_error(name: str) -> None:
    ones = torch.ones(1)
    with pytest.raises(ConfigError, match="--ref-mode"):
        PAIR_LOSSES[name](Pairs(-ones, -ones, ones, ones, negative=-ones))


def test_mdpo_needs_a_damaged_image() -> None:
    ones = torch.ones(1)
    with pytest.raises(ConfigError, match="--image-negative"):
        preference_losses.mdpo(Pairs(-ones, -ones, ones, ones, -ones, -ones))


@pytest.mark.parametrize("label_smoothing", [0.5, 0.9])
def test_robust_needs_fewer_wrong_labels_than_right_ones(label_smoothing: float) -> None:
    with pytest.raises(ConfigError, match=r"less than 0\.5"):
        preference_losses.robust(pair(), label_smoothing=label_smoothing)


def test_at_the_reference_the_loss_is_log_2() -> None:
    pairs = pair(chosen=-8.0, rejected=-4.0)
    assert preference_losses.sigmoid(pairs, beta=0.1).item() == pytest.approx(LN2, rel=1e-15)


def test_kto_by_hand() -> None:
    logps, reference = torch.tensor([-3.0, -3.0]).double(), torch.tensor([-5.0, -2.0]).double()
    desirable, kl = torch.tensor([True, False]), torch.tensor(0.5).double()
    found = kto(logps, reference, desirable, kl, beta=0.4, desirable_weight=1.5, undesirable_weight=0.5)
    assert found.tolist() == pytest.approx([1.5 * math.exp(log_s(-0.6)), 0.5 * math.exp(log_s(-0.6))], rel=1e-12)


def test_kto_has_no_gradient_through_the_divergence() -> None:
    kl = torch.tensor(0.5, requires_grad=True)
    logps = torch.tensor([-3.0], requires_grad=True)
    kto(logps, torch.tensor([-5.0]), torch.tensor([True]), kl, beta=0.4).sum().backward()
    assert kl.grad is None and logps.grad is not None and logps.grad.item() < 0


def test_kto_takes_a_negative_estimate_as_zero() -> None:
    ones = torch.ones(1)
    arguments = (-ones, -2 * ones, torch.tensor([True]))
    assert torch.equal(kto(*arguments, torch.tensor(-3.0), beta=1.0), kto(*arguments, torch.tensor(0.0), beta=1.0))
