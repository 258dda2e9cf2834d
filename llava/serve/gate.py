"""Gate in front of a server's routes: request id, host, keys, body size, errors, audit and metrics.

connection --Gate: x-request-id, Host, Authorization--> route --RequestError--> body or frame of the protocol
                                                        `--> RequestRecord --> audit line, metrics
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava.serve.addresses import comes_from_here, header_map, host_name, is_same_address
from llava.serve.admission import draining
from llava.serve.audit import AuditLog, now_text
from llava.serve.failures import RequestError, internal_error
from llava.serve.keys import CLUSTER_HEADER, ApiKey, KeyRing, same_key
from llava.serve.metrics import ServerMetrics

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
AUDITED_HEADER = "x-llava-audited"
"""Header of a worker's answers: the worker writes the audit line of the request."""

PROTOCOLS = {"/v1/chat/completions": "openai", "/worker_generate_stream": "llava"}
"""Routes that answer, with the names of their protocols in audit lines and metrics."""

OPEN_ROUTES = {"/health", "/ready"}
CLUSTER_ROUTES = {"/register_worker", "/unregister_worker", "/receive_heart_beat"}
"""Routes for members of the cluster only: callers on this machine, or holders of the cluster key."""

LOCAL_ROUTES = {*CLUSTER_ROUTES, "/metrics", "/worker_get_status"}
"""Routes that need no API key from this machine."""

LEFT = "client_left"
"""Outcome of a request whose client closed the connection."""

LAST_SECONDS = 0.5
"""Time in which a client takes the answer to a request that is canceled because the server ends."""


@dataclass(slots=True)
class RequestRecord:
    """Record of a request for an answer: counts and names, never content.

    Attributes:
        code: `ok`, a code of an error, or `LEFT`.
        is_audited: whether another server wrote the audit line.
        deadline: when the answer must be complete, by `time.monotonic`; None where no server here knows it.
    """

    request_id: str
    protocol: str
    key: ApiKey | None = None
    model: str = ""
    num_images: int = 0
    num_image_bytes: int = 0
    num_body_bytes: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    code: str = "ok"
    is_audited: bool = False
    started: float = field(default_factory=time.monotonic)
    time: str = field(default_factory=now_text)
    first_token: float | None = None
    deadline: float | None = None

    @property
    def key_id(self) -> str:
        """Id of the client's key; "-" without one."""
        return self.key.name if self.key is not None else "-"

    def note_tokens(self, prompt: int, cached: int, generated: int) -> None:
        """Take the counts so far, and the time of the first token."""
        self.prompt_tokens, self.cached_tokens, self.generated_tokens = prompt, cached, generated
        if generated and self.first_token is None:
            self.first_token = time.monotonic()

    def fields(self) -> dict[str, Any]:
        """Return the fields of the audit line."""
        return {
            "time": self.time,
            "request_id": self.request_id,
            "key": self.key_id,
            "model": self.model,
            "protocol": self.protocol,
            "images": self.num_images,
            "image_bytes": self.num_image_bytes,
            "body_bytes": self.num_body_bytes,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "generated_tokens": self.generated_tokens,
            "milliseconds": round(1000 * (time.monotonic() - self.started)),
            "code": self.code,
        }


@dataclass(frozen=True, slots=True)
class GateSettings:
    """Guard rails of a server.

    Attributes:
        hosts: host names under which the server may be addressed, in addition to its addresses and `localhost`.
        keys: API keys.
        cluster_key: key of the cluster; "" without one.
        max_body_bytes: largest body.
        body_seconds: largest time in which a body is sent; a client that sends nothing must not keep a place.
        audit: audit log.
        marks_audited: whether answers say that their audit line is written here, as a worker's do for its controller.
    """

    hosts: frozenset[str] = frozenset()
    keys: KeyRing = field(default_factory=KeyRing)
    cluster_key: str = ""
    max_body_bytes: int = 32 << 20
    body_seconds: float = 120.0
    audit: AuditLog = field(default_factory=AuditLog)
    marks_audited: bool = False


