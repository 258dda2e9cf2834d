"""A worker on a scripted engine over real sockets: both protocols, every class of error, limits, clients that leave."""

from __future__ import annotations

import base64
import gc
import io
import itertools
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

from llava.errors import DataError, GenerationError, MemoryLimitError, NotUnicodeError, PromptTooLongError
from llava.serve.audit import AuditLog, check_chain
from llava.serve.client import split_frames
from llava.serve.gate import GateSettings
from llava.serve.keys import KeyRing
from llava.serve.messages import ImageInput
from llava.serve.schemas import ImageUrl
from llava.serve.worker import make_worker_app, model_name, problem_of
from tests.support.served import MODEL, ScriptedEngine, WordTokenizer, scripted_app, scripted_service, served
from tests.support.waiting import until

HELLO: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
OLD: dict[str, Any] = {"model": MODEL, "prompt": "USER: Hi ASSISTANT:"}
CHAT, GENERATE = "/v1/chat/completions", "/worker_generate_stream"


def png() -> str:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def with_image(url: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


@contextmanager
def worker(engine: Any = None, **settings: Any) -> Iterator[httpx2.Client]:
    app = scripted_app(engine or ScriptedEngine(), **settings)
    with served(app) as url, httpx2.Client(base_url=url, timeout=120, trust_env=False) as client:
        yield client


def data_of(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def frames_of(content: bytes) -> list[dict[str, Any]]:
    return list(split_frames(iter([content])))


def metric(client: httpx2.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


@pytest.fixture(scope="module")
def plain() -> Iterator[httpx2.Client]:
    """A worker that answers "Hello world"."""
    with worker() as client:
        yield client


def test_models_are_described(plain: httpx2.Client) -> None:
    [entry] = plain.get("/v1/models").json()["data"]
    assert (entry["id"], entry["max_model_len"], entry["template"], entry["weights"]) == (MODEL, 100, "v1", "abc")
    assert plain.get(f"/v1/models/{MODEL}").json() == entry


def test_a_whole_answer(plain: httpx2.Client) -> None:
    body = {**HELLO, "n": 2, "logprobs": True, "return_token_ids": True, "temperature": 1}
    response = plain.post(CHAT, json=body)
    found = response.json()
    assert response.status_code == 200 and found["object"] == "chat.completion"
    assert [choice["message"]["content"] for choice in found["choices"]] == ["Hello world"] * 2
    assert [choice["finish_reason"] for choice in found["choices"]] == ["stop"] * 2
    assert [entry["token"] for entry in found["choices"][0]["logprobs"]["content"]] == ["t1", "t2"]
    assert found["choices"][1]["token_ids"] == [1, 2] and found["prompt_token_ids"] == [7, 8, 9]
    assert found["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


def test_a_streamed_answer(plain: httpx2.Client) -> None:
    response = plain.post(CHAT, json={**HELLO, "stream": True, "stream_options": {"include_usage": True}})
    *chunks, usage, done = data_of(response.text)
    assert done == "[DONE]" and usage["choices"] == [] and usage["usage"]["completion_tokens"] == 2
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "Hello world"
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1 and chunks[0]["object"] == "chat.completion.chunk"


def test_frames_of_the_old_protocol(plain: httpx2.Client) -> None:
    frames = frames_of(plain.post(GENERATE, json=OLD).content)
    texts = [frame["text"] for frame in frames]
    assert texts[-1] == OLD["prompt"] + "Hello world" and {frame["error_code"] for frame in frames} == {0}
    assert all(later.startswith(text) for text, later in itertools.pairwise(texts))
    assert frames[-1]["finish_reason"] == "stop" and frames[-1]["usage"]["completion_tokens"] == 2
    assert plain.post("/worker_get_status").json() == {"model_names": [MODEL], "speed": 1, "queue_length": 0}


def test_the_engine_gets_the_prompt_as_it_was_sent() -> None:
    engine = ScriptedEngine()
    with worker(engine) as client:
        client.post(GENERATE, json={**OLD, "prompt": "A <image> B", "images": [png()], "temperature": 0.0001})
        client.post(CHAT, json={**HELLO, "max_tokens": 5})
    (raw, greedy), (chat, limited) = engine.prompts
    assert raw.rendered == "A <image> B" and len(raw.images) == 1 and greedy.temperature == 0
    assert chat.rendered is None and chat.conversation.turns[0].text == "Hello" and limited.max_new_tokens == 5


BAD: list[tuple[dict[str, Any], int, str]] = [
    ({"foo": 1}, 400, "unknown_parameter"),
    ({"tools": [{"type": "function"}]}, 400, "unsupported_parameter"),
    ({"temperature": "hot"}, 400, "invalid_value"),
    ({"max_tokens": 101}, 400, "invalid_value"),
    ({"model": "other"}, 404, "model_not_found"),
    ({"messages": [{"role": "user", "content": "an <image>"}]}, 400, "invalid_content"),
    ({"messages": [{"role": "user", "content": "end</s>"}]}, 400, "invalid_content"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "invalid_content"),
    ({"messages": [{"role": "user", "content": "a" * 1601}]}, 400, "context_length_exceeded"),
    (with_image("data:image/png;base64,%%"), 400, "bad_base64"),
    (with_image("data:image/png;base64,AAAA"), 400, "bad_image"),
    (with_image("http://127.0.0.1:9/a.png"), 400, "image_url_not_allowed"),
    (with_image("file:///etc/passwd"), 400, "image_url_not_allowed"),
]


@pytest.mark.parametrize(("fields", "status", "code"), BAD, ids=[f"{i}-{row[2]}" for i, row in enumerate(BAD)])
@pytest.mark.parametrize("stream", [False, True])
def test_refused_chats(plain: httpx2.Client, fields: dict[str, Any], status: int, code: str, stream: bool) -> None:
    body = json.dumps({**HELLO, **fields, "stream": stream}).encode()
    response = plain.post(CHAT, content=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert error.keys() == {"message", "type", "param", "code"} and error["message"]
    assert "x-request-id" in response.headers


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_limit_that_is_above_the_context_is_named(plain: httpx2.Client, name: str) -> None:
    error = plain.post(CHAT, json={**HELLO, name: 101}).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_value", name) and error["message"].startswith(f"{name} is 101")


@pytest.mark.parametrize(
    ("request_line", "body", "status", "code"),
    [
        (("POST", CHAT), b"{", 400, "invalid_json"),
        (("POST", CHAT), b"[]", 400, "invalid_json"),
        (("GET", CHAT), None, 405, "method_not_allowed"),
        (("GET", "/v1/nothing"), None, 404, "not_found"),
        (("GET", "/v1/models/other"), None, 404, "model_not_found"),
        (("POST", f"{CHAT}/"), b"{}", 404, "not_found"),
        (("GET", "/health/"), None, 404, "not_found"),
    ],
)
def test_refused_requests(
    plain: httpx2.Client, request_line: tuple[str, str], body: bytes | None, status: int, code: str
) -> None:
    response = plain.request(*request_line, content=body)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [
        (b"{", 400, "invalid_json"),
        (b"[]", 400, "invalid_json"),
        (json.dumps({**OLD, "model": "other"}).encode(), 200, "model_not_found"),
        (json.dumps({**OLD, "prompt": 5}).encode(), 200, "invalid_value"),
        (json.dumps({**OLD, "prompt": "two <image> <image>", "images": [png()]}).encode(), 200, "invalid_value"),
        (json.dumps({**OLD, "images": [png()]}).encode(), 200, "invalid_value"),
        (json.dumps({**OLD, "prompt": "<image>", "images": ["%%"]}).encode(), 200, "bad_base64"),
        (json.dumps({**OLD, "prompt": "a" * 1601}).encode(), 200, "context_length_exceeded"),
        (b'{"prompt": "\\ud800"}', 200, "invalid_value"),
    ],
)
def test_failures_of_the_old_protocol_are_one_frame(
    plain: httpx2.Client, body: bytes, status: int, detail: str
) -> None:
    response = plain.post(GENERATE, content=body)
    [frame] = frames_of(response.content)
    assert (response.status_code, frame["error_code"], frame["detail"]) == (status, 1, detail)


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (PromptTooLongError("the prompt is 500 tokens long"), 400, "context_length_exceeded"),
        (MemoryLimitError("the answer needs 2 MB; raise --kv-cache-mb"), 400, "context_length_exceeded"),
        (DataError("image given as bytes cannot be decoded"), 400, "bad_image"),
        (DataError("image given as bytes has 9 x 9 pixels, more than the limit of 4"), 400, "image_too_large"),
        (NotUnicodeError("turn 0 is not Unicode"), 400, "invalid_content"),
        (RuntimeError("secret text"), 500, "internal_error"),
        (GenerationError("the model failed"), 500, "internal_error"),
    ],
)
def test_failures_of_the_engine(failure: Exception, status: int, code: str) -> None:
    with worker(ScriptedEngine(failure=failure)) as client:
        for stream in (False, True):
            response = client.post(CHAT, json={**HELLO, "stream": stream})
            error = response.json()["error"]
            assert (response.status_code, error["code"]) == (status, code) and "secret" not in error["message"]
        [frame] = frames_of(client.post(GENERATE, json=OLD).content)
        assert frame["detail"] == code


def test_an_error_after_the_first_byte_ends_the_stream_without_done() -> None:
    class Broken(ScriptedEngine):
        def _answer(self, handle: Any, sampling: Any, notify: Any) -> None:
            self.pieces = ["Hello"]
            super()._answer(handle, sampling, lambda: None)
            handle.events[-1].finish = None
            handle.events.append(type(handle.events[-1])(0, "", "Hello", (), (), "error", "failed", ValueError("x")))
            notify()

    with worker(Broken()) as client:
        found = data_of(client.post(CHAT, json={**HELLO, "stream": True}).text)
        assert found[-1]["error"]["code"] == "internal_error" and "[DONE]" not in found
        assert frames_of(client.post(GENERATE, json=OLD).content)[-1]["detail"] == "internal_error"


def test_the_id_of_a_request_is_returned(plain: httpx2.Client) -> None:
    assert plain.get("/health", headers={"x-request-id": "my-id.1"}).headers["x-request-id"] == "my-id.1"


@pytest.mark.parametrize("wrong", ["a" * 65, "a b", "ä".encode()], ids=["long", "space", "letter"])
def test_an_unusable_id_of_a_request_is_replaced(plain: httpx2.Client, wrong: str | bytes) -> None:
    found = plain.get("/health", headers={"x-request-id": wrong}).headers["x-request-id"]
    assert found.startswith("req-")


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "localhost@evil.example", "10.0.0.1"])
def test_foreign_host_names_are_refused(plain: httpx2.Client, host: str) -> None:
    response = plain.get("/v1/models", headers={"Host": host})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_value")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:99", "[::1]:8000"])
