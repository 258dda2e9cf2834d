"""Loaders that yield one batch per optimizer step, from a dataset or from a resumable stream.

    StepSampler -> row numbers -> Encoded... -> Collator -> StepBatch
    MixtureStream -> StreamedRow -> Encoded... -> Collator -> StreamedStep (rows, and the reader position after them)

Each worker of each rank is a separate reader. A step carries the position after it; the loader keeps the last position
of every worker and saves them with a checkpoint, from which a resumed run restores them.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from llava.data.collator import Collator, NumberedRow, RowData, StepBatch
from llava.data.dataset import RowDataset, StreamDataset
from llava.data.quarantine import NUM_SHOWN, BadRow, GrowingQuarantine
from llava.data.samplers import StepSampler
from llava.data.streaming import WINDOW, MixturePosition, MixtureStream, StreamedRow
from llava.errors import ConfigError, DataError, EmptyAnswerError
from llava.samples import Origin
from llava.utils.jsonl import write_json

logger = logging.getLogger(__name__)


class Loader(Protocol):
    """Source of optimizer steps, as the trainer sees it.

    Attributes:
        resumes_itself: whether `restore` continues after the last trained step; otherwise the trainer skips the steps
            that were trained before.
        num_bad: number of unusable rows that were skipped so far.
    """

    resumes_itself: bool
    num_bad: int

    def __iter__(self) -> Iterator[Any]:
        """Yield one `StepBatch` per optimizer step of this rank."""
        ...

    def __len__(self) -> int:
        """Return the number of steps of an epoch; raises TypeError where it is not known."""
        ...

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass."""
        ...

    def save(self, folder: Path) -> None:
        """Write the position after the last yielded step into a checkpoint folder."""
        ...

    def restore(self, folder: Path) -> None:
        """Continue from the position in a checkpoint folder."""
        ...


@dataclass(frozen=True, slots=True)
class _Place:
    """Row of a step: its number, its epoch, and whether this rank trains on it.

    Workers do not know the epoch otherwise.
    """

    row: int
    epoch: int
    is_own: bool = True


class _InEpoch(torch.utils.data.Sampler[list[_Place]]):
    """Sampler of the rows of a step.

    First the rows of this rank, then (`whole`) those of the following ranks, cyclically.
    """

    def __init__(self, sampler: StepSampler, *, whole: bool) -> None:
        self.sampler = sampler
        self.whole = whole

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[_Place]]:
        epoch, rank = self.sampler.epoch, self.sampler.rank
        for step in self.sampler.whole_steps():
            own = [_Place(row, epoch) for row in step[rank]]
            others = itertools.chain(*step[rank + 1 :], *step[:rank]) if self.whole else ()
            yield own + [_Place(row, epoch, is_own=False) for row in others]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass; after a resume within an epoch the trainer knows this sampler only."""
        self.sampler.set_epoch(epoch)


class _Numbered(torch.utils.data.Dataset["NumberedRow"]):
    """Dataset of `(row number, data row)` pairs, by place; rows of other ranks are not read."""

    def __init__(self, dataset: RowData) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: _Place) -> NumberedRow:
        if not place.is_own:
            return place.row, None
        if isinstance(self.dataset, RowDataset):
            return place.row, self.dataset.in_epoch(place.row, place.epoch)
        return place.row, self.dataset[place.row]


def outlive_signals(worker: int) -> None:
    """Ignore signals to the whole job in a worker process, so that only its parent ends it."""
    # Otherwise SIGTERM would end the workers of a run that is about to save a checkpoint, and Ctrl-C print a traceback
    # for each of them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_by_parent, args=(os.getppid(),), daemon=True).start()


def _end_by_parent(parent: int) -> None:
    """End this process on a SIGTERM of its parent, which waits for it; ignore others."""
    while True:
        sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
        if sender == parent or os.getppid() != parent:
            os._exit(0)


class StepLoader(DataLoader[StepBatch]):
    """Loader that yields one `StepBatch` per optimizer step.

    Args:
        sampler: yields the row numbers of each step.
        collator: lays out the rows of a step.
        num_workers: number of loading processes; 0 loads in this process.
        prefetch_factor: number of steps that each worker prepares ahead; None uses the default of torch.
        persistent_workers: keep the workers between epochs.
        seed: seed of the workers.
    """

    resumes_itself = False
    num_bad = 0

    def __init__(
        self,
        sampler: StepSampler,
        collator: Collator,
        *,
        num_workers: int = 0,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator()
        generator.manual_seed(seed)
        super().__init__(
            _Numbered(collator.dataset),  # type: ignore[arg-type]
            batch_sampler=_InEpoch(sampler, whole=collator.complete is not None),
            collate_fn=collator,
            num_workers=num_workers,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers and num_workers > 0,
            worker_init_fn=outlive_signals,
            generator=generator,  # separate, so that loading does not change the model's random state
        )

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass; called by the trainer."""
        steps = self.batch_sampler
        assert isinstance(steps, _InEpoch)
        steps.set_epoch(epoch)

    def save(self, folder: Path) -> None:
        """Do nothing: seed, epoch and number of steps determine the position."""

    def restore(self, folder: Path) -> None:
        """Do nothing: the trainer skips the steps that were trained before."""


