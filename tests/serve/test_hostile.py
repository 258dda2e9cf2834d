"""Clients that mean harm: names that no body can hold, bodies without end, too many bodies, endless lists."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from llava.generation.protocol import Sampling
from llava.generation.sampling import TokenDraw
from llava.serve import answering
from llava.serve.gate import GateSettings
from tests.serve.test_controller import controller
from tests.serve.test_worker import CHAT, GENERATE, HELLO, frames_of, png, with_image, worker
from tests.support.served import ScriptedEngine
from tests.support.waiting import until


@contextlib.contextmanager
def unfinished(client: httpx2.Client) -> Iterator[socket.socket]:
    """Yield a connection that has sent the head of a chat request and none of its body."""
    host, port = client.base_url.host, client.base_url.port
    with socket.create_connection((host, port or 80)) as made:
        made.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 99\r\n\r\n".encode())
        yield made


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "scripted", "messages": [{"role": "user", "content": "a"}], "\\ud800": 1}',
        b'{"model": "scripted", "messages": [{"role": "user", "content": "a", "\\udfff": 1}]}',
        b'{"model": "\\ud800", "messages": [{"role": "user", "content": "a"}]}',
        b'{"model": "scripted", "messages": [{"role": "user", "content": "a"}], "metadata": {"\\ud800": "b"}}',
    ],
)
def test_names_with_unpaired_surrogates_are_refused(body: bytes) -> None:
    with worker() as client:
        response = client.post(CHAT, content=body)
        assert response.status_code == 400
        assert response.json()["error"]["code"] in ("unknown_parameter", "invalid_value", "invalid_content")


def test_a_body_without_end_is_given_up() -> None:
    engine = ScriptedEngine()
    with worker(engine, gate=GateSettings(body_seconds=1.0)) as client, unfinished(client) as made:
        made.settimeout(120)
        answer = b""
        while b"timeout" not in answer and (piece := made.recv(4096)):
            answer += piece
        assert b" 504 " in answer.split(b"\r\n", 1)[0] and b'"timeout"' in answer
        assert client.post(CHAT, json=HELLO).status_code == 200 and len(engine.prompts) == 1


def test_bodies_that_are_read_are_counted() -> None:
    with worker(max_running=1, max_waiting=0) as client:
        with unfinished(client):
            assert until(lambda: client.post(CHAT, json=HELLO).status_code == 429)
            refused = client.post(GENERATE, json={"prompt": "a"})
            assert refused.status_code == 429 and frames_of(refused.content)[0]["detail"] == "queue_full"
        assert until(lambda: client.post(CHAT, json=HELLO).status_code == 200)


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": ""}] * 5000},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 5000}]},
        {"metadata": {str(number): "" for number in range(65)}},
        {"repetition_penalty": 1e-300},
    ],
)
def test_endless_lists_and_extreme_numbers_are_refused(fields: dict[str, Any]) -> None:
    with worker() as client:
        response = client.post(CHAT, json={**HELLO, **fields})
        assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_value")


def test_a_temperature_that_divides_to_infinity_is_greedy() -> None:
    assert TokenDraw(Sampling(temperature=1e-300, seed=0)).is_greedy
    assert not TokenDraw(Sampling(temperature=1e-3, seed=0)).is_greedy


@pytest.mark.parametrize("serve", [worker, controller], ids=["worker", "controller"])
def test_the_openapi_document_defines_every_parameter_of_a_path(serve: Any) -> None:
    with serve() as found:
        client = found if isinstance(found, httpx2.Client) else found[0]
        paths = client.get("/openapi.json").json()["paths"]
    assert "/v1/models/{name}" in paths
    for path, operations in paths.items():
        for operation in operations.values():
            defined = {one["name"] for one in operation.get("parameters", []) if one["in"] == "path"}
            assert defined == set(re.findall(r"{(\w+)}", path)), path


def test_a_client_hears_that_its_images_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = threading.Event()
    monkeypatch.setattr(answering, "read_images", lambda *_, **__: heard.wait(120) and ())
    monkeypatch.setattr("llava.serve.openai_server.WAIT_SECONDS", 0.1)
    body = {**HELLO, **with_image(f"data:image/png;base64,{png()}"), "stream": True}
    with worker() as client, client.stream("POST", CHAT, content=json.dumps(body).encode()) as response:
        text = ""
        for piece in response.iter_text():
            text += piece
            heard.set()
        assert text.startswith(": wait") and text.endswith("data: [DONE]\n\n")


def test_reading_counts_for_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "read_images", lambda *_, **__: time.sleep(0.6) or ())
    body = {**HELLO, **with_image(f"data:image/png;base64,{png()}")}
    with worker(request_seconds=0.2) as client:
        response = client.post(CHAT, json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
