"""A server of another make with the OpenAI protocol: refuses what it is told to, fails on demand, keeps every request.

with serve(refuses=("n", "top_k")) as server:       server.url, server.bodies
    server.script += [Step(429, {"Retry-After": "1"}), Step(None)]      the next two requests; None: closes
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.support.local_server import LocalHandler, LocalState, running

MODEL = "other/model"


@dataclass(frozen=True)
class Step:
    """What happens to one request: a status (None closes the connection), headers, and a body."""

    status: int | None
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None


def words_of(body: dict[str, Any]) -> str:
    """Return the text of the last message."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else " ".join(part.get("text", "") for part in content).strip()


@dataclass
class ForeignServer(LocalState):
    """State of the server.

    Attributes:
        refuses: fields that are refused, with the name in the message only.
        ignores: fields that are ignored in silence.
        script: what happens to the next requests, in order.
        answer: returns the text of an answer and its fields from a body and the number of the choice.
        bodies: bodies of all requests.
        times: when they came.
        pause: seconds before each answer.
        lists_no_models: whether GET /v1/models is refused.
        keys: values of their header `Authorization`.
    """

    refuses: tuple[str, ...] = ()
    ignores: tuple[str, ...] = ()
    script: list[Step] = field(default_factory=list)
    answer: Callable[[dict[str, Any], int], dict[str, Any]] = lambda body, number: {"text": f" to {words_of(body)}\n"}
    pause: float = 0.0
    lists_no_models: bool = False
    bodies: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Base URL."""
        return self.address


class Handler(LocalHandler):
    """Handler of a connection."""

    state: ForeignServer

    def do_GET(self) -> None:
        """List the models."""
        if self.state.lists_no_models:
            self._send(405, {"detail": "Method Not Allowed"})
            return
        self._send(200, {"data": [{"id": MODEL, "object": "model", "owned_by": "vllm", "max_model_len": 4096}]})

    def do_POST(self) -> None:
        """Answer a request as the script says, or as asked."""
        state, body = self.state, json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
        if not self.path.endswith("/chat/completions"):
            self._send(404, {"detail": "Not Found"})
            return
        with state.lock:
            state.bodies.append(body)
            state.times.append(time.monotonic())
            state.keys.append(self.headers.get("Authorization"))
            step = state.script.pop(0) if state.script else None
        with self.counted():
            state.stopped.wait(state.pause)
            if step is not None and step.status is None:
                self.close_connection = True
                return
            if step is not None:
                self._send(step.status or 200, step.body or {"error": {"message": "no"}}, step.headers)
                return
            refused = next((name for name in state.refuses if name in body), None)
            if refused is not None:
                self._send(400, {"error": {"message": f"Unrecognized argument supplied: '{refused}'", "code": None}})
                return
            body = {name: value for name, value in body.items() if name not in state.ignores}
            self._answer(body)

    def _answer(self, body: dict[str, Any]) -> None:
        choices = []
        for number in range(body.get("n", 1)):
            made = {"finish_reason": "stop", **self.state.answer(body, number)}
            message = {"role": "assistant", "content": made.pop("text")}
            choices.append({"index": number, "message": message, **made})
        prompt = {"prompt_token_ids": choices[0].pop("prompt_ids")} if "prompt_ids" in choices[0] else {}
        if not body.get("stream"):
            self._send(200, {"choices": choices, **prompt})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for character in choices[0]["message"]["content"]:
            chunk = {"choices": [{"index": 0, "delta": {"content": character}, "finish_reason": None}]}
            self.wfile.write(b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n")
        if choices[0]["finish_reason"] is None:
            self.close_connection = True
            return
        last = {"choices": [{"index": 0, "delta": {}, "finish_reason": choices[0]["finish_reason"]}]}
        self.wfile.write(b": note\n\ndata:" + json.dumps(last).encode() + b"\n\ndata: [DONE]\n\n")
        self.close_connection = True

    def _send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextlib.contextmanager
def serve(**settings: Any) -> Iterator[ForeignServer]:
    """Run a server on a free port."""
    state = ForeignServer(address="/v1", **settings)
    with running(Handler, state):
        yield state
