"""Training objectives. The trainer depends only on the `Objective` protocol."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from llava.data.flat_batch import FlatBatch


@dataclass(frozen=True, slots=True)
class ObjectiveOutput:
    """Loss of one row (its share of the global loss) and metrics summed over the row."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """Function of a model and one row that returns the share of the row in the global loss."""

    def __call__(self, model: Callable[..., Any], batch: FlatBatch, *, num_items: Tensor) -> ObjectiveOutput:
        """Return the loss; `num_items` is the global sum of edge weights of the optimizer step."""
        ...
