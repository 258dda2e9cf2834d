"""Counts of units and tokens, and sums of metrics, between two logs of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from llava.data.collator import StepBatch


@dataclass(slots=True)
class TrainingCounts:
    """Numbers of units and tokens, and sums of metrics, since the last log."""

    units: int = 0
    supervised: float = 0.0
    tokens: int = 0
    unshared: int = 0
    skipped: int = 0
    """Skipped rows of a stream, since the start of the run."""

    metrics: dict[str, Tensor] = field(default_factory=dict)
    """[2] float64 sum and count of each metric."""

    def add(self, step: StepBatch) -> None:
        """Add one step of this rank."""
        self.units += len(step.units)
        self.supervised += step.num_edges
        self.tokens += step.num_tokens
        self.unshared += step.num_unshared_tokens

    def add_metrics(self, metrics: Mapping[str, Tensor]) -> None:
        """Add sums and counts [2] of named metrics."""
        for name, pair in metrics.items():
            self.metrics[name] = pair.double().cpu() + self.metrics.get(name, 0.0)

    def clear(self) -> None:
        """Set all counts to zero."""
        self.units, self.supervised, self.tokens, self.unshared, self.skipped = 0, 0.0, 0, 0, 0
        self.metrics = {}

    def over_ranks(self, device: torch.device, metric_names: Sequence[str] = ()) -> TrainingCounts:
        """Return the sums over all ranks; every rank gives the same names of metrics."""
        absent = torch.zeros(2, dtype=torch.float64)
        counted = [self.units, self.supervised, self.tokens, self.unshared, self.skipped]
        pairs = [self.metrics.get(name, absent) for name in metric_names]
        numbers = torch.cat([torch.tensor(counted, dtype=torch.float64), *pairs])
        if dist.is_initialized():
            numbers = numbers.to(device)
            dist.all_reduce(numbers)
        units, supervised, tokens, unshared, skipped = numbers[:5].tolist()
        sums = dict(zip(metric_names, numbers[5:].cpu().view(-1, 2), strict=True))
        return TrainingCounts(int(units), supervised, int(tokens), int(unshared), int(skipped), sums)

    def means(self) -> dict[str, float]:
        """Return the mean of each metric with a count."""
        pairs = {name: pair.tolist() for name, pair in self.metrics.items()}
        return {name: round(total / count, 6) for name, (total, count) in pairs.items() if count}
