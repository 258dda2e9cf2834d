"""What is minimised. The trainer never asks which objective it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from llava.data.flat_batch import FlatBatch


@dataclass(frozen=True, slots=True)
class ObjectiveOutput:
    """Loss of one row (its share of the global loss) and numbers to log, summed over the row."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """Turns a model and one row into this row's share of the loss."""

    def __call__(self, model: Callable[..., Any], batch: FlatBatch, *, num_items: Tensor) -> ObjectiveOutput:
        """Return the loss; `num_items` is the global sum of edge weights of the optimiser step."""
        ...
