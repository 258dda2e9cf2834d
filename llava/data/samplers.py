"""Samplers: the rows that each rank trains on in each optimizer step.

Every sampler lays the rows of an epoch out as steps of `sequences_per_step x world_size` rows and yields, for each
step, the row numbers of its own rank. All ranks compute the same plan from `(seed, epoch)` without communication:

- every row is drawn exactly once per epoch, over all ranks together;
- every rank yields the same number of lists; in a short last step lists are shorter, or empty, but still yielded;
- a loader must therefore not split them over ranks again.

With the same seed and the same `world_size x sequences_per_step`, steps have the same rows on any number of ranks
(grouped by image: unless a group has to be split differently), so training can resume on another number of ranks.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import pairwise

import torch
from torch.utils.data import Sampler

from llava.data.mixture import Shares
from llava.errors import ConfigError

Step = list[list[int]]
"""The rows of one optimizer step: one list per rank."""


class StepSampler(Sampler[list[int]], ABC):
    """Base class of samplers, which yield the rows of this rank for each optimizer step.

    Args:
        num_rows: number of rows of the dataset.
        sequences_per_step: number of rows per optimizer step and rank (batch size times accumulation steps).
        rank: rank of this process, 0 to `world_size - 1`.
        world_size: number of processes.
        seed: seed of the order, together with the epoch.

    Raises:
        ConfigError: a count is out of range.
    """

    def __init__(
        self, num_rows: int, sequences_per_step: int, *, rank: int = 0, world_size: int = 1, seed: int = 0
    ) -> None:
        if num_rows < 1:
            raise ConfigError("there are no rows to train on; expected at least one")
        if sequences_per_step < 1:
            raise ConfigError(f"sequences_per_step must be at least 1, got {sequences_per_step}")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank must be from 0 to {world_size - 1} with {world_size} ranks, got {rank}")
        self.num_rows = num_rows
        self.sequences_per_step = sequences_per_step
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.epoch = 0
        self.start_step = 0

    @abstractmethod
    def plan(self, generator: torch.Generator) -> Iterator[Step]:
        """Yield the steps of one epoch for all ranks; `generator` is the only source of randomness."""

    def set_epoch(self, epoch: int, *, start_step: int = 0) -> None:
        """Set the epoch of the next iteration, and the number of its steps that are already done."""
        if not 0 <= start_step <= len(self):
            raise ConfigError(f"start_step must be from 0 to {len(self)}, got {start_step}")
        self.epoch = epoch
        self.start_step = start_step

    def __len__(self) -> int:
        """Return the number of steps of a whole epoch, equal on every rank."""
        return math.ceil(self.num_rows / (self.sequences_per_step * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.whole_steps():
            yield step[self.rank]

    def whole_steps(self) -> Iterator[Step]:
        """Yield the rows of all ranks for each step that is not yet done."""
        for number, step in enumerate(self.plan(epoch_generator(self.seed, self.epoch))):
            if number >= self.start_step:
                yield step

    def _permutation(self, size: int, generator: torch.Generator) -> list[int]:
        order: list[int] = torch.randperm(size, generator=generator).tolist()
        return order

    def _cut(self, order: Sequence[int], share: Callable[[Sequence[int]], Step]) -> Iterator[Step]:
        """Cut an order of rows into steps and distribute each over the ranks."""
        size = self.sequences_per_step * self.world_size
        for start in range(0, len(order), size):
            yield share(order[start : start + size])

    def _share_evenly(self, rows: Sequence[int]) -> Step:
        """Return an equal run of the rows for each rank; the first ranks get one more of the remainder."""
        small, extra = divmod(len(rows), self.world_size)
        bounds = [rank * small + min(rank, extra) for rank in range(self.world_size + 1)]
        return [list(rows[start:stop]) for start, stop in pairwise(bounds)]


class SequentialSampler(StepSampler):
    """Sampler in file order, for evaluation and comparisons."""

    def plan(self, generator: torch.Generator) -> Iterator[Step]:
        """Yield steps in file order."""
        return self._cut(range(self.num_rows), self._share_evenly)


class RandomSampler(StepSampler):
    """Sampler with a new random order in every epoch."""

    def plan(self, generator: torch.Generator) -> Iterator[Step]:
        """Yield steps of a permutation of all rows."""
        return self._cut(self._permutation(self.num_rows, generator), self._share_evenly)


class LengthGroupedSampler(StepSampler):
    """Sampler of random steps whose rows are distributed over the ranks by length.

    All ranks get nearly the same total length. This is the published length-grouped order: it groups by length only
    inside a step (one "megabatch"), to balance the padding of micro-batches and the load of the ranks. Without padding
    only the load is balanced.

    Args:
        lengths: length of each row in any unit; the sign is ignored.
        sequences_per_step: number of rows per optimizer step and rank.
        rank: rank of this process.
        world_size: number of processes.
        seed: seed of the order, together with the epoch.
    """

    def __init__(
        self, lengths: Sequence[int], sequences_per_step: int, *, rank: int = 0, world_size: int = 1, seed: int = 0
    ) -> None:
        super().__init__(len(lengths), sequences_per_step, rank=rank, world_size=world_size, seed=seed)
        self.lengths = [abs(length) for length in lengths]

    def plan(self, generator: torch.Generator) -> Iterator[Step]:
        """Yield steps of a permutation, each balanced over the ranks."""
        return self._cut(self._permutation(self.num_rows, generator), self._share_by_length)

    def _share_by_length(self, rows: Sequence[int]) -> Step:
        """Assign rows, longest first, to the rank with the smallest total length that still has room."""
        room = [len(part) for part in self._share_evenly(rows)]
        step: Step = [[] for _ in room]
        total = [0] * self.world_size
        for row in sorted(rows, key=lambda row: (-self.lengths[row], row)):
            rank = min((r for r in range(self.world_size) if len(step[r]) < room[r]), key=lambda r: (total[r], r))
            step[rank].append(row)
            total[rank] += self.lengths[row]
        return step


class ModalityGroupedSampler(LengthGroupedSampler):
    """Sampler of random steps of only image rows or only text rows; mixed remainders are last.

    As published: each kind is permuted and cut into steps, the last step of either kind is set aside, the others are
    shuffled, and the rows set aside follow in file order. Rows of one kind only give the length-grouped order.

    Args:
        lengths: length of each row, negative for a row without an image.
        sequences_per_step: number of rows per optimizer step and rank.
        rank: rank of this process.
        world_size: number of processes.
        seed: seed of the order, together with the epoch.
    """

    def __init__(
        self, lengths: Sequence[int], sequences_per_step: int, *, rank: int = 0, world_size: int = 1, seed: int = 0
    ) -> None:
        super().__init__(lengths, sequences_per_step, rank=rank, world_size=world_size, seed=seed)
        self._with_image = [row for row, length in enumerate(lengths) if length >= 0]
        self._text_only = [row for row, length in enumerate(lengths) if length < 0]

    def plan(self, generator: torch.Generator) -> Iterator[Step]:
        """Yield the steps of a single kind, then the mixed remainders."""
        if not self._with_image or not self._text_only:
            yield from super().plan(generator)
            return
        size = self.sequences_per_step * self.world_size
        steps: list[list[int]] = []
        rest: list[int] = []
        for kind in (self._with_image, self._text_only):
            order = [kind[place] for place in self._permutation(len(kind), generator)]
            cut = [order[start : start + size] for start in range(0, len(order), size)]
            steps += cut[:-1]
            rest += cut[-1]
        for place in self._permutation(len(steps), generator):
            yield self._share_by_length(steps[place])
        yield from self._cut(sorted(rest), self._share_by_length)


class ImageGroupedSampler(StepSampler):
    """Sampler that draws images, then up to `questions_per_image` rows of each.

    The rows of an image are shuffled and cut into groups, which are drawn in random order to fill the steps of each
    rank. The rows of a group are on one rank in one step, where they can share images and prefix. A group is split only
    where no remaining group fits a gap: `sequences_per_step` is never exceeded.

    Args:
        groups: for each row, the identity of what it can share (its images); None for a row that shares nothing.
        sequences_per_step: number of rows per optimizer step and rank.
        questions_per_image: largest number of rows of one image that are drawn together.
        rank: rank of this process.
        world_size: number of processes.
        seed: seed of the order, together with the epoch.

    Raises:
        ConfigError: `questions_per_image` is below 1.
    """

    def __init__(
        self,
        groups: Sequence[Hashable | None],
        sequences_per_step: int,
        *,
        questions_per_image: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(len(groups), sequences_per_step, rank=rank, world_size=world_size, seed=seed)
        if questions_per_image < 1:
            raise ConfigError(f"questions_per_image must be at least 1, got {questions_per_image}")
        self.questions_per_image = min(questions_per_image, sequences_per_step)
        members: dict[Hashable, list[int]] = {}
        for row, group in enumerate(groups):
            # A row without an image is its own group; the tuple cannot equal an identity given by the caller.
            members.setdefault((row, None) if group is None else (None, group), []).append(row)
        self._members = list(members.values())

    def plan(self, generator: torch.Generator) -> Iterator[Step]:
        """Yield steps filled with groups."""
        waiting = self._draw(generator)
        left = self.num_rows
        while left:
            num = min(left, self.sequences_per_step * self.world_size)
            sizes = [len(part) for part in self._share_evenly(range(num))]
            yield [_fill(waiting, size) for size in sizes]
            left -= num

    def _draw(self, generator: torch.Generator) -> list[deque[tuple[int, list[int]]]]:
        """Return the groups by size, each size in drawing order, with the place of the group in that order."""
        groups: list[list[int]] = []
        for rows in self._members:
            shuffled = [rows[place] for place in self._permutation(len(rows), generator)] if len(rows) > 1 else rows
            groups += [
                shuffled[start : start + self.questions_per_image]
                for start in range(0, len(shuffled), self.questions_per_image)
            ]
        waiting: list[deque[tuple[int, list[int]]]] = [deque() for _ in range(self.questions_per_image + 1)]
        for place, number in enumerate(self._permutation(len(groups), generator)):
            waiting[len(groups[number])].append((place, groups[number]))
        return waiting


def _fill(waiting: list[deque[tuple[int, list[int]]]], size: int) -> list[int]:
    """Take `size` rows from the waiting groups: the earliest that fits, or else a part of the earliest."""
    rows: list[int] = []
    while len(rows) < size:
        room = size - len(rows)
        fitting = [queue for queue in waiting[: room + 1] if queue]
        queue = min(fitting or [queue for queue in waiting if queue], key=lambda queue: queue[0][0])
        place, group = queue.popleft()
        rows += group[:room]
        if len(group) > room:
            _put_back(waiting[len(group) - room], place, group[room:])
    return rows


def _put_back(queue: deque[tuple[int, list[int]]], place: int, group: list[int]) -> None:
    """Insert the rest of a split group at its place in drawing order, which is at or near the front."""
    at = next((index for index, (other, _) in enumerate(queue) if other > place), len(queue))
    queue.insert(at, (place, group))


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Return the random generator of one epoch."""
    # A hash, because `seed + epoch` would give the same order for different pairs of seed and epoch.
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


