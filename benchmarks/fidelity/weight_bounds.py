"""Bounds on the difference of two float32 runs of one AdamW training for each weight.

gradients of every step --> largest effect of rounding on an update --> sum over the steps = bound of each weight

Two CPUs add the terms of a product in different order, so their gradients differ by rounding. AdamW divides a gradient
by its own running size: a weight with a large gradient hardly changes, a weight whose gradient nearly cancels can move
by up to two learning rates per step. One bound for all weights is thus too strict for a few and too loose for most.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

UNIT_ROUNDOFF = 2.0**-24
"""Largest relative error of one float32 operation."""

UPDATE_OPERATIONS = 8
"""Float32 operations of one AdamW update of a weight: two moments, two corrections, root, sum, quotient, product."""


def gradient_rounding(network: nn.Module, num_tokens: int) -> float:
    """Return the relative rounding error of a gradient of one forward and backward pass.

    A float32 sum of n terms is off by about `u * sqrt(n)` (Higham and Mary, A New Approach to Probabilistic Rounding
    Error Analysis, SIAM J. Sci. Comput. 41(5), 2019). A matrix [out, in] sums `in` terms forward and `out` terms
    backward; the gradient of a weight sums over the tokens. Independent errors add up as the root of their squares.

    Args:
        network: the trained model.
        num_tokens: largest number of tokens per step.
    """
    matrices = [m.weight.flatten(1) for m in network.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return UNIT_ROUNDOFF * math.sqrt(sum(sum(matrix.shape) for matrix in matrices) + num_tokens)


def update_limit(betas: tuple[float, float], step: int) -> float:
    """Return the largest |m| / sqrt(v) of any gradients at a step (from 1), with corrected moments.

    By Cauchy-Schwarz: the root of the sum of a^2 / b over the weights a, b of each step in the two moments.
    """
    first, second = betas
    ages = range(step)
    mean = [(1 - first) * first**age / (1 - first**step) for age in ages]
    square = [(1 - second) * second**age / (1 - second**step) for age in ages]
    return math.sqrt(sum(a * a / b for a, b in zip(mean, square, strict=True)))


@dataclass(slots=True)
class _Weight:
    """State of one parameter: steps, second moment, gradient error, and the bound so far."""

    steps: int
    square: Tensor
    error: Tensor
    bound: Tensor


class WeightBounds(TrainerCallback):
    """Callback that accumulates by how much each weight may differ between two machines.

    With corrected moments m, v of our gradients and m', v' of the other run's, whose gradients differ by at most d:
    |m - m'| <= d and |sqrt(v) - sqrt(v')| <= d, both being averages, so the two updates differ by at most
    `lr * (1 + c) * d / (sqrt(v) + eps)`, and never by more than `2 * c * lr`, with c of `update_limit`.

    Args:
        network: the trained model.
        num_tokens: largest number of tokens per step.
    """

    def __init__(self, network: nn.Module, num_tokens: int) -> None:
        self.names = {parameter: name for name, parameter in network.named_parameters()}
        self.rounding = gradient_rounding(network, num_tokens)
        self._weights: dict[str, _Weight] = {}

    @property
    def bounds(self) -> dict[str, Tensor]:
        """Bound of each updated weight in float64, by name."""
        return {name: weight.bound for name, weight in self._weights.items()}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Add the coming step; gradients are already clipped."""
        stepped = list(_stepped(given["optimizer"]))
        # A gradient whose terms nearly cancel (a bias before a softmax that hardly depends on it) is only as exact as
        # its rounded terms, so its error is at least the last place of the largest gradient.
        floor = UNIT_ROUNDOFF * max(float(gradient.abs().max()) for _, _, gradient in stepped)
        for group, parameter, gradient in stepped:
            name = self.names[parameter]
            if name not in self._weights:
                zero = torch.zeros_like(parameter, dtype=torch.float64)
                self._weights[name] = _Weight(0, zero, zero, zero)
            # The gradient of a row that no token uses is exactly zero.
            size = _row_size(gradient.double())
            rounding = torch.where(size > 0, (self.rounding * size).clamp(min=floor), 0.0)
            self._add(self._weights[name], parameter.detach(), gradient.double(), rounding, group)

    def _add(self, weight: _Weight, value: Tensor, gradient: Tensor, rounding: Tensor, group: dict[str, Any]) -> None:
        rate, beta = group["lr"], group["betas"][1]
        weight.steps += 1
        weight.square = beta * weight.square + (1 - beta) * gradient**2
        size = (weight.square / (1 - beta**weight.steps)).sqrt() + group["eps"]
        # Factor 2, because both runs round. Factor of the step number, because a step's gradient is taken at weights
        # that differ by the roundings of all steps before it.
        weight.error = torch.maximum(weight.error, 2 * weight.steps * rounding)
        limit = update_limit(group["betas"], weight.steps)
        update = rate * ((1 + limit) * weight.error / size).clamp(max=2 * limit)
        # In both runs, the weights and updates are themselves float32.
        stored = 2 * UNIT_ROUNDOFF * (value.abs().double() + UPDATE_OPERATIONS * limit * rate)
        # A row without a gradient so far, such as that of a token that never occurs, does not move.
        weight.bound = weight.bound + torch.where(weight.error > 0, update + stored, 0.0)


def _row_size(gradient: Tensor) -> Tensor:
    """Return the largest entry of each row (gradients of one output), or of the whole vector."""
    rows = tuple(range(1, gradient.dim())) or (0,)
    return gradient.abs().amax(dim=rows, keepdim=True).expand_as(gradient)


def _stepped(optimizer: Any) -> Iterator[tuple[dict[str, Any], nn.Parameter, Tensor]]:
    """Yield group, parameter and gradient of every parameter that a step changes."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                yield group, parameter, parameter.grad
