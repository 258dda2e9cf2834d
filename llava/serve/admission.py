"""Back-pressure: bounded running sequences and waiting requests, admitted in turn by key.

    with admission.place(key, num_sequences): ...      enters the queue; refuses at once when too many wait
    async with admission.limited(seconds): ...         waits for anything; ends with `draining` when the server ends

All methods run in the thread of the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType

from llava.errors import ConfigError
from llava.serve.failures import RequestError, busy


@dataclass(slots=True, eq=False)
class Place:
    """Place of a request in the queue or among the running ones."""

    key: str
    num_sequences: int
    max_running: int | None
    granted: asyncio.Event = field(default_factory=asyncio.Event)
    is_over: bool = False


class Admission:
    """Queue of one server.

    Attributes:
        num_running: sequences that run.
        num_running_requests: requests that run.
        num_waiting: requests that wait.
        num_reading: requests whose bodies or images are read, before they wait.
        is_draining: whether new requests are refused.
        is_over: whether the requests that were left have been ended too.
    """

    def __init__(
        self, *, max_running: int = 32, max_waiting: int = 64, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Create an empty queue.

        Raises:
            ConfigError: a limit is out of range.
        """
        if max_running < 1 or max_waiting < 0:
            raise ConfigError(
                f"--max-running is {max_running} and --max-waiting {max_waiting}; expected 1 and 0 or more"
            )
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.num_running = 0
        self.num_running_requests = 0
        self.num_waiting = 0
        self.num_reading = 0
        self.is_draining = False
        self.is_over = False
        self._limits: set[asyncio.Timeout] = set()
        self._clock = clock
        self._by_key: OrderedDict[str, deque[Place]] = OrderedDict()
        self._running_of: dict[str, int] = {}

    @property
    def num_requests(self) -> int:
        """Requests that run (by sequences) or wait."""
        return self.num_running + self.num_waiting

    @property
    def is_idle(self) -> bool:
        """Whether no request is read, waits or runs."""
        return self.num_requests == 0 and self.num_reading == 0

    def limited(self, seconds: float | None = None) -> Limited:
        """Return a context manager around whatever a request waits for.

        It raises `TimeoutError` after `seconds`, and `RequestError` (`draining`) as soon as `end` is called.
        """
        return Limited(self, seconds)

    def end(self) -> None:
        """End the requests that are left: each of them raises `draining` where it waits, now or later."""
        self.is_draining = self.is_over = True
        now = asyncio.get_running_loop().time()
        for limit in self._limits:
            if not limit.expired():
                limit.reschedule(now)

    def enter(self, key: str, num_sequences: int, *, max_running: int | None = None) -> Place:
        """Return a place, granted already if there is room.

        Args:
            key: id of the client; keys are served in turn.
            num_sequences: sequences of the request; more than the server runs count as all.
            max_running: largest number of running sequences of this key.

        Raises:
            RequestError: the request has more sequences than its key may run, too many requests wait, or the server is
                draining.
        """
        if self.is_draining:
            raise draining()
        if max_running is not None and num_sequences > max_running:
            reason = f"n is {num_sequences}; this key may have {max_running} running sequences"
            raise RequestError("invalid_value", reason, param="n")
        place = Place(key, min(num_sequences, self.max_running), max_running)
        if self._fits(place) and not self._is_behind(place):
            self._grant(place)
            return place
        if self.num_waiting >= self.max_waiting:
            raise busy("queue_full", f"{self.num_waiting} requests are waiting; at most {self.max_waiting} may")
        self._by_key.setdefault(key, deque()).append(place)
        self.num_waiting += 1
        self._serve()
        return place

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Count a request while its body or its images are read: their memory has a limit too.

        Raises:
            RequestError: as many are read as could run and wait.
        """
        if self.num_reading >= self.max_running + self.max_waiting:
            raise busy("queue_full", f"{self.num_reading} requests are being read; try again later")
        self.num_reading += 1
        try:
            yield
        finally:
            self.num_reading -= 1

    def leave(self, place: Place) -> None:
        """Free a place, whether it was granted or not."""
        if place.is_over:
            return
        place.is_over = True
        if place.granted.is_set():
            self.num_running -= place.num_sequences
            self.num_running_requests -= 1
            self._running_of[place.key] -= place.num_sequences
            if self._running_of[place.key] == 0:
                del self._running_of[place.key]
        else:
            self._by_key[place.key].remove(place)
            self._forget_if_empty(place.key)
            self.num_waiting -= 1
        self._serve()

    def place(self, key: str, num_sequences: int, *, max_running: int | None = None) -> PlaceContext:
        """Return a context manager that enters, and leaves at the end; the place may still have to be granted."""
        return PlaceContext(self, self.enter(key, num_sequences, max_running=max_running))

    async def waits(self, place: Place, *, deadline: float, beat: float) -> AsyncIterator[None]:
        """Yield every `beat` seconds until the place is granted.

        Raises:
            RequestError: the deadline has passed.
        """
        while not place.granted.is_set():
            left = deadline - self._clock()
            if left <= 0:
                raise timed_out()
            try:
                # `wait_for` of Python 3.11 would ignore that the client leaves at the moment of the grant.
                async with self.limited(min(beat, left)):
                    await place.granted.wait()
            except TimeoutError:
                yield

    def _fits(self, place: Place) -> bool:
        return self.num_running + place.num_sequences <= self.max_running and self._key_fits(place)

    def _is_behind(self, place: Place) -> bool:
        """Return whether a place waits behind one of its key, or of a key below its own limit."""
        return place.key in self._by_key or any(self._key_fits(places[0]) for places in self._by_key.values())

    def _key_fits(self, place: Place) -> bool:
        running = self._running_of.get(place.key, 0)
        return place.max_running is None or running + place.num_sequences <= place.max_running

    def _grant(self, place: Place) -> None:
        self.num_running += place.num_sequences
        self.num_running_requests += 1
        self._running_of[place.key] = self._running_of.get(place.key, 0) + place.num_sequences
        place.granted.set()

    def _serve(self) -> None:
        """Grant places in turn by key while they fit; a large request is not overtaken by small ones."""
        served = True
        while served:
            served = False
            for key in list(self._by_key):
                place = self._by_key[key][0]
                if not self._key_fits(place):
                    continue  # only this key is at its limit
                if not self._fits(place):
                    return
                self._by_key[key].popleft()
                self._by_key.move_to_end(key)
                self._forget_if_empty(key)
                self.num_waiting -= 1
                self._grant(place)
                served = True
                break

    def _forget_if_empty(self, key: str) -> None:
        if not self._by_key[key]:
            del self._by_key[key]


class Limited:
    """Context manager of something that a request waits for; see `Admission.limited`."""

    __slots__ = ("_admission", "_timeout")

    def __init__(self, admission: Admission, seconds: float | None) -> None:
        self._admission = admission
        self._timeout = asyncio.timeout(seconds)  # without a task for each wait, unlike `wait_for`

    async def __aenter__(self) -> None:
        if self._admission.is_over:
            raise draining()
        await self._timeout.__aenter__()
        self._admission._limits.add(self._timeout)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._admission._limits.discard(self._timeout)
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError:
            if self._admission.is_over:
                raise draining() from None
            raise


@dataclass(frozen=True, slots=True)
class PlaceContext:
    """Context manager of a place."""

    admission: Admission
    entered: Place

    def __enter__(self) -> Place:
        return self.entered

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.admission.leave(self.entered)


def draining() -> RequestError:
    """Return the error of requests that arrive while the server ends, or are not complete at its end."""
    return busy("draining", "the server is shutting down; send the request to another one, or later")


def timed_out() -> RequestError:
    """Return the error of a request that took too long."""
    return RequestError("timeout", "the request took longer than --request-timeout allows")
