"""Local file server with faults on demand, for tests of downloads.

    server.files["/a.bin"] = bytes        served with Range, ETag and Content-Length
    server.faults["/a.bin"] = [Fault(...), ...]     the first is used up by the first request, and so on

Every request is logged with its Range and its time.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.support.local_server import LocalHandler, LocalState, running


@dataclass(frozen=True)
class Fault:
    """Fault in the answer to one request or, with `always`, to every request.

    Attributes:
        status: answer with this status and no file.
        headers: further headers.
        cut_after: bytes of the body after which the connection closes, although all were announced.
        stall_after: bytes after which nothing more is sent on the open connection.
        pause: seconds between pieces of `piece` bytes.
        ignore_range: send the whole file with status 200.
        unknown_length: announce no length.
        body: bytes sent instead of the file or its requested part.
        content_range: range stated instead of the true one.
    """

    status: int = 0
    headers: tuple[tuple[str, str], ...] = ()
    cut_after: int | None = None
    stall_after: int | None = None
    pause: float = 0.0
    piece: int = 1024
    ignore_range: bool = False
    unknown_length: bool = False
    body: bytes | None = None
    content_range: str = ""
    always: bool = False


@dataclass
class Request:
    """Received request."""

    path: str
    range: str
    time: float
    user_agent: str
    if_range: str = ""


@dataclass
class FileServer(LocalState):
    """Files, faults and log of the server."""

    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    log: list[Request] = field(default_factory=list)

    def asked(self, path: str) -> int:
        """Return how often a file was requested."""
        return sum(request.path == path for request in self.log)

    def fault(self, path: str) -> Fault:
        """Return the next fault and remove it."""
        with self.lock:
            faults = self.faults.get(path, [])
            return Fault() if not faults else faults[0] if faults[0].always else faults.pop(0)


class Handler(LocalHandler):
    """Handler of a connection."""

    state: FileServer

    def do_GET(self) -> None:
        """Answer one request."""
        state = self.state
        headers = self.headers
        with state.lock:
            known = (headers.get("Range", ""), time.monotonic(), headers.get("User-Agent", ""))
            state.log.append(Request(self.path, *known, headers.get("If-Range", "")))
        with self.counted():
            self._answer(state.fault(self.path))

    def _answer(self, fault: Fault) -> None:
        data = self.state.files.get(self.path)
        if fault.status or data is None:
            self.send_response(fault.status or 404)
            for name, value in fault.headers:
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        etag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(found[1]) if found and self.headers.get("If-Range", etag) == etag and not fault.ignore_range else 0
        if start and start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = data[start:] if fault.body is None else fault.body
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", fault.content_range or f"bytes {start}-{len(data) - 1}/{len(data)}")
        if fault.unknown_length:
            self.send_header("Connection", "close")
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", etag)
        for name, value in fault.headers:
            self.send_header(name, value)
        self.end_headers()
        self._send(body, fault)

    def _send(self, body: bytes, fault: Fault) -> None:
        stop = min(value for value in (fault.cut_after, fault.stall_after, len(body)) if value is not None)
        step = fault.piece if fault.pause else max(1, stop)
        for place in range(0, stop, step):
            self.wfile.write(body[place : min(place + step, stop)])
            self.wfile.flush()
            if fault.pause and self.state.stopped.wait(fault.pause):
                break
        if stop < len(body):
            if fault.stall_after is not None:
                self.state.stopped.wait(20)
            self.close_connection = True


@contextlib.contextmanager
def serve() -> Iterator[FileServer]:
    """Run a server on a free port."""
    state = FileServer()
    with running(Handler, state):
        yield state
