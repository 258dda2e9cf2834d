"""Shared parts of the local test servers: counting, closed connections, a free port.

class Handler(LocalHandler): ...        its `do_GET` or `do_POST` answers inside `self.counted()`
with running(Handler, state): ...       served at state.address
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(kw_only=True)
class LocalState:
    """State of a server.

    Attributes:
        address: http://127.0.0.1:PORT with the path of the server.
        most_at_once: largest number of requests answered at the same time.
        num_running: number of requests being answered.
        stopped: set at the end; delayed answers wait for it.
        lock: lock of these fields.
    """

    address: str = ""
    most_at_once: int = 0
    num_running: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)


class LocalHandler(BaseHTTPRequestHandler):
    """Handler of a connection, without log lines."""

    protocol_version = "HTTP/1.1"
    state: Any

    def log_message(self, format: str, *args: object) -> None:
        """Ignore a log line."""

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count a request while it is answered; a client that disconnects ends the connection."""
        with self.state.lock:
            self.state.num_running += 1
            self.state.most_at_once = max(self.state.most_at_once, self.state.num_running)
        try:
            yield
        except OSError:  # the client disconnected
            self.close_connection = True
        finally:
            with self.state.lock:
                self.state.num_running -= 1


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore broken connections; other errors are those of the server."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def running(handler: type[LocalHandler], state: LocalState) -> Iterator[None]:
    """Serve on a free port; complete `state.address`."""
    server = _Server(("127.0.0.1", 0), type("BoundHandler", (handler,), {"state": state}))
    state.address = f"http://127.0.0.1:{server.server_address[1]}{state.address}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        state.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()
