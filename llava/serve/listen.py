"""Run a server: bind sockets first, drain on the first signal, stop at once on the second.

signal --new requests are refused--> running ones end --drain_seconds--> the others end with `draining` --> exit
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from llava.errors import ConfigError, LlavaError
from llava.serve.admission import Admission
from llava.serve.keys import KeyRing

logger = logging.getLogger(__name__)

SAME_SIGNAL_SECONDS = 0.3
"""Signals within this time are one: a terminal sends Ctrl-C to a whole process group, whose parent passes it on."""

CHECK_SECONDS = 0.1
LAST_SECONDS = 2.0

GRACEFUL_SECONDS = 2
"""Time in which clients take what is left of their answers when the server ends."""

PASSING_SECONDS = 0.5
"""Further time of a server that passes requests on: the server behind it has the same signal and ends them itself."""


def bind(host: str, port: int) -> list[socket.socket]:
    """Return bound sockets for a host name and a port.

    Raises:
        ConfigError: the name is unknown, or the port is taken or not permitted.
    """
    try:
        wanted = {"type": socket.SOCK_STREAM, "proto": socket.IPPROTO_TCP, "flags": socket.AI_PASSIVE}
        found = socket.getaddrinfo(host, port, **wanted)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host} --port {port}: {getattr(error, 'strerror', None) or error}") from None
    sockets: list[socket.socket] = []
    problem: OSError | None = None
    for family, *_, address in dict.fromkeys(found):
        try:
            sockets.append(_bound(family, (address[0], port, *address[2:])))
            port = port or sockets[0].getsockname()[1]
        except OSError as error:
            problem = error
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # no IPv6 on this machine
                break
    else:
        problem = None if sockets else problem
    if problem is not None:
        for made in sockets:
            made.close()
        raise ConfigError(f"--port {port} of {host}: {problem.strerror}; stop the other program or choose another port")
    return sockets


def _bound(family: int, address: Any) -> socket.socket:
    # asyncio sends small messages at once (TCP_NODELAY) only where the protocol is named. Otherwise the second part of
    # an answer waits for the acknowledgment of the first one: 40 ms on a connection that is used again.
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(address)  # listening begins with the server, because clients would wait while a model is loaded
        made.setblocking(False)
    except OSError:
        made.close()
        raise
    return made


@dataclass
class ServerRun:
    """A server between its start and its end.

    Attributes:
        app: the application with its gate.
        admission: what drains before the end.
        drain_seconds: time that running requests have after the first signal; then they end with `draining`.
        keys: read again when the server begins to listen, and on SIGHUP.
        fatal: returns why the process must end with status 1; "" while it need not.
        on_start: runs beside the server from the time when requests are accepted, and is canceled at the end.
        on_drain: awaited when draining begins.
    """

    app: ASGIApp
    admission: Admission
    drain_seconds: float = 30.0
    keys: KeyRing = field(default_factory=KeyRing)
    fatal: Callable[[], str] = lambda: ""
    on_start: Callable[[], Awaitable[None]] | None = None
    on_drain: Callable[[], Awaitable[None]] | None = None
    _signaled: float | None = None
    _status: int = 0

    def run(self, sockets: list[socket.socket], *, url: str) -> int:
        """Serve until a signal; return the exit status."""
        config = uvicorn.Config(
            self.app,
            log_config=None,
            access_log=False,
            lifespan="on",
            server_header=False,
            timeout_graceful_shutdown=GRACEFUL_SECONDS,
        )
        logging.getLogger("uvicorn.error").setLevel(
            logging.CRITICAL
        )  # failures are logged by the gate, without content
        server = _Server(config)
        # What was loaded stays: a collection that looks through it takes 0.3 s, in which no answer grows.
        gc.collect()
        gc.freeze()
        with _handlers(self._on_signal, self._reload):
            self._reload()  # a signal that came while the model was loaded was ignored
            asyncio.run(self._serve(server, sockets, url))
        return self._status

    async def _serve(self, server: uvicorn.Server, sockets: list[socket.socket], url: str) -> None:
        serving = asyncio.create_task(server.serve(sockets=sockets))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        beside = None if self.on_start is None else asyncio.ensure_future(self.on_start())
        # The published instructions say to wait for this line.
        sys.stderr.write(f"INFO:     Uvicorn running on {url} (Press CTRL+C to quit)\n")
        sys.stderr.flush()
        drained: asyncio.Future[None] | None = None
        while not serving.done() and not self._is_over():
            if self._signaled is not None and drained is None and self.on_drain is not None:
                drained = asyncio.ensure_future(self.on_drain())
            await asyncio.sleep(CHECK_SECONDS)
        self.admission.end()
        await _finish(drained or (asyncio.ensure_future(self.on_drain()) if self.on_drain is not None else None))
        if beside is not None:
            beside.cancel()
        server.should_exit = True  # what clients do not take in GRACEFUL_SECONDS is canceled
        await serving

    def _is_over(self) -> bool:
        if self._status == 0 and (reason := self.fatal()):
            logger.error("%s; the process ends with status 1", reason)
            self._status = 1
            self._begin_draining()
        if self._signaled is None:
            return False
        return self.admission.is_idle or time.monotonic() > self._signaled + self.drain_seconds

    def _on_signal(self, *_: Any) -> None:
        if self._signaled is None:
            self._begin_draining()
        elif time.monotonic() > self._signaled + SAME_SIGNAL_SECONDS:
            self.drain_seconds = 0.0

    def _begin_draining(self) -> None:
        self.admission.is_draining = True
        self._signaled = time.monotonic() if self._signaled is None else self._signaled

    def _reload(self, *_: Any) -> None:
        try:
            self.keys.reload()
        except LlavaError as error:
            logger.error("the keys stay as they were: %s", error)


async def _finish(last: asyncio.Future[None] | None) -> None:
    """Wait a short time for the last message to the controller."""
    if last is not None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(last, LAST_SECONDS)


class _Server(uvicorn.Server):
    """Server whose signals are handled by its owner."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def _handlers(on_end: Callable[..., None], on_reload: Callable[..., None]) -> Iterator[None]:
    """Handle signals; where they cannot be handled (not in the main thread), leave them as they are."""
    wanted = {signal.SIGTERM: on_end, signal.SIGINT: on_end, signal.SIGHUP: on_reload}
    before: dict[signal.Signals, Any] = {}
    try:
        for number, handler in wanted.items():
            with contextlib.suppress(ValueError):
                before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
