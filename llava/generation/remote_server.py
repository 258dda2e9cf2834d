"""Connection to an OpenAI-protocol server: models, bounded concurrency, retries and requested waits.

    GET models --facts--> ServerFacts
    body --ask, in a session--> JSON of the answer | ServerFailure, after retries
         --stream--> chunks of the answer

Each request counts as failed only after its retries. A failure that every request would share (a wrong key, an unknown
model) ends all later ones at once, and while a server cannot be reached each later request tries once.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import httpx2

from llava.errors import ConfigError, GenerationError
from llava.generation.remote_facts import (
    MAX_SAID,
    ServerFacts,
    ServerFailure,
    base_url,
    client_key,
    error_fields,
    served_names,
)
from llava.openai_transport import FATAL, RETRY_REASONS, ApiFailure, asked_wait, read_error, used_up_wait
from llava.utils.retry import backoff_seconds

CONNECT_SECONDS = 10.0
MAX_REPLY_BYTES = 64 << 20
"""Largest answer that is read, 64 MiB."""

NO_LIST = (404, 405, 501)
"""Statuses of servers that do not list their models."""

MAX_WAIT = 300.0
"""Longest wait before a retry in seconds; if a server asks for more, the request fails."""

PATIENCE = 600.0
"""Seconds without any answer of the server after which a postponed request fails."""

Reply: TypeAlias = "dict[str, Any]"
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Session:
    """Open connections for one call."""

    http: httpx2.AsyncClient
    slots: asyncio.Semaphore


class RemoteServer:
    """One server; any thread may use it.

    Attributes:
        url: its base URL, which ends with `/v1` unless the user gave another path.
        first_wait: longest wait before the first retry in seconds.
    """

    def __init__(self, url: str, *, max_concurrency: int, max_retries: int, timeout: float) -> None:
        """Create a client; nothing is sent yet.

        Args:
            url: base URL; without a path, `/v1` is added.
            max_concurrency: largest number of requests of a call at a time.
            max_retries: retries of a request after a transient failure.
            timeout: seconds in which a server must send something.

        Raises:
            ConfigError: the URL or the key is not valid, or a number is out of range.
        """
        if max_concurrency < 1 or max_retries < 0 or timeout <= 0:
            raise ConfigError(
                f"max_concurrency={max_concurrency} must be at least 1, max_retries={max_retries} at least 0 and "
                f"timeout={timeout} above 0"
            )
        self.url = base_url(url)
        self.max_concurrency = max_concurrency
        self.max_retries = max_retries
        self.first_wait = 1.0
        self.is_ours = False
        self._key = client_key()
        self._timeout = httpx2.Timeout(timeout, connect=CONNECT_SECONDS)
        self._not_before = 0.0
        self._last_answer = 0.0
        self._is_down = False
        self._fatal: ServerFailure | None = None

    def facts(self, model: str | None) -> ServerFacts:
        """Return the facts of a model; None takes the only one.

        Raises:
            GenerationError: the server cannot be reached or does not accept the key.
            ConfigError: it does not serve the model, or several and none is named.
        """
        with httpx2.Client(**self._settings()) as http:
            try:
                response = http.get(f"{self.url}/models", timeout=CONNECT_SECONDS)
            except (httpx2.HTTPError, httpx2.InvalidURL) as error:
                raise GenerationError(f"--engine {self.url} does not answer ({type(error).__name__})") from None
        if response.status_code in NO_LIST and model:
            return ServerFacts(model)  # a server that lists no models
        found = self._parsed(response.status_code, response.headers, response.content)
        if isinstance(found, ServerFailure):
            raise GenerationError(f"--engine {self.url} does not list its models: {found.failure}")
        entries = found.get("data")
        listed = [one for one in entries if isinstance(one, dict) and "id" in one] if isinstance(entries, list) else []
        chosen = [one for one in listed if one["id"] == model or model is None]
        if model is not None and not chosen:  # a checkpoint folder, under whose name it is served
            chosen = [one for one in listed if one["id"] in served_names(model)]
        if len(chosen) != 1:
            names = ", ".join(str(one["id"]) for one in listed) or "none"
            wanted = "--model is missing" if model is None else f"--model {model} is not served"
            raise ConfigError(f"{wanted}; {self.url} serves: {names}")
        facts = ServerFacts.of(chosen[0])
        self.is_ours = facts.is_ours
        return facts

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        """Open connections for one call."""
        async with httpx2.AsyncClient(**self._settings()) as http:
            yield Session(http, asyncio.Semaphore(self.max_concurrency))

    async def ask(self, session: Session, body: Mapping[str, Any]) -> Reply | ServerFailure:
        """Return the answer to a chat request, or why it failed."""
        content, retries = json.dumps(body).encode(), _Retries(self)
        while self._fatal is None:
            while (seconds := self._not_before - time.monotonic()) > 0:
                await asyncio.sleep(seconds)
            found = await self._send(session.http, content)
            wait = retries.after(found)
            if not isinstance(found, ServerFailure):
                return found
            if wait is None:
                return retries.counted(found)
            await asyncio.sleep(wait)
        return self._fatal

    def stream(self, body: Mapping[str, Any]) -> Iterator[Reply]:
        """Yield the chunks of an answer; closing the iterator ends the request.

        Raises:
            StreamError: the request failed.
        """
        content, retries = json.dumps({**body, "stream": True}).encode(), _Retries(self)
        with httpx2.Client(**self._settings()) as http:
            while self._fatal is None:
                time.sleep(max(0.0, self._not_before - time.monotonic()))
                begun = False
                try:
                    with http.stream("POST", f"{self.url}/chat/completions", content=content) as response:
                        if response.status_code == 200:
                            for chunk in self._chunks(response):
                                begun = True
                                self._note_answer()
                                yield chunk
                            return
                        body = parsed_json(bounded(response.iter_bytes()))
                        found = self._refused(response.status_code, body, asked_wait(response.headers))
                except httpx2.HTTPError as error:
                    found = ServerFailure(_broken(error))
                wait = None if begun else retries.after(found)
                if wait is None:
                    raise StreamError(retries.counted(found))
                time.sleep(wait)
        raise StreamError(self._fatal)

    def _chunks(self, response: httpx2.Response) -> Iterator[Reply]:
        """Yield the chunks of a stream that has begun."""
        is_over = False
        for line in lines_of(response.iter_bytes()):
            data = line.removeprefix(b"data:").strip()
            if not line.startswith(b"data:") or not data:
                continue
            if data == b"[DONE]":
                return
            chunk = parsed_json(data)
            if not isinstance(chunk, dict):
                raise StreamError(ServerFailure(ApiFailure("broken_answer")))
            if "error" in chunk:
                raise StreamError(self._refused(200, chunk, None))
            choices = chunk.get("choices")
            first = choices[0] if isinstance(choices, list) and choices else None
            is_over = is_over or (isinstance(first, dict) and bool(first.get("finish_reason")))
            yield chunk
        if not is_over:
            raise StreamError(ServerFailure(ApiFailure("unreachable", "the connection ended before the answer")))

    def _settings(self) -> dict[str, Any]:
        headers = {"User-Agent": "LLaVA Client", "Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        # A redirect or a proxy of the environment would send images and the key elsewhere.
        return {"headers": headers, "timeout": self._timeout, "trust_env": False, "follow_redirects": False}

    async def _send(self, http: httpx2.AsyncClient, content: bytes) -> Reply | ServerFailure:
        try:
            async with http.stream("POST", f"{self.url}/chat/completions", content=content) as response:
                data = bytearray()
                async for piece in response.aiter_bytes():
                    data += piece
                    if len(data) > MAX_REPLY_BYTES:
                        return ServerFailure(ApiFailure("broken_answer", "the answer is too large"))
                return self._parsed(response.status_code, response.headers, bytes(data))
        except httpx2.HTTPError as error:
            return ServerFailure(_broken(error))

    def _parsed(self, status: int, headers: Mapping[str, str], content: bytes) -> Reply | ServerFailure:
        if status != 200:
            return self._refused(status, parsed_json(content), asked_wait(headers))
        self._pause(min(used_up_wait(headers), MAX_WAIT))
        found = parsed_json(content)
        return found if isinstance(found, dict) else ServerFailure(ApiFailure("broken_answer"))

    def _refused(self, status: int, found: Any, wait: float | None) -> ServerFailure:
        code, param, message = error_fields(found)
        failure = read_error(status, code, param, wait=wait, key=self._key)
        return ServerFailure(failure, message if self.is_ours else "", code, param, message[:MAX_SAID])

    def _pause(self, seconds: float) -> None:
        """Delay all new requests by this many seconds."""
        if seconds > 0:
            self._not_before = max(self._not_before, time.monotonic() + seconds)

    def _note_answer(self) -> None:
        self._last_answer, self._is_down = time.monotonic(), False

    def _note_failure(self, found: ServerFailure) -> None:
        """Apply a failure's consequences to later requests."""
        if found.failure.fatal or found.failure.reason in FATAL:
            self._fatal = replace(found, failure=replace(found.failure, fatal=True))
        elif found.failure.reason == "unreachable":
            self._is_down = True


