"""A local chat endpoint that speaks the OpenAI protocol and replays answers; it misbehaves on demand.

    with serve(answer) as endpoint:                     answer(messages) -> text, or a Fault
        endpoint.address                                http://127.0.0.1:PORT/v1
        endpoint.faults = [Fault(status=429), ...]      the first is used up by the first request, and so on
        endpoint.calls                                  every request as it came

Azure's addresses (`/openai/deployments/NAME/chat/completions?api-version=...`) are served too. `environment(endpoint)`
is the environment of a subprocess that is to ask it, and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.support.local_server import LocalHandler, LocalState, running

KEY = "sk-fake-0123456789abcdef"
MODEL = "fake-model"

Message = dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """Fault in the answer to a request.

    Attributes:
        status: HTTP status; 200 with `body`, `finish_reason` or `stall` for defective answers.
        headers: further headers, such as `Retry-After` or `x-ratelimit-remaining-requests`.
        code: `error.code` of the body.
        param: `error.param` of the body.
        body: bytes sent instead of the answer.
        finish_reason: value instead of `stop` (`length` is a truncated answer).
        text: text instead of that of the answer.
        stall: seconds before anything is sent.
        cut_after: bytes of the body after which the connection closes, although all were announced.
    """

    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    code: str = ""
    param: str = ""
    body: bytes | None = None
    finish_reason: str = "stop"
    text: str | None = None
    stall: float = 0.0
    cut_after: int | None = None


Answer = Callable[[list[Message]], "str | Fault"]


@dataclass(frozen=True)
class Call:
    """Received request."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    time: float

    @property
    def question(self) -> str:
        """Text of the last message."""
        return str(self.body["messages"][-1]["content"])


@dataclass
class FakeEndpoint(LocalState):
    """Answers, faults and log of the endpoint.

    Attributes:
        answer: from messages to the text, or to a fault.
        faults: used up by requests in order of arrival, before `answer` is asked.
        key: when set, a request with another key gets status 401 (and a body that quotes key and prompt).
        usage: whether answers state their tokens: one a word.
        pause: seconds each answer takes.
        headers: sent with every good answer.
    """

    answer: Answer
    faults: list[Fault] = field(default_factory=list)
    key: str = ""
    usage: bool = True
    pause: float = 0.0
    headers: tuple[tuple[str, str], ...] = ()
    calls: list[Call] = field(default_factory=list)

    @property
    def root(self) -> str:
        """URL without `/v1`, as in the settings of Azure."""
        return self.address.removesuffix("/v1")


def num_tokens(messages: Sequence[Message]) -> int:
    """Return the number of words of all messages, the token count of the fake."""
    return sum(len(str(message["content"]).split()) for message in messages)


class Handler(LocalHandler):
    """Handler of a connection."""

    state: FakeEndpoint

    def do_POST(self) -> None:
        """Answer one request."""
        state = self.state
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", "0"))))
        headers = {name.lower(): value for name, value in self.headers.items()}
        with state.lock:
            state.calls.append(Call(self.path, headers, body, time.monotonic()))
            fault = state.faults.pop(0) if state.faults else None
        with self.counted():
            self._answer(body, headers, fault)

    def _answer(self, body: dict[str, Any], headers: Mapping[str, str], fault: Fault | None) -> None:
        state = self.state
        given = headers.get("api-key") or headers.get("authorization", "").removeprefix("Bearer ")
        messages = body["messages"]
        if not self._known_path():
            self._error(Fault(404, code="not_found"), body)
            return
        if state.key and given != state.key:
            self._error(Fault(401, code="invalid_api_key"), {"key": given, **body})
            return
        found: str | Fault = state.answer(messages) if fault is None else fault
        fault = found if isinstance(found, Fault) else Fault(text=found, headers=state.headers)
        state.stopped.wait(fault.stall + state.pause)
        if fault.status != 200:
            self._error(fault, body)
            return
        text = state.answer(messages) if fault.text is None and fault.body is None else fault.text
        self._send(fault, completion(text, fault, body, usage=state.usage) if fault.body is None else fault.body)

    def _known_path(self) -> bool:
        parts = urlsplit(self.path)
        if parts.path == "/v1/chat/completions":
            return True
        azure = parts.path.startswith("/openai/deployments/") and parts.path.endswith("/chat/completions")
        return azure and "api-version" in parse_qs(parts.query)

    def _error(self, fault: Fault, quoted: Mapping[str, Any]) -> None:
        """Send an error that quotes the request, as servers do."""
        error = {"message": f"quoted: {json.dumps(quoted)}", "type": "error", "code": fault.code, "param": fault.param}
        self._send(fault, json.dumps({"error": error}).encode() if fault.body is None else fault.body)

    def _send(self, fault: Fault, content: bytes) -> None:
        self.send_response(fault.status)
        for name, value in fault.headers:
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: fault.cut_after])
        if fault.cut_after is not None:
            self.close_connection = True


def completion(text: object, fault: Fault, body: Mapping[str, Any], *, usage: bool) -> bytes:
    """Return the body of a chat completion."""
    answer: dict[str, Any] = {
        "id": "chatcmpl-fake",
        "object": "chat.completion",
        "created": 0,
        "model": body["model"],
        "choices": [
            {"index": 0, "finish_reason": fault.finish_reason, "message": {"role": "assistant", "content": text}}
        ],
    }
    if usage:
        prompt, words = num_tokens(body["messages"]), len(str(text).split())
        answer["usage"] = {"prompt_tokens": prompt, "completion_tokens": words, "total_tokens": prompt + words}
    return json.dumps(answer).encode()


@contextlib.contextmanager
def serve(answer: Answer) -> Iterator[FakeEndpoint]:
    """Run an endpoint on a free port."""
    state = FakeEndpoint(answer, address="/v1")
    with running(Handler, state):
        yield state


def environment(endpoint: FakeEndpoint, **more: str) -> dict[str, str]:
    """Return the environment of this process with `endpoint` as the only endpoint."""
    kept = {name: value for name, value in os.environ.items() if "OPENAI" not in name and "PROXY" not in name.upper()}
    return (
        kept
        | {
            "OPENAI_API_KEY": KEY,
            "OPENAI_BASE_URL": endpoint.address,
            "OPENAI_MODEL": MODEL,
            "OMP_NUM_THREADS": "1",
        }
        | more
    )
