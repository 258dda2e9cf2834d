"""HTTP client of a controller or a worker, for workers, commands, the page and tests.

Importing this module does not load torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, Iterator, Mapping
from typing import Any

import httpx2

from llava.constants import SERVER_KEY_VARIABLE
from llava.errors import GenerationError, LlavaError
from llava.serve.keys import CLUSTER_HEADER

KEY_VARIABLE = SERVER_KEY_VARIABLE
"""Environment variable with the key of a client."""

CONNECT_SECONDS, ANSWER_SECONDS = 5.0, 10.0


class ServerUnavailable(LlavaError, ConnectionError):
    """Server that does not answer, or not in its protocol."""


class ServerRefusal(GenerationError):
    """Error that a server answered with.

    Attributes:
        code: code of the error.
        status: HTTP status.
    """

    def __init__(self, message: str, *, code: str, status: int) -> None:
        super().__init__(message)
        self.code = code
        self.status = status


def client_headers(cluster_key: str = "") -> dict[str, str]:
    """Return the headers of every request: the key of `LLAVA_API_KEY`, and that of the cluster."""
    headers = {"User-Agent": "LLaVA Client"}
    if key := os.environ.get(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {key}"
    return headers | ({CLUSTER_HEADER: cluster_key} if cluster_key else {})


class ServerClient:
    """Client of one server; any thread may use it."""

    def __init__(self, url: str, *, cluster_key: str = "") -> None:
        """Talk to the server at `url`; nothing is sent yet."""
        self.url = url.rstrip("/")
        self._http = httpx2.Client(
            headers=client_headers(cluster_key),
            timeout=httpx2.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS),
            trust_env=False,
        )

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Return the JSON that a route answers.

        Raises:
            ServerUnavailable: the server cannot be reached, or answers no JSON.
            ServerRefusal: it answers with an error.
        """
        return self._json("POST", path, body)

    def get(self, path: str) -> Any:
        """Return the JSON that a route answers; errors are those of `post`."""
        return self._json("GET", path, None)

    def refresh(self) -> None:
        """Let a controller ask its workers again."""
        self.post("/refresh_all_workers")

    def models(self) -> list[str]:
        """Return the sorted model names of a controller or of another OpenAI-protocol server."""
        try:
            found = self.post("/list_models")
            names = found.get("models") if isinstance(found, dict) else None
        except ServerRefusal as error:
            if error.status != 404:
                raise
            found = self.get("/v1/models")
            rows = found.get("data") if isinstance(found, dict) else None
            names = [row["id"] for row in rows if isinstance(row, dict) and "id" in row] if rows else rows
        if not isinstance(names, list):
            raise ServerUnavailable(f"{self.url} does not answer like a controller")
        return sorted(str(name) for name in names)

    def is_known(self, worker: str) -> bool:
        """Return whether a controller knows a worker, by a heartbeat in its name."""
        found = self.post("/receive_heart_beat", {"worker_name": worker, "queue_length": 0})
        return isinstance(found, dict) and found.get("exist") is True

    def worker_address(self, model: str) -> str:
        """Return the URL of a worker for a model; "" without one."""
        found = self.post("/get_worker_address", {"model": model})
        return str(found.get("address", "")) if isinstance(found, dict) else ""

    def stream_prompt(self, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the frames of an answer in the old protocol.

        Raises:
            ServerUnavailable: the server cannot be reached, or the connection breaks.
            ServerRefusal: the request failed.
        """
        for found in split_frames(self._pieces("/worker_generate_stream", body)):
            if found.get("error_code"):
                detail = str(found.get("detail", "internal_error"))
                raise ServerRefusal(str(found.get("text", "")), code=detail, status=200)
            yield found

    def stream_chat(self, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the chunks of a chat completion; closing the iterator cancels it.

        Raises:
            ServerUnavailable: the server cannot be reached, or the connection breaks.
            ServerRefusal: the request failed.
        """
        is_done = False
        for line in _lines(self._pieces("/v1/chat/completions", {**body, "stream": True})):
            if line == b"data: [DONE]":
                is_done = True
            elif line.startswith(b"data: "):
                yield _chunk_of(line)
        if not is_done:
            raise ServerUnavailable(f"{self.url} closed the connection in the middle of an answer")

    def _pieces(self, path: str, body: Mapping[str, Any]) -> Iterator[bytes]:
        timeout = httpx2.Timeout(None, connect=CONNECT_SECONDS)
        try:
            with self._http.stream("POST", self.url + path, json=dict(body), timeout=timeout) as response:
                is_frame = response.headers.get("content-type", "").startswith("application/octet-stream")
                if response.status_code != 200 and not is_frame:
                    response.read()
                    raise _refusal(_parsed(response, self.url), response.status_code)
                yield from response.iter_bytes()
        except httpx2.HTTPError as error:
            raise ServerUnavailable(f"{self.url} does not answer ({type(error).__name__})") from None

    def _json(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        try:
            response = self._http.request(method, self.url + path, json=None if body is None else dict(body))
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise ServerUnavailable(f"{self.url} does not answer ({type(error).__name__})") from None
        found = _parsed(response, self.url)
        if response.status_code != 200:
            raise _refusal(found, response.status_code)
        return found


async def chat_chunks(url: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
    """Yield chat completion chunks like `ServerClient.stream_chat`; closing the generator cancels it.

    Raises:
        ServerUnavailable: the server cannot be reached, or the connection breaks.
        ServerRefusal: the request failed.
    """
    timeout = httpx2.Timeout(None, connect=CONNECT_SECONDS)
    rest, is_done = b"", False
    try:
        async with (
            httpx2.AsyncClient(headers=client_headers(), timeout=timeout, trust_env=False) as http,
            http.stream("POST", f"{url}/v1/chat/completions", json={**body, "stream": True}) as response,
        ):
            if response.status_code != 200:
                await response.aread()
                raise _refusal(_parsed(response, url), response.status_code)
            async for piece in response.aiter_bytes():
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    is_done = is_done or line == b"data: [DONE]"
                    if line.startswith(b"data: {"):
                        yield _chunk_of(line)
    except httpx2.HTTPError as error:
        raise ServerUnavailable(f"{url} does not answer ({type(error).__name__})") from None
    if not is_done:
        raise ServerUnavailable(f"{url} closed the connection in the middle of an answer")


def _chunk_of(line: bytes) -> dict[str, Any]:
    chunk: dict[str, Any] = json.loads(line.removeprefix(b"data: "))
    if "error" in chunk:
        raise _refusal(chunk, 200)
    return chunk


def _parsed(response: httpx2.Response, url: str) -> Any:
    try:
        return response.json()
    except ValueError:
        raise ServerUnavailable(f"{url} answers with status {response.status_code} and no JSON") from None


def _refusal(found: Any, status: int) -> ServerRefusal:
    error = found.get("error") if isinstance(found, dict) else None
    fields = error if isinstance(error, dict) else {}
    message = str(fields.get("message", f"the server answered with status {status}"))
    return ServerRefusal(message, code=str(fields.get("code", "internal_error")), status=status)


def split_frames(pieces: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the messages of frames of JSON that end with a zero byte."""
    rest = b""
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\0")
        for message in whole:
            if message:
                yield json.loads(message)


def _lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        yield from (line for line in whole if line)