class RequestFailure(GenerationError):
    """Error of a request, with the failure."""

    def __init__(self, found: ServerFailure) -> None:
        super().__init__(str(found))
        self.found = found

    @property
    def is_about_model(self) -> bool:
        """Whether one of our servers refuses the request because of its model, rather than of a field."""
        return bool(self.found.message) and self.found.code == "invalid_value" and not self.found.param


class StreamError(RequestFailure):
    """Error of a streamed request."""


class _Retries:
    """Attempts of one request."""

    def __init__(self, server: RemoteServer) -> None:
        self.server = server
        self.num_attempts = 0
        self.num_failed = 0
        self.start = time.monotonic()

    def after(self, found: Reply | ServerFailure) -> float | None:
        """Return the seconds before the next attempt; None after an answer or the last failure."""
        server = self.server
        self.num_attempts += 1
        if not isinstance(found, ServerFailure):
            server._note_answer()
            return None
        failure = found.failure
        if failure.reason != "unreachable":
            server._is_down = False
        # A server that says when to retry has not failed; give up only if it answers no request at all.
        is_put_off = failure.reason == "rate_limited" and failure.wait is not None
        self.num_failed += not is_put_off
        wait = failure.wait or 0.0
        if not is_put_off or not failure.wait:
            wait = max(wait, backoff_seconds(max(self.num_failed, 1), first=server.first_wait, most=MAX_WAIT))
        waited = time.monotonic() + wait - max(self.start, server._last_answer)
        limit = 0 if server._is_down else server.max_retries
        is_last = self.num_failed > limit or wait > MAX_WAIT or (is_put_off and waited > PATIENCE)
        if failure.reason not in RETRY_REASONS or is_last:
            server._note_failure(found)
            return None
        if failure.wait is not None or failure.reason == "rate_limited":
            server._pause(wait)
        return wait

    def counted(self, found: ServerFailure) -> ServerFailure:
        """Return a failure with the number of attempts."""
        return replace(found, failure=replace(found.failure, num_attempts=self.num_attempts))


def lines_of(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the lines of a stream; only line feeds end one, since texts may hold other line separators."""
    rest = b""
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        yield from whole
        if len(rest) > MAX_REPLY_BYTES:
            return
    yield rest


def parsed_json(content: bytes | str) -> Any:
    """Return a JSON value; None for anything else."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def bounded(pieces: Iterator[bytes]) -> bytes:
    """Return the bytes of an error, at most as many as an answer may have."""
    data = bytearray()
    for piece in pieces:
        data += piece
        if len(data) > MAX_REPLY_BYTES:
            break
    return bytes(data)


def _broken(error: httpx2.HTTPError) -> ApiFailure:
    if isinstance(error, httpx2.TimeoutException) and not isinstance(error, httpx2.ConnectTimeout):
        return ApiFailure("timeout")
    return ApiFailure("unreachable", type(error).__name__)


async def together(requests: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Return the results of concurrent requests; all of them end before the first error is raised."""
    found = await asyncio.gather(*requests, return_exceptions=True)
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return [one for one in found if not isinstance(one, BaseException)]
