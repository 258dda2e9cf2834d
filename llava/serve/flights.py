"""Requests that a controller has given to workers; they end when their worker is lost.

A worker that is stopped or has lost its power keeps its connections open and says nothing; only its heartbeats end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from typing import Any, TypeVar

import httpx2

Result = TypeVar("Result")


class Flight:
    """Request at one worker.

    Attributes:
        worker: name of the worker.
        heard: when the worker was last heard of in this request, or the request began.
        is_sent: whether the worker has the head of the request, so that its gate writes the audit line.
    """

    def __init__(self, worker: str, clock: Callable[[], float]) -> None:
        """Begin a request that is not sent yet."""
        self.worker = worker
        self.heard = clock()
        self.is_sent = False
        self._clock = clock
        self._is_lost = False
        self._limit: asyncio.Timeout | None = None

    async def wait(self, work: Awaitable[Result]) -> Result:
        """Return the result of `work`, which is canceled when the worker is lost.

        Raises:
            httpx2.ReadTimeout: the worker was lost.
        """
        try:
            async with asyncio.timeout(0 if self._is_lost else None) as self._limit:  # no task for each piece
                result = await work
            self.heard = self._clock()
            return result
        except TimeoutError:
            raise httpx2.ReadTimeout(f"{self.worker} is lost") from None
        finally:
            self._limit = None

    def lose(self) -> None:
        """End the request, now or when it waits for the worker again."""
        if self._limit is not None and not self._is_lost:
            self._limit.reschedule(asyncio.get_running_loop().time())
        self._is_lost = True

    async def trace(self, event: str, info: Any) -> None:
        """Note what happened on the connection; see the extension `trace` of httpx."""
        self.is_sent = self.is_sent or event.endswith("send_request_headers.complete")


class Flights:
    """All requests at workers, and the workers that could not be reached while they had some."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Begin without requests."""
        self._clock = clock
        self._by_worker: dict[str, set[Flight]] = {}
        self._unreachable: dict[str, float] = {}

    def begin(self, worker: str) -> Flight:
        """Return a new request at a worker."""
        flight = Flight(worker, self._clock)
        self._by_worker.setdefault(worker, set()).add(flight)
        return flight

    def end(self, flight: Flight) -> None:
        """Forget a request."""
        found = self._by_worker.get(flight.worker, set())
        found.discard(flight)
        if not found:
            self._by_worker.pop(flight.worker, None)

    def note_unreachable(self, worker: str, *, silent_for: float = 0.0) -> None:
        """Note a worker that was dropped, `silent_for` seconds after it was last heard of."""
        if worker in self._by_worker:
            self._unreachable.setdefault(worker, self._clock() - silent_for)

    def lose_unreachable(self, known: Collection[str], seconds: float) -> None:
        """End the requests at workers that are not `known` and were silent for this time, in the request too.

        A worker without heartbeats is dropped when it cannot be reached once, and its streams may go on.
        """
        now = self._clock()
        for worker, since in list(self._unreachable.items()):
            flights = () if worker in known else self._by_worker.get(worker, ())
            if not flights:
                del self._unreachable[worker]
            for flight in list(flights):
                if now - max(since, flight.heard) >= seconds:
                    flight.lose()