class MixtureSampler(StepSampler):
    """Sampler that draws `weight` passes over the rows of each source per epoch.

    The whole part of a weight draws every row that often; the fraction draws the next rows of a random order, so that
    four epochs of weight 0.25 see each row once.

    Args:
        shares: source of each row, and the weights.
        sequences_per_step: number of rows per optimizer step and rank.
        make: returns the sampler of one epoch for a list of row numbers; the sampler yields indices into that list.
        rank: rank of this process.
        world_size: number of processes.
        seed: seed of the order, together with the epoch.
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
        """Return the number of rows of a source in whole passes, and in the fraction of a pass."""
        size, weight = len(self._rows[source]), self.weights[source]
        passes = int(weight)
        least = 0 if passes or not size else 1  # every source is drawn at least once
        return passes * size, max(least, round((weight - passes) * size))

    def _draw(self, source: int) -> list[int]:
        members = self._rows[source]
        if not members:
            return []
        whole, part = self._counts(source)
        drawn = members * (whole // len(members))
        place, end = self.epoch * part, (self.epoch + 1) * part
        while place < end:  # places in the endless order of a source, which consists of random passes
            cycle, index = divmod(place, len(members))
            order = self._permutation(len(members), epoch_generator(self.seed, -1 - cycle * len(self._rows) - source))
            taken = order[index : index + end - place]
            drawn += [members[member] for member in taken]
            place += len(taken)
        return drawn