MAX_BAD_IN_A_ROW = 1000
"""After this number of consecutive unusable rows training stops: an image folder or a decoder is probably missing."""

POSITION_FILE = "stream_position-{}.json"
"""File in a checkpoint folder with the positions of the readers of one rank."""


@dataclass(frozen=True, slots=True)
class StreamedStep(StepBatch):
    """Step with the stream position of its reader after it.

    Attributes:
        worker: index of the worker, among those of the rank, that made the step.
        position: position of that worker's stream.
        bad: rows that were skipped.
    """

    worker: int = 0
    position: MixturePosition | None = None
    bad: tuple[BadRow, ...] = ()


class _Steps(IterableDataset["StreamedStep | DataError"]):
    """Endless steps of one reader; an error is yielded as the last item."""

    def __init__(
        self,
        dataset: StreamDataset,
        collator: Collator,
        size: int,
        *,
        ranks: tuple[int, int],
        seed: int,
        skip_bad: bool,
    ) -> None:
        self.dataset, self.collator, self.size = dataset, collator, size
        self.seed, self.skip_bad = seed, skip_bad
        self.rank, self.world_size = ranks
        self.starts: list[MixturePosition | None] = []
        self.first = 0
        """Index of the worker that yields the first step."""

    def __iter__(self) -> Iterator[StreamedStep | DataError]:
        try:
            yield from self._steps()
        except DataError as error:
            yield error  # raised in the main process; in a worker, torch would add its traceback to the message

    def _steps(self) -> Iterator[StreamedStep]:
        info = get_worker_info()
        num_workers = info.num_workers if info else 1
        worker = ((info.id if info else 0) + self.first) % num_workers
        stream = MixtureStream(
            self.dataset.sources,
            reader=self.rank * num_workers + worker,
            num_readers=self.world_size * num_workers,
            seed=self.seed,
            window=WINDOW,
        )
        numbered: list[NumberedRow] = []
        bad: list[BadRow] = []
        in_a_row = 0
        for row, position in stream.rows(self.starts[worker] if self.starts else None):
            try:
                numbered.append((sum(position.counts) - 1, self.dataset.encode(row)))
            except DataError as error:
                if not self.skip_bad and not isinstance(error, EmptyAnswerError):
                    raise
                bad.append(_bad_row(row, error))
                in_a_row += 1
                if in_a_row == MAX_BAD_IN_A_ROW:
                    raise DataError(f"{in_a_row} consecutive rows cannot be used; the last: {error}") from error
                continue
            in_a_row = 0
            if len(numbered) == self.size:
                step = self.collator(numbered)
                named = {field.name: getattr(step, field.name) for field in fields(step)}
                yield StreamedStep(**named, worker=worker, position=position, bad=tuple(bad))
                numbered, bad = [], []


def _bad_row(found: StreamedRow, error: DataError) -> BadRow:
    """Return the quarantine entry of a row; its reason does not repeat file and row."""
    origin = Origin(str(found.shard), found.number)
    value = {} if isinstance(found.row, DataError) else found.row.value
    return BadRow(*origin, str(value.get("id", "")), str(error).removeprefix(f"{origin}: "))