def test_names_of_this_machine_are_accepted(plain: httpx2.Client, host: str) -> None:
    assert plain.get("/v1/models", headers={"Host": host}).status_code == 200


def test_pages_of_listed_origins_only_may_ask() -> None:
    gate = GateSettings(hosts=frozenset({"ward.example"}))
    app = make_worker_app(scripted_service(ScriptedEngine()), gate, WordTokenizer(), origins=("https://page.example",))
    with served(app) as url, httpx2.Client(base_url=url, trust_env=False) as client:
        assert client.get("/v1/models", headers={"Host": "ward.example"}).status_code == 200
        for origin, allowed in (("https://page.example", "https://page.example"), ("https://evil.example", None)):
            headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            found = client.options(CHAT, headers=headers).headers.get("access-control-allow-origin")
            assert found == allowed


def test_refusals_of_the_gate_can_be_read_by_pages_of_listed_origins(tmp_path: Path) -> None:
    gate, page = GateSettings(keys=KeyRing(key_file(tmp_path))), "https://page.example"
    app = make_worker_app(scripted_service(ScriptedEngine()), gate, WordTokenizer(), origins=(page,))
    with served(app) as url, httpx2.Client(base_url=url, trust_env=False, headers={"Origin": page}) as client:
        responses = [client.post(CHAT, json=HELLO)]
        client.headers["Authorization"] = "Bearer sk-1"
        responses += [client.post(CHAT, json=HELLO) for _ in range(3)]
        assert [response.status_code for response in responses] == [401, 200, 200, 429]
        assert {response.headers.get("access-control-allow-origin") for response in responses} == {page}
        assert all("x-request-id" in response.headers for response in responses)
        foreign = client.get("/v1/models", headers={"Host": "evil.example"})
        assert foreign.status_code == 400 and "access-control-allow-origin" not in foreign.headers


