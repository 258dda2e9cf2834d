"""Training objectives. The trainer depends only on the `Objective` protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from llava.data.flat_batch import FlatBatch


@dataclass(frozen=True, slots=True)
class ObjectiveOutput:
    """Loss and metrics of one row.

    Attributes:
        loss: share of the row in the loss of the step; has a graph.
        metrics: [2] sum and count of each named metric; the trainer adds them over rows and ranks and logs their means.
        sums: [D] detached sums that were divided by the D denominators.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    sums: Tensor | None = None


def divided(sums: Tensor, num_items: Tensor, metrics: Mapping[str, Tensor] | None = None) -> ObjectiveOutput:
    """Return the output of a row whose loss is the sum of `sums` [D] divided by `num_items` [D]."""
    return ObjectiveOutput((sums / num_items).sum(), metrics or {}, sums.detach())


class Objective(Protocol):
    """Function of a model and one row that returns the share of the row in the global loss.

    >>> from llava.train.objectives.sft import SFT
    >>> SFT().denominators
    ('tokens',)

    Attributes:
        denominators: names of what the sums of a step are divided by, for example `("tokens",)` or `("pairs",)`.
        metric_names: names of all metrics that it returns, in the order of their reduction over ranks.
    """

    @property
    def denominators(self) -> tuple[str, ...]: ...

    @property
    def metric_names(self) -> tuple[str, ...]: ...

    def count(self, batch: FlatBatch) -> Tensor:
        """Return a row's share [D] float64 of each denominator, which is summed over the step and all ranks."""
        ...

    def __call__(self, model: Callable[..., Any], batch: FlatBatch, *, num_items: Tensor) -> ObjectiveOutput:
        """Return the loss; `num_items` [D] holds the denominators of the optimizer step."""
        ...


@runtime_checkable
class StepObjective(Protocol):
    """Objective whose losses need sums over all rows of a step, which are computed before the first loss."""

    def step_share(self, model: Callable[..., Any], batch: FlatBatch) -> Tensor:
        """Return the share [K] float64 of a row in the sums, without gradient."""
        ...

    def begin_step(self, sums: Tensor | None) -> None:
        """Take the sums [K] of the step over all ranks; None after the step, for rows outside of one."""
        ...