class StreamLoader(DataLoader["StreamedStep | DataError"]):
    """Endless loader that yields one `StreamedStep` per optimizer step.

    Args:
        dataset: encodes the rows.
        collator: lays out the rows of a step.
        sequences_per_step: number of rows per optimizer step and rank.
        rank: rank of this process.
        world_size: number of processes.
        num_workers: number of reading processes of this rank; 0 reads in this process.
        prefetch_factor: number of steps that each worker prepares ahead; None uses the default of torch.
        seed: seed of the row order.
        quarantine: list of unusable rows, which are then skipped; None raises at the first one. Rows with empty answers
            only are skipped in either case.
    """

    resumes_itself = True

    def __init__(
        self,
        dataset: StreamDataset,
        collator: Collator,
        *,
        sequences_per_step: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        prefetch_factor: int | None = None,
        seed: int = 0,
        quarantine: GrowingQuarantine | None = None,
    ) -> None:
        ranks, skip_bad = (rank, world_size), quarantine is not None
        self.steps = _Steps(dataset, collator, sequences_per_step, ranks=ranks, seed=seed, skip_bad=skip_bad)
        self.rank, self.world_size = rank, world_size
        self.positions: list[MixturePosition | None] = [None] * max(1, num_workers)
        self.next_worker = 0
        self.num_bad = 0
        """Number of rows skipped so far, counting repeated reads."""
        self._quarantine = quarantine
        self._is_resumed = False
        super().__init__(
            self.steps,
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=prefetch_factor,
            worker_init_fn=outlive_signals,
        )

    def __iter__(self) -> Any:
        """Yield steps; workers alternate, starting with the one that is next."""
        self.steps.starts, self.steps.first = list(self.positions), self.next_worker
        if self._quarantine is not None and not self._is_resumed:
            self._quarantine.begin()
        self._is_resumed = True
        for step in super().__iter__():
            if isinstance(step, DataError):
                raise step
            self.positions[step.worker] = step.position
            self.next_worker = (step.worker + 1) % len(self.positions)
            self._record_bad(step.bad)
            yield step

    def _record_bad(self, rows: Sequence[BadRow]) -> None:
        """Count and list skipped rows, and log the first ones of a run."""
        if self._quarantine is not None:
            self._quarantine.add(rows)
        for row in rows[: max(0, NUM_SHOWN - self.num_bad)]:
            logger.warning("skipped: %s", row)
        if self.num_bad <= NUM_SHOWN < self.num_bad + len(rows):
            where = "" if self._quarantine is None else f"; see {self._quarantine.path}"
            logger.warning("further skipped rows are not logged%s", where)
        self.num_bad += len(rows)

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: streams have no epochs."""

    def save(self, folder: Path) -> None:
        """Write the reader positions of this rank into a checkpoint folder."""
        content = {
            "ranks": self.world_size,
            "workers": len(self.positions),
            "next_worker": self.next_worker,
            "num_bad": self.num_bad,
            "positions": [None if position is None else asdict(position) for position in self.positions],
        }
        write_json(folder / POSITION_FILE.format(self.rank), content)

    def restore(self, folder: Path) -> None:
        """Restore the reader positions that `save` wrote.

        Raises:
            ConfigError: the file is missing or broken, or was written with another number of ranks or workers.
        """
        path = folder / POSITION_FILE.format(self.rank)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            had = (content["ranks"], content["workers"])
            positions = [None if part is None else MixturePosition.from_json(part) for part in content["positions"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} does not hold the position of a stream ({error}); restart training from the beginning"
            ) from error
        if had != (self.world_size, len(self.positions)):
            raise ConfigError(
                f"{folder} was written by {had[0]} ranks with {had[1]} reading processes each, but this run has "
                f"{self.world_size} with {len(self.positions)}; resume a stream with the same numbers"
            )
        self.positions, self.next_worker, self.num_bad = positions, content["next_worker"], content["num_bad"]
        self._is_resumed = True
        if self._quarantine is not None:
            self._quarantine.resume()