def key_file(folder: Path) -> Path:
    path = folder / "keys"
    path.write_text("ward sk-1 rpm=2\n")
    path.chmod(0o600)
    return path


def test_keys(tmp_path: Path) -> None:
    path = key_file(tmp_path)
    with worker(gate=GateSettings(keys=KeyRing(path))) as client:
        assert client.get("/health").status_code == client.get("/ready").status_code == 200
        assert client.get("/metrics").status_code == client.post("/worker_get_status").status_code == 200
        for path_of in ("/v1/models", "/openapi.json"):
            response = client.get(path_of)
            assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
        [frame] = frames_of(client.post(GENERATE, json=OLD).content)
        assert frame["detail"] == "invalid_api_key"
        headers = {"Authorization": "Bearer sk-1"}
        statuses = [client.post(CHAT, json=HELLO, headers=headers).status_code for _ in range(3)]
        assert statuses == [200, 200, 429]
        response = client.post(GENERATE, json=OLD, headers=headers)
        assert response.status_code == 429 and frames_of(response.content)[0]["detail"] == "rate_limited"
        assert int(response.headers["retry-after"]) >= 1


@pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded", "X-Real-IP"])
def test_a_request_passed_on_by_a_proxy_is_not_one_of_this_machine(header: str, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("ward sk-1\n")
    path.chmod(0o600)
    with worker(gate=GateSettings(keys=KeyRing(path))) as client:
        assert client.get("/metrics").status_code == 200
        assert client.get("/metrics", headers={header: "10.0.0.1"}).status_code == 401


@pytest.mark.parametrize("has_length", [True, False])
def test_bodies_are_limited_while_they_are_read(has_length: bool) -> None:
    content = json.dumps({**HELLO, "user": "a" * 3000}).encode()
    pieces = content if has_length else iter([content[:1500], content[1500:]])
    with worker(gate=GateSettings(max_body_bytes=2000)) as client:
        response = client.post(CHAT, content=pieces)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")
        old = client.post(GENERATE, content=content)
        assert old.status_code == 413 and frames_of(old.content)[0]["detail"] == "request_too_large"
        assert client.post(CHAT, json=HELLO).status_code == 200


def test_a_request_of_more_sequences_than_its_key_may_run_is_refused(tmp_path: Path) -> None:
    path = key_file(tmp_path)
    path.write_text("ward sk-1 max_running=1\n")
    with worker(gate=GateSettings(keys=KeyRing(path))) as client:
        client.headers["Authorization"] = "Bearer sk-1"
        response = client.post(CHAT, json={**HELLO, "n": 2, "temperature": 1})
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "invalid_value", "n")
        assert client.post(CHAT, json=HELLO).status_code == 200


