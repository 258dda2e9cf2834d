"""Registry of a controller's workers: served models, queue lengths and last reports.

Nothing here waits, reads a clock or opens a connection: time and random numbers are given at construction.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from llava.errors import ConfigError
from llava.utils.jsonl import is_unicode
from llava.utils.lookup import lookup

EXPIRY_SECONDS = 30.0
"""Silence after which a worker with heartbeats is dropped."""

MAX_SPEED = 1e9
"""Largest speed of a worker; larger ones would have no finite sum."""

SMALLEST_SPEED = 1e-4
"""Sum of speeds below which no worker is drawn."""


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """Report of a worker: names of its models, relative speed, and number of requests that it has."""

    model_names: tuple[str, ...]
    speed: float = 1.0
    queue_length: int = 0

    @classmethod
    def of(cls, value: Any) -> WorkerStatus:
        """Return a status from JSON.

        Raises:
            ConfigError: a field is missing or of the wrong type.
        """
        if not isinstance(value, Mapping):
            raise ConfigError(f"worker_status must be an object, got {type(value).__name__}")
        names, speed, length = value.get("model_names"), value.get("speed", 1), value.get("queue_length", 0)
        if not isinstance(names, list) or not all(
            isinstance(name, str) and name and is_unicode(name) for name in names
        ):
            raise ConfigError("worker_status.model_names must be a list of names in Unicode")
        if isinstance(speed, bool) or not isinstance(speed, int | float) or not 0 <= speed <= MAX_SPEED:
            raise ConfigError(f"worker_status.speed must be a number from 0 to {MAX_SPEED:.0f}")
        return cls(tuple(dict.fromkeys(names)), float(speed), queue_length_of(length, "worker_status.queue_length"))

    def as_json(self) -> dict[str, Any]:
        """Return the status as workers and controllers report it."""
        speed = int(self.speed) if self.speed.is_integer() else self.speed
        return {"model_names": list(self.model_names), "speed": speed, "queue_length": self.queue_length}


def queue_length_of(value: Any, name: str) -> int:
    """Return a queue length from JSON.

    Raises:
        ConfigError: it is not an integer of at least 0.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise ConfigError(f"{name} must be an integer of at least 0")
    return value


@dataclass(slots=True)
class _Worker:
    status: WorkerStatus
    checks_heart_beat: bool
    last_beat: float
    queue_length: int = 0

    @property
    def load(self) -> float:
        """Queue length by speed."""
        return self.queue_length / self.status.speed if self.status.speed > 0 else math.inf


def _shortest_queue(workers: Mapping[str, _Worker], draw: random.Random) -> str:
    return min(workers, key=lambda name: workers[name].load)


def _lottery(workers: Mapping[str, _Worker], draw: random.Random) -> str:
    speeds = [worker.status.speed for worker in workers.values()]
    return draw.choices(list(workers), speeds)[0] if sum(speeds) >= SMALLEST_SPEED else ""


DISPATCH: dict[str, Callable[[Mapping[str, _Worker], random.Random], str]] = {
    "lottery": _lottery,
    "shortest_queue": _shortest_queue,
}
"""Choice among the workers of a model, by the value of `--dispatch-method`."""


@dataclass(slots=True)
class Registry:
    """Table of workers.

    Attributes:
        clock: returns seconds, such as `time.monotonic`.
        dispatch: key of `DISPATCH`.
        draw: random numbers of the lottery.
        affinity_slack: requests by which the queue of a preferred worker may be longer than the shortest one.
        expiry_seconds: silence after which a worker with heartbeats is dropped.
    """

    clock: Callable[[], float]
    dispatch: str = "shortest_queue"
    draw: random.Random = field(default_factory=random.Random)
    affinity_slack: int = 4
    expiry_seconds: float = EXPIRY_SECONDS
    _workers: dict[str, _Worker] = field(default_factory=dict)
    _preferred: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lookup(DISPATCH, self.dispatch, "dispatch method")

    def __contains__(self, name: object) -> bool:
        return name in self._workers

    @property
    def names(self) -> list[str]:
        """Names (URLs) of the workers."""
        return list(self._workers)

    def register(self, name: str, status: WorkerStatus, *, check_heart_beat: bool) -> None:
        """Add a worker, or replace what is known of it."""
        self._workers[name] = _Worker(status, check_heart_beat, self.clock(), status.queue_length)

    def checks_heart_beat(self, name: str) -> bool:
        """Return whether a worker sends heartbeats."""
        worker = self._workers.get(name)
        return worker is not None and worker.checks_heart_beat

    def remove(self, name: str) -> bool:
        """Drop a worker; return whether it was known."""
        self._preferred = {key: worker for key, worker in self._preferred.items() if worker != name}
        return self._workers.pop(name, None) is not None

    def beat(self, name: str, queue_length: int) -> bool:
        """Take a heartbeat; return whether the worker is known."""
        worker = self._workers.get(name)
        if worker is None:
            return False
        worker.last_beat, worker.queue_length = self.clock(), queue_length
        return True

    def expire(self) -> list[str]:
        """Drop the workers that have been silent for too long; return their names."""
        limit = self.clock() - self.expiry_seconds
        silent = [name for name, one in self._workers.items() if one.checks_heart_beat and one.last_beat < limit]
        for name in silent:
            self.remove(name)
        return silent

    def models(self) -> list[str]:
        """Return the names of all models, each once."""
        return list(dict.fromkeys(name for worker in self._workers.values() for name in worker.status.model_names))

    def workers_of(self, model: str) -> list[str]:
        """Return the workers that serve a model."""
        return [name for name, worker in self._workers.items() if model in worker.status.model_names]

    def choose(self, model: str, *, excluded: Collection[str] = (), affinity: str | None = None) -> str:
        """Return a worker for a request and count the request; "" without one.

        Args:
            model: name of the model.
            excluded: workers that have just failed.
            affinity: key of what the request shares with others, such as an image; they go to the same worker while
                its queue is not much longer.
        """
        able = {name: self._workers[name] for name in self.workers_of(model) if name not in excluded}
        if not able:
            return ""
        chosen = self._preferred_worker(able, affinity) or DISPATCH[self.dispatch](able, self.draw)
        if chosen:
            able[chosen].queue_length += 1
            if affinity is not None:
                self._prefer(affinity, chosen)
        return chosen

    def finish(self, name: str) -> None:
        """Count a request that `choose` gave to a worker as over."""
        worker = self._workers.get(name)
        if worker is not None and worker.queue_length > 0:
            worker.queue_length -= 1

    def status(self) -> WorkerStatus:
        """Return the sum of all workers, with which a controller can be registered as a worker."""
        workers = self._workers.values()
        speed, length = sum(one.status.speed for one in workers), sum(one.queue_length for one in workers)
        return WorkerStatus(tuple(self.models()), speed, length)

    def _preferred_worker(self, able: Mapping[str, _Worker], affinity: str | None) -> str:
        name = self._preferred.get(affinity, "") if affinity is not None else ""
        if name not in able:
            return ""
        shortest = min(worker.queue_length for worker in able.values())
        return name if able[name].queue_length <= shortest + self.affinity_slack else ""

    def _prefer(self, affinity: str, name: str) -> None:
        self._preferred.pop(affinity, None)
        self._preferred[affinity] = name
        if len(self._preferred) > MAX_PREFERRED:
            del self._preferred[next(iter(self._preferred))]


MAX_PREFERRED = 10_000
"""Number of affinity keys that are remembered; the oldest are forgotten."""
