"""Which rows each rank trains on in each optimizer step.

Every sampler lays the rows of an epoch out as steps of `sequences_per_step x world_size` rows and yields, step by step,
THIS rank's list of row numbers. All ranks compute the same plan from `(seed, epoch)`, so nothing is communicated:

- every row is drawn exactly once an epoch, over all ranks together;
- every rank yields the same number of lists; in a short last step lists are shorter, or empty, but still yielded;
- the loader must therefore not be split over ranks again by anyone else.

The same seed with `world_size x sequences_per_step` unchanged gives the same rows per step on any number of ranks
(grouped by image: as long as no group has to be cut differently), which is what makes a resume on other ranks possible.
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
    """Base of all samplers: yields this rank's rows of one optimizer step after the other.

    Args:
        num_rows: rows of the data set.
        sequences_per_step: rows per optimizer step and rank (batch size times accumulation steps).
        rank: this process, 0 to `world_size - 1`.
        world_size: number of processes.
        seed: with the epoch it decides the order.

    Raises:
        ConfigError: a count is out of range.
    """

    def __init__(
        self, num_rows: int, sequences_per_step: int, *, rank: int = 0, world_size: int = 1, seed: int = 0
    ) -> None:
        if num_rows < 1:
            raise ConfigError("there are no rows to train on")
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
        """Yield the steps of one epoch for all ranks; the only randomness is the generator's."""

    def set_epoch(self, epoch: int, *, start_step: int = 0) -> None:
        """Choose the epoch that the next iteration yields, and how many of its steps were done before."""
        if not 0 <= start_step <= len(self):
            raise ConfigError(f"start_step must be from 0 to {len(self)}, got {start_step}")
        self.epoch = epoch
        self.start_step = start_step

    def __len__(self) -> int:
        """Return the number of steps of a whole epoch, the same on every rank."""
        return math.ceil(self.num_rows / (self.sequences_per_step * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        for number, step in enumerate(self.plan(epoch_generator(self.seed, self.epoch))):
            if number >= self.start_step:
                yield step[self.rank]

    def _permutation(self, size: int, generator: torch.Generator) -> list[int]:
        order: list[int] = torch.randperm(size, generator=generator).tolist()
        return order

    def _cut(self, order: Sequence[int], share: Callable[[Sequence[int]], Step]) -> Iterator[Step]:
        """Cut an order of rows into steps and share each out over the ranks."""
        size = self.sequences_per_step * self.world_size
        for start in range(0, len(order), size):
            yield share(order[start : start + size])

    def _share_evenly(self, rows: Sequence[int]) -> Step:
        """Give each rank an equal run of the rows; where that is not possible the first ranks get one more."""
        small, extra = divmod(len(rows), self.world_size)
        bounds = [rank * small + min(rank, extra) for rank in range(self.world_size + 1)]
        return [list(rows[start:stop]) for start, stop in pairwise(bounds)]


class SequentialSampler(StepSampler):
    """File order, for evaluation and for comparisons."""

    def plan(self, generator: torch.Generator) -> Iterator[Step]:
        """Yield steps in file order."""
        return self._cut(range(self.num_rows), self._share_evenly)


class RandomSampler(StepSampler):
    """A new random order every epoch."""

    def plan(self, generator: torch.Generator) -> Iterator[Step]:
        """Yield steps of a permutation of all rows."""
        return self._cut(self._permutation(self.num_rows, generator), self._share_evenly)


class LengthGroupedSampler(StepSampler):
    """Random steps whose rows are shared out so that all ranks get nearly the same total length.

    This is the published length-grouped order: it groups by length only inside a step (one "megabatch"), to even out
    the padding of its micro-batches and the load of the ranks. Without padding the load is what remains of it.

    Args:
        lengths: length of each row in any unit; only the size matters, not the sign.
        sequences_per_step: rows per optimizer step and rank.
        rank: this process.
        world_size: number of processes.
        seed: with the epoch it decides the order.
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
        """Longest first, each row to the rank that has the least so far and still has room."""
        room = [len(part) for part in self._share_evenly(rows)]
        step: Step = [[] for _ in room]
        total = [0] * self.world_size
        for row in sorted(rows, key=lambda row: (-self.lengths[row], row)):
            rank = min((r for r in range(self.world_size) if len(step[r]) < room[r]), key=lambda r: (total[r], r))
            step[rank].append(row)
            total[rank] += self.lengths[row]
        return step


class ModalityGroupedSampler(LengthGroupedSampler):
    """Steps of rows with images only or of text only, in random order; what is left of both kinds comes last.

    As published: each kind is permuted and cut into steps, the last step of either kind is set aside, the others are
    shuffled, and the rows set aside follow in file order. Rows of one kind only give the length-grouped order.

    Args:
        lengths: length of each row, negative for a row without an image.
        sequences_per_step: rows per optimizer step and rank.
        rank: this process.
        world_size: number of processes.
        seed: with the epoch it decides the order.
    """

    def __init__(
        self, lengths: Sequence[int], sequences_per_step: int, *, rank: int = 0, world_size: int = 1, seed: int = 0
    ) -> None:
        super().__init__(lengths, sequences_per_step, rank=rank, world_size=world_size, seed=seed)
        self._with_image = [row for row, length in enumerate(lengths) if length >= 0]
        self._text_only = [row for row, length in enumerate(lengths) if length < 0]

    def plan(self, generator: torch.Generator) -> Iterator[Step]:
        """Yield the steps of one kind each, then the mixed rest."""
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
    """Draws images, then up to `questions_per_image` rows of each, so that rows of one step share their image.

    The rows of an image are shuffled and cut into groups; the groups are drawn in random order and laid into the places
    of each rank and step. Rows of one group land on one rank in one step, where they can share what they have in
    common. A group is split only where nothing that is left fits a gap: `sequences_per_step` is never exceeded.

    Args:
        groups: for each row the identity of what it can share (its images); None for a row that shares nothing.
        sequences_per_step: rows per optimizer step and rank.
        questions_per_image: largest number of rows of one image that are drawn together.
        rank: this process.
        world_size: number of processes.
        seed: with the epoch it decides the order.

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
            # A row without an image is its own group; the tuple cannot equal a caller's identity by accident.
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
        """Return the groups by size, each size in the order of the draw, with the group's place in that order."""
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
    """Take `size` rows off the waiting groups: the earliest that fits, or a part of the earliest where none does."""
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
    """Insert what is left of a split group where the order of the draw wants it: at or near the front."""
    at = next((index for index, (other, _) in enumerate(queue) if other > place), len(queue))
    queue.insert(at, (place, group))


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Return the generator of one epoch; epochs of different seeds never coincide, as `seed + epoch` would."""
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


class MixtureSampler(StepSampler):
    """Draws `weight` passes over the rows of each source an epoch.

    A whole number of passes takes every row so often; what is left of the weight takes the next rows of a random
    order, so that four epochs of weight 0.25 see each row once.

    Args:
        shares: the source of each row, and the weights.
        sequences_per_step: rows per optimizer step and rank.
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
