"""Processes of `llava serve`: started, restarted when they die, and ended together."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2

logger = logging.getLogger(__name__)

USAGE_STATUS = 2
LONGEST_WAIT = 30.0
STEADY_SECONDS = 60.0
"""Time after which a process that dies is restarted as quickly as the first time."""

POLL_SECONDS = 0.1
READY_POLL_SECONDS = 0.3
SAME_SIGNAL_SECONDS = 0.3
LAST_SECONDS = 5.0
"""Time that processes have to end in addition to that for draining."""

PR_SET_PDEATHSIG = 1


@dataclass
class Service:
    """One process.

    Attributes:
        name: name in the log.
        module: module that is run.
        words: its command line.
        url: URL of its server.
        ready_path: path that answers 200 once it is ready.
    """

    name: str
    module: str
    words: Sequence[str]
    url: str
    ready_path: str
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    num_deaths: int = 0
    restart_at: float | None = None

    def start(self) -> None:
        """Start the process, in the process group of this one."""
        command = [sys.executable, "-m", self.module, *self.words]
        # This process has no other threads, which a function before exec would not be safe with.
        settings = _child_settings(os.getpid())
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=settings)  # noqa: PLW1509
        self.started, self.restart_at = time.monotonic(), None

    @property
    def is_running(self) -> bool:
        """Whether the process runs."""
        return self.process is not None and self.process.poll() is None

    def send(self, number: int) -> None:
        """Send a signal, if the process runs."""
        if self.is_running and self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    def note_death(self, status: int) -> None:
        """Plan the restart of a process that died."""
        self.num_deaths = 1 if time.monotonic() - self.started > STEADY_SECONDS else self.num_deaths + 1
        wait = min(LONGEST_WAIT, 2.0 ** (self.num_deaths - 1))
        self.process, self.restart_at = None, time.monotonic() + wait
        logger.error("%s ended with status %d; it is started again in %.0f s", self.name, status, wait)


@dataclass
class Supervisor:
    """Owner of the processes.

    Attributes:
        services: the processes, in the order in which they start.
        ready_line: printed once all of them are ready.
        drain_seconds: time that running requests have after the first signal.
        write: prints a line.
    """

    services: Sequence[Service]
    ready_line: str
    drain_seconds: float = 30.0
    write: Callable[[str], Any] = sys.stdout.write
    _signaled: float | None = None
    _ends_at_once: bool = False
    _is_ready: bool = False
    _next_poll: float = 0.0
    _http: httpx2.Client = field(default_factory=lambda: httpx2.Client(timeout=2.0, trust_env=False))

    def run(self) -> int:
        """Run the processes until a signal; return the exit status."""
        with self._handlers():
            try:
                for service in self.services:
                    service.start()
                status = self._watch()
            finally:
                ended = self._end()
        return status or (0 if ended else 1)

    def _watch(self) -> int:
        """Restart processes and report readiness until a signal; return the status of a failed start."""
        while self._signaled is None:
            for service in self.services:
                if service.process is not None and (status := service.process.poll()) is not None:
                    if status == USAGE_STATUS and not self._is_ready:
                        return status
                    service.note_death(status)
                elif service.restart_at is not None and time.monotonic() >= service.restart_at:
                    service.start()
            if not self._is_ready and time.monotonic() >= self._next_poll:
                self._report_if_ready()
            time.sleep(POLL_SECONDS)
        return 0

    def _report_if_ready(self) -> None:
        self._next_poll = time.monotonic() + READY_POLL_SECONDS
        if all(self._answers(service) for service in self.services):
            self._is_ready = True
            self.write(self.ready_line + "\n")
            sys.stdout.flush()

    def _answers(self, service: Service) -> bool:
        try:
            return self._http.get(service.url + service.ready_path).status_code == 200
        except httpx2.HTTPError:
            return False

    def _end(self) -> bool:
        """End all processes; return whether they ended by themselves."""
        self._http.close()
        self._send(signal.SIGTERM)
        limit = time.monotonic() + self.drain_seconds + LAST_SECONDS
        while self._any_running() and time.monotonic() < limit and not self._ends_at_once:
            time.sleep(POLL_SECONDS / 2)
        ended = not self._any_running()
        self._send(signal.SIGKILL)
        for service in self.services:
            if service.process is not None:
                service.process.wait()
        return ended

    def _any_running(self) -> bool:
        return any(service.is_running for service in self.services)

    def _send(self, number: int) -> None:
        for service in self.services:
            service.send(number)

    def _on_signal(self, *_: Any) -> None:
        now = time.monotonic()
        if self._signaled is None:
            self._signaled = now
        elif now > self._signaled + SAME_SIGNAL_SECONDS:
            self._ends_at_once = True

    @contextlib.contextmanager
    def _handlers(self) -> Iterator[None]:
        wanted: dict[int, Any] = {signal.SIGTERM: self._on_signal, signal.SIGINT: self._on_signal}
        wanted[signal.SIGHUP] = lambda *_: self._send(signal.SIGHUP)
        before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _child_settings(parent: int) -> Callable[[], None]:
    """Return a function that makes a new process ignore SIGHUP at first, and end with its parent."""
    # Not all systems can send a signal when a parent dies.
    try:
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        prctl = None

    def settings() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # is kept by exec, so that it holds from the start of Python
        if prctl is None:
            return
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it died in the meantime
            os._exit(1)

    return settings