def test_a_full_queue_refuses_and_a_place_is_free_after_its_client_left() -> None:
    engine = ScriptedEngine()
    engine.hold.clear()
    with worker(engine, max_running=1, max_waiting=1) as client:
        with httpx2.Client(base_url=client.base_url, trust_env=False) as leaving:
            threads = []
            for _ in range(2):
                thread = threading.Thread(target=lambda: _ask_until_closed(leaving), daemon=True)
                thread.start()
                threads.append(thread)
            assert until(lambda: metric(client, "llava_requests_waiting") == 1)
            response = client.post(CHAT, json=HELLO)
            assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
            assert client.post("/worker_get_status").json()["queue_length"] == 2
            _close_sockets(leaving)
        assert until(lambda: metric(client, "llava_requests_running") == 0)
        assert until(lambda: engine.handles[0].is_cancelled)
        engine.hold.set()
        assert client.post(CHAT, json=HELLO).status_code == 200
        assert until(lambda: metric(client, "llava_requests_total") == 4)
        assert 'llava_requests_total{code="client_left",protocol="openai"} 2.0' in client.get("/metrics").text


def _ask_until_closed(client: httpx2.Client) -> None:
    try:
        client.post(CHAT, json=HELLO)
    except (httpx2.HTTPError, OSError):
        return


