"""Running of a server: what its sockets and its process are set to, and how requests end that outlive it."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import Request, Response
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from llava.errors import ConfigError
from llava.serve.admission import Admission
from llava.serve.application import Health, guarded, make_app
from llava.serve.audit import AuditLog
from llava.serve.controller_app import Controller, make_controller_app
from llava.serve.gate import GateSettings
from llava.serve.keys import KeyRing
from llava.serve.listen import ServerRun, bind
from llava.serve.metrics import ServerMetrics
from llava.serve.registry import Registry
from llava.serve.worker import make_worker_app
from tests.serve.test_keys import bearer, key_file
from tests.serve.test_worker import CHAT, GENERATE, HELLO, OLD, data_of, frames_of, png, with_image
from tests.support.served import ScriptedEngine, WordTokenizer, scripted_app, scripted_service, served
from tests.support.waiting import until

NUM_REQUESTS = 20


@contextmanager
def draining_server(
    app: Any, admission: Admission, drain_seconds: float, *, keys: KeyRing | None = None
) -> Iterator[tuple[str, threading.Event]]:
    """Yield the URL of a server in a thread, and an event that lets it drain."""
    drain = threading.Event()
    sockets = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
    fatal = lambda: "the test is over" if drain.is_set() else ""  # noqa: E731
    run = ServerRun(app, admission, drain_seconds=drain_seconds, keys=keys or KeyRing(), fatal=fatal)
    thread = threading.Thread(target=run.run, args=(sockets,), kwargs={"url": url})
    thread.start()
    try:
        assert until(lambda: answers(url))
        yield url, drain
    finally:
        drain.set()
        thread.join()


@contextmanager
def running(keys: KeyRing | None = None) -> Iterator[str]:
    """Yield the URL of a server in a thread."""

    async def answer(request: object) -> PlainTextResponse:
        return PlainTextResponse("here")

    with draining_server(Starlette(routes=[Route("/health", answer)]), Admission(), 30, keys=keys) as (url, _):
        yield url


@contextmanager
def draining_worker(engine: Any, **settings: Any) -> Iterator[tuple[httpx2.Client, threading.Event, Admission]]:
    """Yield a client of a worker, the event that lets it drain, and its admission."""
    gate = settings.pop("gate", GateSettings())
    service = scripted_service(engine, **settings)
    app = make_worker_app(service, gate, WordTokenizer())
    with (
        draining_server(app, service.admission, 0.3) as (url, drain),
        httpx2.Client(base_url=url, timeout=120, trust_env=False) as client,
    ):
        yield client, drain, service.admission


def answers(url: str) -> bool:
    try:
        return httpx2.get(url + "/health", trust_env=False).status_code == 200
    except httpx2.HTTPError:
        return False


def code_of_answer(response: httpx2.Response) -> str:
    """Return the code of the error that ends an answer of either protocol."""
    if response.headers["content-type"] == "application/octet-stream":
        last = frames_of(response.content)[-1]
        assert last["error_code"] == 1
        return str(last["detail"])
    found = data_of(response.text)[-1] if "event-stream" in response.headers["content-type"] else response.json()
    return str(found["error"]["code"])


def ended_stream(client: httpx2.Client, path: str, drain: threading.Event) -> httpx2.Response:
    """Return a streamed answer during which its server begins to drain."""
    body = OLD if path == GENERATE else {**HELLO, "stream": True}
    with client.stream("POST", path, json=body) as response:
        pieces = response.iter_bytes()
        content = next(pieces)
        drain.set()
        content += b"".join(pieces)
    return httpx2.Response(
        response.status_code, content=content, headers={"content-type": response.headers["content-type"]}
    )


def test_a_connection_that_is_used_again_does_not_wait_for_acknowledgments() -> None:
    # A client that has nothing to send acknowledges 40 ms later. The smallest time is that of a free processor.
    with running() as url, httpx2.Client(trust_env=False) as client:
        times = []
        for _ in range(NUM_REQUESTS):
            start = time.perf_counter()
            assert client.get(url + "/health").text == "here"
            times.append(time.perf_counter() - start)
    assert min(times[1:]) < 0.03


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_every_socket_names_its_protocol(host: str) -> None:
    sockets = bind(host, 0)
    assert {made.proto for made in sockets} == {socket.IPPROTO_TCP}
    for made in sockets:
        made.close()


def test_what_was_loaded_is_left_out_of_collections() -> None:
    gc.unfreeze()
    with running():
        assert gc.get_freeze_count() > 0


@pytest.mark.parametrize("path", [CHAT, GENERATE])
def test_a_stream_that_outlives_the_time_to_drain_ends_with_an_error(path: str, tmp_path: Path) -> None:
    engine = ScriptedEngine(["a", "b"])
    engine.pause_after = 1
    audit = tmp_path / "audit"
    with draining_worker(engine, gate=GateSettings(audit=AuditLog(audit))) as (client, drain, _):
        response = ended_stream(client, path, drain)
        assert code_of_answer(response) == "draining" and b"[DONE]" not in response.content
        assert until(lambda: engine.handles[0].is_cancelled)
    assert json.loads(audit.read_text())["code"] == "draining"


@pytest.mark.parametrize(("path", "body"), [(CHAT, HELLO), (GENERATE, OLD)])
def test_running_and_waiting_requests_that_outlive_the_time_to_drain(path: str, body: dict[str, Any]) -> None:
    engine = ScriptedEngine()
    engine.hold.clear()
    with ThreadPoolExecutor(2) as pool, draining_worker(engine, max_running=1) as (client, drain, admission):
        asked = [pool.submit(client.post, path, json=body) for _ in range(2)]
        assert until(lambda: (admission.num_running, admission.num_waiting) == (1, 1))
        drain.set()
        for response in (future.result() for future in asked):
            assert (response.status_code, code_of_answer(response)) == (503, "draining")
            assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize("path", [CHAT, GENERATE])
def test_a_request_whose_body_is_not_complete_in_the_time_to_drain(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava.serve.gate.DISCARD_SECONDS", 0.1)
    head = b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99\r\n\r\n{" % path.encode()
    with draining_worker(ScriptedEngine()) as (client, drain, admission), socket.socket() as made:
        made.connect((client.base_url.host, client.base_url.port))
        made.sendall(head)
        assert until(lambda: admission.num_reading == 1)
        drain.set()
        answer = b"".join(iter(lambda: made.recv(1 << 16), b""))
    assert answer.startswith(b"HTTP/1.1 503") and b'"draining"' in answer


def test_a_request_whose_images_are_not_read_in_the_time_to_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    read = threading.Event()

    def slow_images(*_: Any, **__: Any) -> tuple[bytes, ...]:
        read.wait()
        return ()

    monkeypatch.setattr("llava.serve.answering.read_images", slow_images)
    body = {**HELLO, **with_image(f"data:image/png;base64,{png()}")}
    with ThreadPoolExecutor(3) as pool, draining_worker(ScriptedEngine()) as (client, drain, admission):
        asked = [pool.submit(client.post, CHAT, json=body) for _ in range(3)]  # two are read, one waits for that
        try:
            assert until(lambda: admission.num_reading == 3)
            drain.set()
            for response in (future.result() for future in asked):
                assert (response.status_code, code_of_answer(response)) == (503, "draining")
        finally:
            read.set()


def test_requests_that_end_in_the_time_to_drain_are_answered() -> None:
    engine = ScriptedEngine()
    engine.hold.clear()
    with ThreadPoolExecutor(1) as pool, draining_worker(engine) as (client, drain, admission):
        asked = pool.submit(client.post, CHAT, json=HELLO)
        assert until(lambda: admission.num_running == 1)
        drain.set()
        assert until(lambda: admission.is_draining)
        engine.hold.set()
        assert asked.result().json()["choices"][0]["message"]["content"] == "Hello world"


@pytest.mark.parametrize("path", [CHAT, GENERATE])
@pytest.mark.parametrize("has_begun", [True, False])
def test_requests_at_workers_end_with_the_controller(path: str, has_begun: bool, tmp_path: Path) -> None:
    engine = ScriptedEngine(["a", "b"])
    engine.pause_after = 1
    if not has_begun:
        engine.hold.clear()
    audit = tmp_path / "audit"
    made = Controller(Registry(time.monotonic), GateSettings(audit=AuditLog(audit)))
    with (
        served(scripted_app(engine, gate=GateSettings(marks_audited=True))) as worker,
        draining_server(make_controller_app(made), made.admission, 0.3) as (url, drain),
        httpx2.Client(base_url=url, timeout=120, trust_env=False) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        assert client.post("/register_worker", json={"worker_name": worker, "check_heart_beat": False}).is_success
        if has_begun:
            response = ended_stream(client, path, drain)
        else:
            asked = pool.submit(client.post, path, json=OLD if path == GENERATE else HELLO)
            assert until(lambda: len(engine.handles) == 1)
            drain.set()
            response = asked.result()
            assert response.status_code == 503
        assert code_of_answer(response) == "draining"
        assert until(lambda: engine.handles[0].is_cancelled)
    assert json.loads(audit.read_text())["code"] == "draining"


def test_a_canceled_request_has_the_error_of_a_server_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava.serve.listen.GRACEFUL_SECONDS", 0)
    metrics, entered = ServerMetrics({}), threading.Event()
    app = make_app("test", metrics, Health(lambda: "", lambda: ""))

    async def slow(request: Request) -> Response:
        entered.set()
        await asyncio.sleep(3600)
        return Response()

    app.add_api_route("/slow", slow, methods=["GET"])
    with (
        draining_server(guarded(app, GateSettings(), metrics), Admission(), 0) as (url, drain),
        ThreadPoolExecutor(1) as pool,
    ):
        asked = pool.submit(httpx2.get, url + "/slow", timeout=120, trust_env=False)
        assert entered.wait(120)
        drain.set()
        response = asked.result()
        assert (response.status_code, code_of_answer(response)) == (503, "draining")


def test_an_unknown_host_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"--host no\.such\.host\.invalid"):
        bind("no.such.host.invalid", 0)


def test_keys_are_read_again_when_the_server_begins_to_listen(tmp_path: Path) -> None:
    keys = KeyRing(key_file(tmp_path, "a first\n"))
    key_file(tmp_path, "a second\n")
    with running(keys):
        assert keys.find(bearer("second")) is not None


@pytest.mark.parametrize("content", [b"a \xff\n", b"a x rpm=" + b"9" * 5000, b""])
def test_a_wrong_file_of_keys_is_an_error_in_the_log(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = key_file(tmp_path, "a first\n")
    run = ServerRun(Starlette(), Admission(), keys=KeyRing(path))
    path.write_bytes(content)
    run._reload()
    assert "the keys stay as they were: --api-keys" in caplog.text
    assert run.keys.find(bearer("first")) is not None
