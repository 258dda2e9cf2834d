"""Bodies and headers of clients that mean harm: an answer, or an error with a known code, never a server fault."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from llava.serve.failures import CODES
from tests.serve.test_controller import controller
from tests.serve.test_worker import CHAT, GENERATE, HELLO, OLD, frames_of, with_image, worker
from tests.support.served import ScriptedEngine

TEXT = b'"messages": [{"role": "user", "content": "a"}]'
SECRET = "MUELLER ANNA"


def chat(**fields: Any) -> bytes:
    return json.dumps({**HELLO, **fields}).encode()


def nested(depth: int, start: str = "[", end: str = "]") -> bytes:
    return b'{"model": "scripted", "messages": ' + (start * depth + end * depth).encode() + b"}"


def content(value: Any) -> bytes:
    return chat(messages=[{"role": "user", "content": value}])


BODIES: dict[str, bytes] = {
    "empty": b"",
    "blank": b" \n\t",
    "zero bytes": b"\0" * 100,
    "not json": b"model=scripted&messages=a",
    "half": chat()[:-20],
    "two values": chat() + chat(),
    "array": b"[" + chat() + b"]",
    "text": b'"' + b"a" * 1000 + b'"',
    "null": b"null",
    "number": b"1e400",
    "utf-16": chat().decode().encode("utf-16"),
    "latin-1": '{"model": "scripted", "messages": [{"role": "user", "content": "für"}]}'.encode("latin-1"),
    "byte order mark": b"\xef\xbb\xbf" + chat(),
    "deep arrays": nested(50_000),
    "deep objects": nested(50_000, '{"a":', "}"),
    "deep and open": b'{"messages": ' + b"[" * 100_000,
    "deep metadata": b'{"model": "scripted", ' + TEXT + b', "metadata": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001,
    "nan": b'{"model": "scripted", ' + TEXT + b', "temperature": NaN}',
    "infinity": b'{"model": "scripted", ' + TEXT + b', "top_p": Infinity}',
    "minus infinity": b'{"model": "scripted", ' + TEXT + b', "presence_penalty": -Infinity}',
    "huge exponent": b'{"model": "scripted", ' + TEXT + b', "temperature": 1e999}',
    "huge whole number": b'{"model": "scripted", ' + TEXT + b', "max_tokens": ' + b"9" * 4000 + b"}",
    "more digits than python reads": b'{"model": "scripted", ' + TEXT + b', "seed": ' + b"9" * 10_000 + b"}",
    "seed of 2^64": chat(seed=2**64),
    "negative seed": chat(seed=-(2**70)),
    "n of 10^9": chat(n=10**9),
    "n of 0": chat(n=0),
    "n that is true": chat(n=True),
    "negative tokens": chat(max_tokens=-1),
    "tokens that are text": chat(max_tokens="16"),
    "temperature that is an object": chat(temperature={"a": 1}),
    "stop of objects": chat(stop=[{"a": 1}]),
    "100,000 stops": chat(stop=["a"] * 100_000),
    "stop of a million letters": chat(stop="a" * 1_000_000),
    "stream that is text": chat(stream="yes"),
    "model that is a list": chat(model=["scripted"]),
    "model of a million letters": chat(model="m" * 1_000_000),
    "model that is a path": chat(model="../../etc/passwd"),
    "model with control characters": chat(model="a\r\nSet-Cookie: b=c\x1b]0;x\x07"),
    "messages that are an object": chat(messages={"role": "user"}),
    "messages of null": chat(messages=[None]),
    "no messages": chat(messages=[]),
    "100,000 messages": chat(messages=[{"role": "user", "content": "a"}] * 100_000),
    "message without role": chat(messages=[{"content": SECRET}]),
    "unknown role": chat(messages=[{"role": SECRET, "content": "a"}]),
    "role that is a number": chat(messages=[{"role": 1, "content": "a"}]),
    "content that is a number": content(1),
    "content that is true": content(True),
    "content of empty parts": content([{}]),
    "content of unknown parts": content([{"type": SECRET, "text": "a"}]),
    "content of nested lists": content([[[["a"]]]]),
    "surrogate": b'{"model": "scripted", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "surrogate name": b'{"model": "scripted", "messages": [{"role": "user", "content": "a", "\\udc00": 1}]}',
    "null character": content("a\0b"),
    "a million letters": content("a" * 1_000_000),
    "image marks": content("<image>" * 10_000),
    "image url that is a list": content([{"type": "image_url", "image_url": {"url": []}}]),
    "image of a file": json.dumps(with_image("file:///etc/passwd")).encode(),
    "image of a host": json.dumps(with_image("http://169.254.169.254/latest/meta-data")).encode(),
    "image that is no base64": json.dumps(with_image("data:image/png;base64,@@@" + SECRET)).encode(),
    "image that is no image": json.dumps(with_image("data:image/png;base64,QUJD")).encode(),
    "image of a gif bomb": json.dumps(with_image("data:image/gif;base64,R0lGODlh//////////8=")).encode(),
    "1,000 images": content([{"type": "image_url", "image_url": {"url": "data:,"}}] * 1000),
    "repeated names": b'{"model": "scripted", "model": "other", ' + TEXT + b', "messages": []}',
    "tools": chat(tools=[{"type": "function", "function": {"name": SECRET}}]),
    "unknown field": chat(other=SECRET),
    "field of a million letters": chat(**{"f" * 1_000_000: 1}),
    "field with control characters": chat(**{"a\x1b]0;x\x07\n": 1}),
    "logit bias of text": chat(logit_bias={"a": "b"}),
    "logit bias of a huge token": chat(logit_bias={"9" * 30: 1}),
    "logprobs of a million": chat(logprobs=True, top_logprobs=1_000_000),
    "response format": chat(response_format={"type": "json_schema", "json_schema": {"a": [1] * 1000}}),
    "metadata of lists": chat(metadata={"a": [1]}),
    "user of a list": chat(user=["a"]),
}  # fmt: skip

HEADERS: dict[str, dict[str, str]] = {
    "form": {"Content-Type": "application/x-www-form-urlencoded"},
    "multipart without boundary": {"Content-Type": "multipart/form-data"},
    "xml": {"Content-Type": "application/xml"},
    "unknown charset": {"Content-Type": "application/json; charset=utf-99"},
    "utf-16": {"Content-Type": "application/json; charset=utf-16"},
    "no type": {"Content-Type": ""},
    "gzip": {"Content-Encoding": "gzip"},
    "unknown encoding": {"Content-Encoding": "br, gzip, zstd"},
    "accept nothing": {"Accept": "image/png;q=0"},
    "bearer of nothing": {"Authorization": "Bearer"},
    "basic": {"Authorization": "Basic Ojo6"},
    "bearer of a million": {"Authorization": "Bearer " + "a" * 50_000},
    "forwarded": {"X-Forwarded-For": "a, b\tc", "X-Request-Id": SECRET * 100},
    "range": {"Range": "bytes=0-1,5-"},
    "expect": {"Expect": "200-ok"},
    "upgrade": {"Connection": "Upgrade", "Upgrade": "websocket"},
    "method override": {"X-HTTP-Method-Override": "DELETE"},
    "host": {"Host": "other.example:99999"},
}


@contextlib.contextmanager
def any_controller() -> Iterator[httpx2.Client]:
    with controller(ScriptedEngine()) as (client, _):
        yield client


@pytest.fixture(scope="module", params=[worker, any_controller], ids=["worker", "controller"])
def client(request: pytest.FixtureRequest) -> Iterator[httpx2.Client]:
    with request.param() as made:
        yield made


def check_error(response: httpx2.Response) -> None:
    """Check that an answer is no fault of the server, and an error has the one body of all errors."""
    assert response.status_code < 500, response.text[:500]
    if response.status_code >= 400:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert CODES[error["code"]] == (response.status_code, error["type"])
        assert error["message"] and len(error["message"]) < 1000 and error["message"].isprintable()
        assert SECRET not in error["message"] and "Traceback" not in response.text


@pytest.mark.parametrize("name", BODIES)
def test_any_chat_body_is_answered_or_refused(client: httpx2.Client, name: str) -> None:
    check_error(client.post(CHAT, content=BODIES[name], headers={"Content-Type": "application/json"}))


@pytest.mark.parametrize("name", BODIES)
def test_any_body_of_the_old_protocol_is_answered_or_refused(client: httpx2.Client, name: str) -> None:
    response = client.post(GENERATE, content=BODIES[name].replace(b'"messages"', b'"prompt"'))
    assert response.status_code < 500, response.text[:500]
    last = frames_of(response.content)[-1]
    assert last["error_code"] == 0 or CODES[last["detail"]][0] < 500 or last["detail"] == "no_worker"
    assert len(last["text"]) < 1000 or last["error_code"] == 0
    assert SECRET not in last["text"] or last["error_code"] == 0


@pytest.mark.parametrize("name", HEADERS)
def test_odd_headers_are_no_fault_of_the_server(client: httpx2.Client, name: str) -> None:
    check_error(client.post(CHAT, content=chat(), headers={"Content-Type": "application/json", **HEADERS[name]}))


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "FOO"])
@pytest.mark.parametrize("path", [CHAT, GENERATE, "/v1/models", "/v1/none", "/v1/models/%00", "/..%2f..%2fetc/passwd"])
def test_other_methods_and_paths(client: httpx2.Client, method: str, path: str) -> None:
    check_error(client.request(method, path))


RAW = [
    b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
    b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
    b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nZZZ\r\n",
    b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: a\r\nContent-Length: 9999999999999\r\n\r\n{}",
    b"GET / HTTP/9.9\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"A" * 100_000,
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
]


@pytest.mark.parametrize("number", range(len(RAW)))
def test_broken_requests_leave_the_server_well(client: httpx2.Client, number: int) -> None:
    with (
        contextlib.suppress(OSError),
        socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=5) as made,
    ):
        made.sendall(RAW[number])
        made.shutdown(socket.SHUT_WR)
        answer = made.recv(4096)
        assert not answer or b" 5" not in answer.split(b"\r\n", 1)[0][:13]
    assert client.post(CHAT, json=HELLO).status_code == 200
    assert frames_of(client.post(GENERATE, json=OLD).content)[-1]["error_code"] == 0