def _close_sockets(client: httpx2.Client) -> None:
    """Close the connections of a client under its feet."""
    for connection in client._transport._pool.connections:
        connection._connection._network_stream._sock.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("path", [CHAT, GENERATE])
def test_a_stream_that_is_closed_frees_its_slot(path: str) -> None:
    engine = ScriptedEngine(["a", "b"])
    engine.pause_after = 1
    with worker(engine) as client:
        body = OLD if path == GENERATE else {**HELLO, "stream": True}
        with client.stream("POST", path, json=body) as response:
            next(response.iter_bytes())
        assert until(lambda: engine.handles[-1].is_cancelled)
        assert until(lambda: metric(client, "llava_requests_running") == 0)


def test_a_request_that_takes_too_long() -> None:
    engine = ScriptedEngine()
    engine.hold.clear()
    with worker(engine, request_seconds=0.5) as client:
        response = client.post(CHAT, json=HELLO)
        assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
        assert engine.handles[0].is_cancelled


def _ask_without_reading(client: httpx2.Client) -> socket.socket:
    """Ask for a stream on a connection from which nothing is read."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.connect((client.base_url.host, client.base_url.port))
    body = json.dumps({**HELLO, "stream": True}).encode()
    made.sendall(
        b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % (CHAT.encode(), len(body)) + body
    )
    return made


LARGE = "x" * (1 << 23)
"""More than the buffers of a connection hold."""


def test_a_client_that_stops_reading_holds_no_place_once_its_answers_are_over() -> None:
    engine = ScriptedEngine([LARGE, "end"])
    with worker(engine) as client, _ask_without_reading(client):
        assert until(lambda: bool(engine.handles) and metric(client, "llava_requests_running") == 0)
        assert metric(client, "llava_requests_total") == 0  # it is still sent


def test_a_client_that_stops_reading_is_left_at_the_deadline() -> None:
    engine = ScriptedEngine([LARGE, "end"])
    engine.pause_after = 1
    with worker(engine, request_seconds=1) as client, _ask_without_reading(client):
        assert until(lambda: metric(client, "llava_requests_total") == 1)
        assert 'code="timeout"' in client.get("/metrics").text
        assert engine.handles[0].is_cancelled and metric(client, "llava_requests_running") == 0


@pytest.mark.parametrize(("path", "stream"), [(CHAT, False), (CHAT, True), (GENERATE, True)])
def test_the_base64_texts_of_images_are_not_kept_until_the_answer_ends(path: str, stream: bool) -> None:
    engine, url = ScriptedEngine(), f"data:image/png;test={path}{stream};base64,{png()}"
    engine.hold.clear()
    chat = {**HELLO, **with_image(url), "stream": stream}
    body = chat if path == CHAT else {**OLD, "prompt": "<image>", "images": [url]}
    with worker(engine) as client, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.post, path, json=body)
        assert until(lambda: len(engine.handles) == 1)
        try:
            assert until(lambda: not _keeps(url), 10)
        finally:
            engine.hold.set()
        assert asked.result().status_code == 200 and len(engine.prompts[0][0].images) == 1


def _keeps(url: str) -> bool:
    """Return whether the server still has an image as text."""
    return any(isinstance(one, ImageInput | ImageUrl) and one.url == url for one in gc.get_objects())


def test_silence_before_the_first_token_is_bridged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava.serve.openai_server.WAIT_SECONDS", 0.05)
    monkeypatch.setattr("llava.serve.old_protocol.REPEAT_SECONDS", 0.05)
    engine = ScriptedEngine()
    engine.hold.clear()
    with worker(engine) as client:
        for path in (CHAT, GENERATE):
            engine.hold.clear()
            content, end = b"", b": wait\n\n" if path == CHAT else b"\0"
            with client.stream("POST", path, json={**HELLO, "stream": True} if path == CHAT else OLD) as response:
                for piece in response.iter_bytes():
                    content += piece
                    if content.count(end) >= 2:
                        engine.hold.set()
            if path == CHAT:
                assert content.startswith(b": wait\n\n: wait\n\n") and content.endswith(b"data: [DONE]\n\n")
            else:
                assert [frame["text"] for frame in frames_of(content)][:2] == [OLD["prompt"]] * 2


def test_draining() -> None:
    service = scripted_service(ScriptedEngine())
    app = make_worker_app(service, GateSettings(), WordTokenizer())
    with served(app) as url, httpx2.Client(base_url=url, trust_env=False) as client:
        service.admission.is_draining = True
        response = client.post(CHAT, json=HELLO)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "draining")
        old = client.post(GENERATE, json=OLD)
        assert old.status_code == 503 and frames_of(old.content)[0]["error_code"] == 1
        assert client.get("/health").status_code == client.get("/ready").status_code == 503


def test_a_worker_whose_steps_do_not_end_is_not_alive() -> None:
    engine = ScriptedEngine()
    engine.driver = type("Driver", (), {"num_running": 1, "last_step": 100.0})()  # type: ignore[attr-defined]
    service = scripted_service(engine)
    assert problem_of(service, lambda: 160.0) == "" and "stuck" in problem_of(service, lambda: 161.0)
    engine.driver.num_running = 0  # type: ignore[attr-defined]
    assert problem_of(service, lambda: 999.0) == ""


def test_each_request_has_an_audit_line_without_content(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "audit"
    caplog.set_level("INFO")
    with worker(gate=GateSettings(audit=AuditLog(path))) as client:
        client.post(CHAT, json={**HELLO, **with_image(f"data:image/png;base64,{png()}")})
        client.post(CHAT, json={**HELLO, "messages": [{"role": "user", "content": "PATIENT</s>"}]})
        client.post(GENERATE, json={**OLD, "prompt": "PATIENT"})
        client.get("/v1/models")
        assert until(lambda: path.read_bytes().count(b"\n") == 3)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert check_chain(path) == 3
    assert [(line["protocol"], line["code"]) for line in lines] == [
        ("openai", "ok"),
        ("openai", "invalid_content"),
        ("llava", "ok"),
    ]
    first = lines[0]
    assert (first["images"], first["prompt_tokens"], first["cached_tokens"], first["generated_tokens"]) == (1, 3, 1, 2)
    assert first["image_bytes"] > 0 and first["model"] == MODEL and first["key"] == "-"
    assert "PATIENT" not in path.read_text() + caplog.text and "Hello" not in caplog.text


def test_metrics(plain: httpx2.Client) -> None:
    before = {name: metric(plain, name) for name in ("llava_generated_tokens_total", "llava_request_seconds_count")}
    plain.post(CHAT, json=HELLO)
    assert metric(plain, "llava_generated_tokens_total") == before["llava_generated_tokens_total"] + 2
    assert metric(plain, "llava_request_seconds_count") == before["llava_request_seconds_count"] + 1
    text = plain.get("/metrics").text
    for name in ("slots_in_use", "kv_cache_bytes", "prefix_cache_bytes", "workers", "step_seconds_bucket"):
        assert f"llava_{name}" in text
    assert MODEL not in text


def test_the_openapi_document_names_the_fields(plain: httpx2.Client) -> None:
    paths = plain.get("/openapi.json").json()["paths"]
    schema = paths[CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"model", "messages", "stop", "top_logprobs"} <= schema["properties"].keys() and "$ref" not in str(schema)
    assert GENERATE in paths and plain.get("/docs").status_code == 404


@pytest.mark.parametrize(
    ("path", "name"),
    [("a/b/llava-7b/", "llava-7b"), ("runs/x/checkpoint-20", "x_checkpoint-20"), ("./m", "m"), (".", "model")],
)
def test_names_of_models(path: str, name: str) -> None:
    assert model_name(path) == name
