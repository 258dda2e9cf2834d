"""The order of a mixture: each epoch draws its rows from every source, and any other order lays them out.

weights --> rows of this epoch --make(rows)--> RandomSampler, ImageGroupedSampler, ... over those rows
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from llava.data.mixture import Shares
from llava.data.samplers import Step, StepSampler, epoch_generator


class MixtureSampler(StepSampler):
    """Draws `weight` passes over the rows of each source an epoch.

    A whole number of passes takes every row so often; what is left of the weight takes the next rows of a random
    order, so that four epochs of weight 0.25 see each row once.

    Args:
        shares: the source of each row, and the weights.
        sequences_per_step: rows per optimiser step and rank.
        make: the order of one epoch's rows, given their numbers; it counts its rows by their place in that list.
        rank: this process.
        world_size: number of processes.
        seed: with the epoch it decides the order.
    """

    def __init__(
        self,
        shares: Shares,
        sequences_per_step: int,
        *,
        make: Callable[[Sequence[int]], StepSampler],
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ) -> None:
        self.make = make
        self.weights = shares.weights
        self._rows: list[list[int]] = [[] for _ in shares.names]
        for row, source in enumerate(shares.of_row):
            self._rows[source].append(row)
        num_rows = sum(sum(self._counts(source)) for source in range(len(self._rows)))
        super().__init__(num_rows, sequences_per_step, rank=rank, world_size=world_size, seed=seed)

    def plan(self, generator: torch.Generator) -> Iterator[Step]:
        """Yield the steps of the rows that are drawn for this epoch."""
        rows = [row for source in range(len(self._rows)) for row in self._draw(source)]
        for step in self.make(rows).plan(generator):
            yield [[rows[place] for place in part] for part in step]

    def _counts(self, source: int) -> tuple[int, int]:
        """Rows of a source in whole passes, and in the part of a pass that is left."""
        size, weight = len(self._rows[source]), self.weights[source]
        passes = int(weight)
        least = 0 if passes or not size else 1  # no source is left out
        return passes * size, max(least, round((weight - passes) * size))

    def _draw(self, source: int) -> list[int]:
        members = self._rows[source]
        if not members:
            return []
        whole, part = self._counts(source)
        drawn = members * (whole // len(members))
        place, end = self.epoch * part, (self.epoch + 1) * part
        while place < end:  # places of the endless order of a source: one random pass after the other
            cycle, index = divmod(place, len(members))
            order = self._permutation(len(members), epoch_generator(self.seed, -1 - cycle * len(self._rows) - source))
            taken = order[index : index + end - place]
            drawn += [members[member] for member in taken]
            place += len(taken)
        return drawn
