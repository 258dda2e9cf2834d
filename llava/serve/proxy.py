"""Forwarding of requests from a controller to its workers, with a retry while nothing was sent.

request --Registry.choose--> worker --first piece--> client
              ^---- lost, draining or full ----'
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx2
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from llava.serve.admission import Admission
from llava.serve.failures import RequestError
from llava.serve.flights import Flight, Flights
from llava.serve.gate import AUDITED_HEADER, RequestRecord, record_of, unless_left
from llava.serve.registry import Registry
from llava.serve.streams import PieceStream

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 1.5
"""Time to reach a worker; a lost one is reported within 2 s."""

PASSED_ON = ("authorization", "content-type")
"""Headers of a client that a worker gets."""

BUSY = {"draining", "queue_full"}
"""Codes after which another worker is asked."""

SOME_CONTENT = re.compile(rb'"content": ?"[^"]')
"""Text in a chunk of the OpenAI protocol; the first chunk has the role and an empty text."""


@dataclass(frozen=True, slots=True)
class WorkerAnswer:
    """Answer of a worker whose first piece has arrived."""

    flight: Flight
    response: httpx2.Response
    first: bytes
    pieces: Any
    arrived: float = field(default_factory=time.monotonic)

    @property
    def code(self) -> str:
        """Code of the error in the first piece; "ok" without one."""
        return code_of(self.first)


def code_of(piece: bytes) -> str:
    """Return the code of an error in a piece of either protocol; "ok" without one."""
    if b'"error' not in piece:
        return "ok"
    try:
        found = json.loads(piece.strip(b"\0\n").removeprefix(b"data: "))
    except ValueError:
        return "ok"
    if not isinstance(found, dict):
        return "ok"
    error = found.get("error")
    code = error.get("code") if isinstance(error, dict) else found.get("detail") if found.get("error_code") else None
    return code if isinstance(code, str) else "ok"


class ContentSearch:
    """Search for the first text of a streamed answer; its pieces may end anywhere, and roles are no text."""

    def __init__(self, protocol: str, prompt: str) -> None:
        """Search for text in chunks of `openai`, or for text after the prompt in frames of `llava`."""
        self._is_old = protocol == "llava"
        self._num_prompt = len(prompt)
        self._rest = b""

    def finds(self, piece: bytes) -> bool:
        """Return whether a chunk or frame that ends in this piece has content."""
        *whole, self._rest = (self._rest + piece).split(b"\0" if self._is_old else b"\n\n")
        return any(self._has_text(one) if self._is_old else SOME_CONTENT.search(one) for one in whole)

    def _has_text(self, frame: bytes) -> bool:
        try:
            found = json.loads(frame)
        except ValueError:
            return False
        text = found.get("text") if isinstance(found, dict) and found.get("error_code") == 0 else None
        return isinstance(text, str) and len(text) > self._num_prompt


class Forwarder:
    """Forwarder of requests for answers."""

    def __init__(
        self,
        registry: Registry,
        http: httpx2.AsyncClient,
        headers_of: Callable[[str], dict[str, str]],
        admission: Admission,
    ) -> None:
        """Forward to the workers of `registry`.

        Args:
            registry: the workers.
            http: client for requests to them.
            headers_of: returns the controller's headers for a worker.
            admission: ends the requests that are left when the controller ends.
        """
        self.registry = registry
        self.admission = admission
        self.http = http
        self.headers_of = headers_of
        self.flights = Flights(registry.clock)
        self.auditing: set[str] = set()
        """Workers that write the audit lines of the requests that reach them."""

    async def forward(
        self, request: Request, body: bytes, model: str, affinity: str | None, *, prompt: str = ""
    ) -> Response:
        """Return the answer of a worker for `model`; `prompt` is that of the old protocol.

        Raises:
            RequestError: no worker serves the model, or all of them were lost.
        """
        tried: set[str] = set()
        refused: WorkerAnswer | None = None
        while name := self.registry.choose(model, excluded=tried, affinity=affinity):
            tried.add(name)
            flight = self.flights.begin(name)
            try:
                async with self.admission.limited():
                    answer = await unless_left(request, flight.wait(self._ask(flight, request, body)))
            except httpx2.HTTPError:
                self.flights.end(flight)
                self.drop(name)
                continue
            except BaseException as error:
                if isinstance(error, ClientDisconnect | asyncio.CancelledError):
                    record_of(request).is_audited = flight.is_sent and name in self.auditing
                self._finish(flight)
                raise
            if answer.code in BUSY:
                await self._close(answer)
                refused = answer
                continue
            return self._passed_on(request, answer, prompt)
        if refused is not None:
            record_of(request).code = refused.code
            record_of(request).is_audited = AUDITED_HEADER in refused.response.headers
            return Response(refused.first, refused.response.status_code, headers=_headers(refused.response))
        if tried:
            raise worker_lost()
        raise no_worker()

    def drop(self, name: str) -> None:
        """Forget a worker that cannot be reached."""
        if self.registry.remove(name):
            logger.warning("worker %s cannot be reached and is dropped", name)
            self.flights.note_unreachable(name)

    def expire(self) -> None:
        """Drop workers that are silent, and end the requests at workers that are gone."""
        for name in self.registry.expire():
            logger.warning("worker %s has been silent for too long and is dropped", name)
            self.flights.note_unreachable(name, silent_for=self.registry.expiry_seconds)
        self.flights.lose_unreachable(self.registry.names, self.registry.expiry_seconds)

    async def _ask(self, flight: Flight, request: Request, body: bytes) -> WorkerAnswer:
        """Return the answer of a worker once its first piece is here."""
        name = flight.worker
        headers = {key: request.headers[key] for key in PASSED_ON if key in request.headers}
        headers["x-request-id"] = record_of(request).request_id
        headers |= self.headers_of(name)
        timeout = httpx2.Timeout(None, connect=CONNECT_SECONDS)
        asked = self.http.build_request(
            "POST",
            name.rstrip("/") + request.url.path,
            content=body,
            headers=headers,
            timeout=timeout,
            extensions={"trace": flight.trace},
        )
        response = await self.http.send(asked, stream=True)
        try:
            if not _is_stream(response):
                return WorkerAnswer(flight, response, await response.aread(), None)
            pieces = response.aiter_bytes()
            return WorkerAnswer(flight, response, await anext(pieces, b""), pieces)
        except BaseException:
            await response.aclose()
            raise

    def _passed_on(self, request: Request, answer: WorkerAnswer, prompt: str) -> Response:
        record, response = record_of(request), answer.response
        record.code = answer.code
        record.is_audited = AUDITED_HEADER in response.headers
        if answer.pieces is None:
            self._finish(answer.flight)
            return Response(answer.first, response.status_code, headers=_headers(response))
        on_error = RequestError.frame if record.protocol == "llava" else error_piece
        stream = PieceStream(
            answer.first,
            self._pieces(answer, record, ContentSearch(record.protocol, prompt)),
            media_type=response.headers["content-type"],
            on_error=on_error,
            close=lambda: self._close(answer),
        )
        stream.status_code = response.status_code
        stream.headers.update(_headers(response))
        return stream

    async def _pieces(
        self, answer: WorkerAnswer, record: RequestRecord, search: ContentSearch
    ) -> AsyncGenerator[bytes, None]:
        if search.finds(answer.first):
            record.first_token = answer.arrived
        try:
            while piece := await self._next(answer):
                if (code := code_of(piece)) != "ok":
                    record.code = code
                if record.first_token is None and search.finds(piece):
                    record.first_token = time.monotonic()
                yield piece
        except httpx2.HTTPError:
            self.drop(answer.flight.worker)
            record.is_audited = False
            raise worker_lost() from None
        except RequestError:  # the controller ends; for the worker, its client has left
            record.is_audited = False
            raise

    async def _next(self, answer: WorkerAnswer) -> bytes:
        async with self.admission.limited():
            return await answer.flight.wait(anext(answer.pieces, b""))

    async def _close(self, answer: WorkerAnswer) -> None:
        self._finish(answer.flight)
        await answer.response.aclose()

    def _finish(self, flight: Flight) -> None:
        self.flights.end(flight)
        self.registry.finish(flight.worker)


def error_piece(error: RequestError) -> bytes:
    """Return the last piece of a stream of the OpenAI protocol that failed."""
    return b"data: " + json.dumps(error.body()).encode() + b"\n\n"


def worker_lost() -> RequestError:
    """Return the error of a request whose worker was lost."""
    return RequestError("worker_lost", "the worker was lost before the answer was complete", retry_after=1)


def no_worker() -> RequestError:
    """Return the error of a request that no worker can answer now."""
    return RequestError("no_worker", "no worker serves this model now; see GET /v1/models", retry_after=1)


def _is_stream(response: httpx2.Response) -> bool:
    return response.headers.get("content-type", "").startswith(("text/event-stream", "application/octet-stream"))


def _headers(response: httpx2.Response) -> dict[str, str]:
    names = ("content-type", "retry-after", "www-authenticate", "cache-control", "x-accel-buffering")
    return {name: response.headers[name] for name in names if name in response.headers}