class Gate:
    """ASGI middleware around all routes of a server."""

    def __init__(
        self,
        app: ASGIApp,
        settings: GateSettings,
        metrics: ServerMetrics,
        *,
        around: Callable[[ASGIApp], ASGIApp] | None = None,
    ) -> None:
        """Guard `app`; `around` adds a middleware behind the check of the host and in front of all others."""
        self.app = app
        self.settings = settings
        self.metrics = metrics
        self._rest: ASGIApp = self._answer if around is None else around(self._answer)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = header_map(scope)
        request_id = headers.get("x-request-id", "")
        if not REQUEST_ID.fullmatch(request_id):
            request_id = f"req-{uuid.uuid4().hex}"
        protocol = PROTOCOLS.get(scope["path"], "") if scope["method"] == "POST" else ""
        record = RequestRecord(request_id, protocol)
        scope.setdefault("state", {})
        scope["state"].update(record=record, settings=self.settings, metrics=self.metrics)
        own = {"x-request-id": request_id}
        if protocol and self.settings.marks_audited:
            own[AUDITED_HEADER] = "1"
        sender, receiver = _Sender(send, own), _Receiver(receive)
        try:
            try:
                self._check_host(scope, headers)
            except RequestError as error:
                await _refuse(error, scope, receiver, sender)
                return
            await self._rest(scope, receiver, sender)
        except ClientDisconnect:
            record.code = LEFT
        except asyncio.CancelledError:  # by the end of the server only; clients that leave cancel nothing here
            record.code = "draining"
            if not sender.has_started:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LAST_SECONDS):
                        await error_response(draining(), record)(scope, receiver, sender)
            raise
        except Exception as error:
            if record.code != "internal_error":  # otherwise it was logged where it happened
                log_failure(error, request_id)
            record.code = "internal_error"
            if not sender.has_started:
                response = error_response(internal_error(request_id), record)
                await response(scope, receiver, sender)
        finally:
            self._close(record)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check(scope, header_map(scope), scope["state"]["record"])
        except RequestError as error:
            await _refuse(error, scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _check(self, scope: Scope, headers: dict[str, str], record: RequestRecord) -> None:
        """Raise `RequestError` for a missing key or too many requests."""
        path = scope["path"]
        is_local = comes_from_here(scope, headers)
        in_cluster = self._has_cluster_key(headers)
        scope["state"].update(is_local=is_local, in_cluster=in_cluster)
        if path in CLUSTER_ROUTES and not (is_local or in_cluster):
            raise RequestError("invalid_api_key", "workers on other machines need the cluster key (--cluster-key)")
        if path in OPEN_ROUTES or scope["method"] == "OPTIONS":
            return
        if path in LOCAL_ROUTES and (is_local or in_cluster):
            return
        record.key = self.settings.keys.find(headers)
        if record.protocol:
            self.settings.keys.count(record.key)

    def _check_host(self, scope: Scope, headers: dict[str, str]) -> None:
        name = host_name(headers.get("host", ""))
        own = str((scope.get("server") or ("", 0))[0] or "").lower()
        if name in ("localhost", *self.settings.hosts) or is_same_address(name, own):
            return
        # Otherwise a site whose host name resolves to this machine (DNS rebinding) could send requests.
        raise RequestError("invalid_value", "the Host header names another server; see --public-host", param="Host")

    def _has_cluster_key(self, headers: dict[str, str]) -> bool:
        expected = self.settings.cluster_key
        return bool(expected) and same_key(headers.get(CLUSTER_HEADER, ""), expected)

    def _close(self, record: RequestRecord) -> None:
        if not record.protocol:
            return
        self.metrics.count_request(record.protocol, record.code)
        self.metrics.observe("llava_request_seconds", time.monotonic() - record.started)
        if record.first_token is not None:
            self.metrics.observe("llava_time_to_first_token_seconds", record.first_token - record.started)
        self.metrics.add("llava_prompt_tokens", record.prompt_tokens)
        self.metrics.add("llava_prompt_tokens_cached", record.cached_tokens)
        self.metrics.add("llava_generated_tokens", record.generated_tokens)
        self.metrics.add("llava_images", record.num_images)
        if not record.is_audited:
            self.settings.audit.write(record.fields())


class _Sender:
    """Sender of messages that adds headers of the gate."""

    def __init__(self, send: Send, headers: Mapping[str, str]) -> None:
        self.send = send
        self.headers = [(name.encode(), value.encode()) for name, value in headers.items()]
        self.has_started = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_started = True
            own = {name for name, _ in self.headers}
            kept = [pair for pair in message.get("headers", []) if pair[0].lower() not in own]
            message = {**message, "headers": [*kept, *self.headers]}
        await self.send(message)


class _Receiver:
    """Receiver of messages that knows whether the body has been read."""

    def __init__(self, receive: Receive) -> None:
        self.receive = receive
        self.has_ended = False

    async def __call__(self) -> Message:
        message = await self.receive()
        self.has_ended = self.has_ended or not message.get("more_body", False)
        return message


def error_response(error: RequestError, record: RequestRecord) -> Response:
    """Return the response for an error in the protocol of the request."""
    if record.protocol == "llava":
        return Response(error.frame(), error.frame_status, headers=error.headers, media_type="application/octet-stream")
    return JSONResponse(error.body(), error.status, headers=error.headers)


def log_failure(error: Exception, request_id: str) -> None:
    """Log where a request failed; the message of the error may quote content and is left out."""
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" at {place[0].filename}:{place[0].lineno}" if place else ""
    logger.error("request %s failed: %s%s", request_id, type(error).__name__, where)


def record_of(request: Request) -> RequestRecord:
    """Return the record of a request."""
    record: RequestRecord = request.scope["state"]["record"]
    return record


async def read_body(request: Request) -> bytes:
    """Return the body of a request.

    Raises:
        RequestError: it is larger than allowed, and the rest is not kept, or it takes too long.
    """
    settings: GateSettings = request.scope["state"]["settings"]
    limit = settings.max_body_bytes
    error = RequestError("request_too_large", f"the body has more than {limit} bytes, the limit of --max-body-mb")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limit:
        raise error
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    raise error
    except TimeoutError:
        raise RequestError("timeout", f"the body took longer than {settings.body_seconds:.0f} seconds") from None
    record_of(request).num_body_bytes = len(body)
    return bytes(body)


DISCARD_SECONDS = 1.5
"""Largest time for which the rest of a refused body is read."""


async def refusal(request: Request, error: RequestError) -> Response:
    """Return the response for a refused request, after the rest of a body of moderate size was read."""
    record_of(request).code = error.code
    # Many clients read no answer before they have sent everything.
    receive, left = request.receive, 2 * request.scope["state"]["settings"].max_body_bytes
    has_body = request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            while has_body and left > 0 and not getattr(receive, "has_ended", True):
                left -= len((await receive()).get("body", b""))
    return error_response(error, record_of(request))


async def _refuse(error: RequestError, scope: Scope, receive: Receive, send: Send) -> None:
    response = await refusal(Request(scope, receive), error)
    await response(scope, receive, send)


async def unless_left(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Return the result of `work`, which is canceled when the client closes the connection.

    Raises:
        ClientDisconnect: the client has left.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_until_left(request.receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        await _stop(watcher)
        await _stop(task)


async def _until_left(receive: Callable[[], Awaitable[Message]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _stop(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait for its end."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # marks the exception as retrieved
