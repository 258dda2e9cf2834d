"""A controller in front of scripted workers: old routes, both protocols passed on, lost workers, who may register."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.requests import Request

from llava.serve.audit import AuditLog
from llava.serve.controller import main as controller_main
from llava.serve.controller_app import Controller, affinity_of, make_controller_app
from llava.serve.failures import RequestError
from llava.serve.flights import Flights
from llava.serve.gate import AUDITED_HEADER, GateSettings
from llava.serve.heartbeat import Heart
from llava.serve.listen import PASSING_SECONDS, ServerRun
from llava.serve.proxy import ContentSearch, code_of, error_piece
from llava.serve.registry import Registry, WorkerStatus
from tests.serve.test_worker import CHAT, GENERATE, HELLO, OLD, data_of, frames_of
from tests.support.ports import free_ports
from tests.support.served import MODEL, ScriptedEngine, scripted_app, scripted_service, served
from tests.support.waiting import until

CLUSTER = "0123456789abcdef"


@contextmanager
def controller(
    *engines: Any, gate: GateSettings | None = None, expiry: float = 30, worker_audit: AuditLog | None = None
) -> Iterator[tuple[httpx2.Client, Controller]]:
    """Run a controller with a worker for each engine."""
    made = Controller(Registry(time.monotonic, expiry_seconds=expiry), gate or GateSettings())
    of_worker = GateSettings(marks_audited=True, audit=worker_audit or AuditLog())
    with ExitStack() as stack:
        url = stack.enter_context(served(make_controller_app(made), made.watch))
        client = stack.enter_context(httpx2.Client(base_url=url, timeout=120, trust_env=False))
        for engine in engines:
            worker = stack.enter_context(served(scripted_app(engine, gate=of_worker)))
            body, headers = {"worker_name": worker, "check_heart_beat": False}, {AUDITED_HEADER: "1"}
            assert client.post("/register_worker", json=body, headers=headers).json() is None
        yield client, made


def lost_url() -> str:
    """Return the URL of a port that nobody listens on."""
    return f"http://127.0.0.1:{free_ports(1)[0]}"


def register(client: httpx2.Client, name: str, *models: str) -> httpx2.Response:
    status = {"model_names": list(models), "speed": 1, "queue_length": 0}
    body = {"worker_name": name, "check_heart_beat": True, "worker_status": status}
    return client.post("/register_worker", json=body)


def test_old_routes() -> None:
    with controller(ScriptedEngine()) as (client, made):
        [worker] = made.registry.names
        assert client.post("/list_models").json() == {"models": [MODEL]}
        assert client.post("/get_worker_address", json={"model": MODEL}).json() == {"address": worker}
        assert client.post("/get_worker_address", json={"model": "none"}).json() == {"address": ""}
        assert client.post("/worker_get_status").json() == {"model_names": [MODEL], "speed": 1, "queue_length": 1}
        beat = {"worker_name": worker, "queue_length": 5}
        assert client.post("/receive_heart_beat", json=beat).json() == {"exist": True}
        assert client.post("/receive_heart_beat", json={**beat, "worker_name": "x"}).json() == {"exist": False}
        assert client.post("/refresh_all_workers").json() is None
        assert client.post("/worker_get_status").json()["queue_length"] == 0
        assert client.post("/unregister_worker", json={"worker_name": worker}).json() is None
        assert client.post("/list_models").json() == {"models": []}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/register_worker", b"{"),
        ("/register_worker", b"{}"),
        ("/register_worker", b'{"worker_name": "localhost:1"}'),
        ("/register_worker", b'{"worker_name": "http://localhost:1", "check_heart_beat": 1}'),
        ("/register_worker", b'{"worker_name": "http://localhost:1", "worker_status": {"model_names": 1}}'),
        (
            "/register_worker",
            b'{"worker_name": "http://localhost:1", "worker_status": {"model_names": ["m"], "speed": 1%s}}'
            % (b"0" * 400),
        ),
        ("/register_worker", b'{"worker_name": "http://localhost:1", "worker_status": {"model_names": ["\\ud800"]}}'),
        ("/unregister_worker", b"[]"),
        ("/get_worker_address", b"{}"),
        ("/receive_heart_beat", b'{"worker_name": "a", "queue_length": "1"}'),
        ("/receive_heart_beat", b'{"worker_name": "a"}'),
    ],
)
def test_malformed_bodies_of_old_routes(path: str, body: bytes) -> None:
    with controller() as (client, _):
        response = client.post(path, content=body)
        assert response.status_code == 400 and response.json()["error"]["code"] in ("invalid_json", "invalid_value")


def reporting(body: bytes) -> Controller:
    """Return a controller whose worker `http://w` of model `m` reports a body."""
    transport = httpx2.MockTransport(lambda request: httpx2.Response(200, content=body))
    made = Controller(Registry(time.monotonic), transport=transport)
    made.registry.register("http://w", WorkerStatus(("m",)), check_heart_beat=False)
    return made


@pytest.mark.parametrize(
    "status",
    [b'{"model_names": ["m"], "speed": 1%s}' % (b"0" * 400), b'{"model_names": ["\\ud800"]}', b"[" * 100_000, b"\xff"],
    ids=["speed", "name", "nested", "bytes"],
)
def test_a_worker_that_reports_a_wrong_status_is_dropped(status: bytes) -> None:
    made = reporting(status)
    asyncio.run(made.refresh())
    assert made.registry.names == []


@pytest.mark.parametrize(
    "body",
    [b'{"data": [{"id": "m", "a": NaN}]}', b'{"data": [{"id": "m", "a": "\\ud800"}]}', b"[" * 100_000],
    ids=["number", "text", "nested"],
)
def test_a_model_whose_description_cannot_be_passed_on_is_left_out(body: bytes) -> None:
    request = Request({"type": "http", "headers": []})
    assert asyncio.run(reporting(body).describe(request)) == []
    assert asyncio.run(reporting(b'{"data": [{"id": "m"}]}').describe(request)) == [{"id": "m"}]


def test_both_protocols_are_passed_on() -> None:
    with controller(ScriptedEngine()) as (client, made):
        whole = client.post(CHAT, json=HELLO, headers={"x-request-id": "one"})
        assert whole.json()["choices"][0]["message"]["content"] == "Hello world"
        assert whole.headers["x-request-id"] == "one" and "x-llava-audited" not in whole.headers
        streamed = client.post(CHAT, json={**HELLO, "stream": True})
        assert streamed.headers["content-type"].startswith("text/event-stream")
        assert data_of(streamed.text)[-1] == "[DONE]"
        assert frames_of(client.post(GENERATE, json=OLD).content)[-1]["text"] == OLD["prompt"] + "Hello world"
        assert client.post(CHAT, json={**HELLO, "foo": 1}).json()["error"]["code"] == "unknown_parameter"
        [entry] = client.get("/v1/models").json()["data"]
        assert entry["max_model_len"] == 100 and client.get(f"/v1/models/{MODEL}").json() == entry
        assert made.registry.status().queue_length == 0 and made.admission.num_requests == 0


def test_models_without_a_worker() -> None:
    with controller() as (client, _):
        response = client.post(CHAT, json=HELLO)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "no_worker")
        assert client.get("/ready").status_code == 503 and client.get("/health").status_code == 200
        [frame] = frames_of(client.post(GENERATE, json=OLD).content)
        assert (frame["error_code"], frame["detail"]) == (2, "no_worker")
        register(client, lost_url(), "other")
        response = client.post(CHAT, json=HELLO)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
        assert frames_of(client.post(GENERATE, json=OLD).content)[0]["error_code"] == 2


def test_a_lost_worker_is_dropped_and_another_one_answers() -> None:
    with controller(ScriptedEngine()) as (client, made):
        made.registry.beat(made.registry.names[0], 5)
        register(client, lost_url(), MODEL)
        assert client.post(CHAT, json=HELLO).status_code == 200
        assert len(made.registry.names) == 1


def test_the_last_worker_is_lost() -> None:
    for path, body in ((CHAT, HELLO), (GENERATE, OLD)):
        with controller() as (client, made):
            register(client, lost_url(), MODEL)
            response = client.post(path, json=body)
            if path == CHAT:
                assert (response.status_code, response.json()["error"]["code"]) == (503, "worker_lost")
            else:
                [frame] = frames_of(response.content)
                assert (frame["error_code"], frame["detail"]) == (3, "worker_lost")
            assert made.registry.names == []


@contextmanager
def _silent_worker(head: bytes = b"") -> Iterator[str]:
    """Accept requests, answer with the beginning of a stream at most, and keep the connections open."""
    connections = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            while True:
                try:
                    connections.append(listener.accept()[0])
                    connections[-1].sendall(head)
                except OSError:
                    return

        threading.Thread(target=answer, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        for connection in connections:
            connection.close()


@pytest.mark.parametrize("path", [CHAT, GENERATE])
def test_requests_at_a_silent_worker_end_when_it_is_dropped(path: str) -> None:
    with controller(expiry=0.2) as (client, made), _silent_worker() as url:
        register(client, url, MODEL)
        response = client.post(path, json=HELLO if path == CHAT else OLD)
        if path == CHAT:
            assert (response.status_code, response.json()["error"]["code"]) == (503, "worker_lost")
        else:
            [frame] = frames_of(response.content)
            assert (frame["error_code"], frame["detail"]) == (3, "worker_lost")
        assert made.registry.names == [] and made.admission.num_requests == 0


def test_requests_at_a_silent_worker_are_given_to_another_one() -> None:
    with controller(ScriptedEngine(), expiry=0.2) as (client, made), _silent_worker() as url:
        made.registry.beat(made.registry.names[0], 5)
        register(client, url, MODEL)
        assert client.post(CHAT, json=HELLO).json()["choices"][0]["message"]["content"] == "Hello world"
        assert len(made.registry.names) == 1 and made.registry.status().queue_length == 5


def test_a_stream_of_a_silent_worker_ends_with_an_error() -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + b'data: {"choices": []}\n\n'
    with controller(expiry=0.2) as (client, _), _silent_worker(head) as url:
        register(client, url, MODEL)
        first, error = data_of(client.post(CHAT, json={**HELLO, "stream": True}).text)
        assert first == {"choices": []} and error["error"]["code"] == "worker_lost"


def test_requests_at_a_worker_that_cannot_be_reached_end_when_it_stays_away_and_says_nothing() -> None:
    times = [0.0]
    flights = Flights(lambda: times[0])

    async def work() -> None:
        back, away = flights.begin("back"), flights.begin("away")
        tasks = [asyncio.create_task(flight.wait(asyncio.sleep(3600))) for flight in (back, away)]
        await asyncio.sleep(0)
        for name in ("back", "away"):
            flights.note_unreachable(name)
        flights.lose_unreachable(["back"], 30)
        times[0] = 29.0
        talking = flights.begin("away")
        assert await talking.wait(asyncio.sleep(0, "piece")) == "piece"
        times[0] = 31.0
        flights.lose_unreachable(["back"], 30)
        with pytest.raises(httpx2.ReadTimeout):
            await tasks[1]
        assert not tasks[0].done()
        tasks[0].cancel()
        with pytest.raises(httpx2.ReadTimeout):
            await away.wait(asyncio.sleep(3600))
        assert await talking.wait(asyncio.sleep(0, "piece")) == "piece"
        times[0] = 62.0
        flights.lose_unreachable([], 30)
        with pytest.raises(httpx2.ReadTimeout):
            await talking.wait(asyncio.sleep(3600))

    asyncio.run(work())


def _dying_worker(head: bytes) -> Iterator[str]:
    """Answer one request with the beginning of a stream, then close the connection."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as request:
            lines = list(iter(request.readline, b"\r\n"))
            [length] = [int(line.split()[1]) for line in lines if line.lower().startswith(b"content-length:")]
            request.read(length)  # a byte that is not read would reset the connection
            connection.sendall(head)

    threading.Thread(target=answer, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.close()


@pytest.mark.parametrize("path", [CHAT, GENERATE])
def test_a_worker_lost_in_the_middle_of_a_stream(path: str) -> None:
    kind = b"text/event-stream" if path == CHAT else b"application/octet-stream"
    piece = b'data: {"choices": []}\n\n' if path == CHAT else b'{"text": "a", "error_code": 0}\0'
    chunk = f"{len(piece):x}".encode() + b"\r\n" + piece + b"\r\n"
    head = b"HTTP/1.1 200 OK\r\ncontent-type: " + kind + b"\r\ntransfer-encoding: chunked\r\n\r\n" + chunk
    for url in _dying_worker(head):
        with controller() as (client, made):
            register(client, url, MODEL)
            response = client.post(path, json={**HELLO, "stream": True} if path == CHAT else OLD)
            if path == CHAT:
                first, error = data_of(response.text)
                assert first == {"choices": []} and error["error"]["code"] == "worker_lost"
            else:
                first, error = frames_of(response.content)
                assert first["text"] == "a" and (error["error_code"], error["detail"]) == (3, "worker_lost")
            assert made.registry.names == []


def test_a_client_that_leaves_the_controller_frees_the_slot_of_the_worker() -> None:
    engine = ScriptedEngine(["a", "b"])
    engine.pause_after = 1
    with controller(engine) as (client, made):
        with client.stream("POST", CHAT, json={**HELLO, "stream": True}) as response:
            next(response.iter_bytes())
        assert until(lambda: engine.handles[0].is_cancelled)
        assert until(lambda: made.admission.num_requests == 0 and made.registry.status().queue_length == 0)


def test_a_request_whose_client_leaves_early_has_one_audit_line(tmp_path: Path) -> None:
    engine, log = ScriptedEngine(), AuditLog(tmp_path / "audit")
    engine.hold.clear()
    with controller(engine, gate=GateSettings(audit=log), worker_audit=log) as (client, made):
        with pytest.raises(httpx2.ReadTimeout):
            client.post(CHAT, json=HELLO, timeout=1)
        assert until(lambda: made.admission.num_requests == 0 and b"\n" in (tmp_path / "audit").read_bytes())
        engine.hold.set()
        assert client.post(CHAT, json=HELLO).status_code == 200
        assert until(lambda: (tmp_path / "audit").read_bytes().count(b"\n") >= 2)
    lines = [json.loads(line) for line in (tmp_path / "audit").read_text().splitlines()]
    assert [line["code"] for line in lines] == ["client_left", "ok"]


def test_a_controller_leaves_its_workers_time_to_end_the_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(ServerRun, "run", lambda run, sockets, *, url: found.append(run.drain_seconds) or 0)
    with pytest.raises(SystemExit, match="0"):
        controller_main(["--port", str(free_ports(1)[0]), "--drain-seconds", "7"])
    assert found == [7 + PASSING_SECONDS]


def test_the_last_registration_of_an_address_says_whether_its_worker_audits() -> None:
    name = lost_url()
    body = {"worker_name": name, "check_heart_beat": True}
    body["worker_status"] = {"model_names": ["m"], "speed": 1, "queue_length": 0}
    with controller() as (client, made):
        assert client.post("/register_worker", json=body, headers={AUDITED_HEADER: "1"}).json() is None
        assert made.forwarder.auditing == {name}
        assert register(client, name, "m").json() is None and not made.forwarder.auditing


def test_a_controller_exports_what_it_knows() -> None:
    engine = ScriptedEngine(["Hello", " world"])
    with controller(engine) as (client, _):
        client.post(CHAT, json=HELLO)
        client.post(CHAT, json={**HELLO, "stream": True})
        client.post(GENERATE, json=OLD)
        # A client has the last byte of a stream before its request is counted.
        assert until(lambda: "llava_request_seconds_count 3.0" in client.get("/metrics").text)
        text = client.get("/metrics").text
        names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    assert {name for name in names if not name.endswith("_created")} == {
        "llava_requests_running",
        "llava_workers",
        "llava_requests_total",
        "llava_request_seconds",
        "llava_time_to_first_token_seconds",
    }
    assert "llava_time_to_first_token_seconds_count 2.0" in text


@pytest.mark.parametrize(
    ("protocol", "pieces", "expected"),
    [
        ("openai", [b": wait\n\n", b'data: {"delta":{"role":"assistant","content":""}}\n\n'], []),
        ("openai", [b": wait\n\n", b'data: {"delta":{"con', b'tent":"a"}}\n\n'], [2]),
        ("llava", [RequestError("timeout", "a longer text").frame()], []),
        ("llava", [b'{"text": "ab", "error_code": 0}\0{"te', b'xt": "abc", "error_code": 0}\0'], [1]),
        ("llava", [b"[]\0", b"5\0"], []),
    ],
)
def test_the_first_content_of_a_stream(protocol: str, pieces: list[bytes], expected: list[int]) -> None:
    search = ContentSearch(protocol, "ab")
    assert [number for number, piece in enumerate(pieces) if search.finds(piece)] == expected


def test_only_this_machine_and_the_cluster_register_workers() -> None:
    with controller(gate=GateSettings(cluster_key=CLUSTER)) as (client, made):
        assert register(client, "http://10.0.0.1:1", MODEL).status_code == 401
        assert register(client, "http://worker.example:1", MODEL).status_code == 401
        client.headers["x-llava-cluster"] = "wrong-key-wrong-key"
        assert register(client, "http://10.0.0.1:1", MODEL).status_code == 401
        client.headers["x-llava-cluster"] = CLUSTER
        assert register(client, "http://10.0.0.1:1", MODEL).status_code == 200
        assert made.registry.names == ["http://10.0.0.1:1"]


@pytest.mark.parametrize("path", ["/register_worker", "/unregister_worker", "/receive_heart_beat"])
def test_other_machines_need_the_cluster_key(path: str) -> None:
    async def status(headers: dict[str, str]) -> int:
        app = make_controller_app(Controller(Registry(time.monotonic), GateSettings(cluster_key=CLUSTER)))
        transport = httpx2.ASGITransport(app=app, client=("10.1.2.3", 5))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            body = {"worker_name": "http://localhost:1", "queue_length": 0, "worker_status": {"model_names": ["m"]}}
            return (await client.post(path, json=body, headers=headers)).status_code

    assert asyncio.run(status({})) == 401
    assert asyncio.run(status({"x-llava-cluster": CLUSTER})) == 200


def test_a_worker_registers_beats_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava.serve.heartbeat.BEAT_SECONDS", 0.05)
    service = scripted_service(ScriptedEngine())
    with controller() as (client, made):
        heart = Heart(str(client.base_url).rstrip("/"), "http://127.0.0.1:9", service.status)
        with served(scripted_app(ScriptedEngine()), heart.beat):
            assert until(lambda: made.registry.names == ["http://127.0.0.1:9"])
            made.registry.remove("http://127.0.0.1:9")
            assert until(lambda: made.registry.names == ["http://127.0.0.1:9"])


def test_a_worker_that_leaves_does_not_register_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava.serve.heartbeat.BEAT_SECONDS", 0.02)
    service = scripted_service(ScriptedEngine())
    with controller() as (client, made):
        heart = Heart(str(client.base_url).rstrip("/"), "http://127.0.0.1:9", service.status)

        async def work() -> None:
            beating = asyncio.create_task(heart.beat())
            while not made.registry.names:
                await asyncio.sleep(0.005)
            await heart.leave()
            assert made.registry.names == []
            await asyncio.wait_for(beating, 60)  # the beats end, so none of them registers
            await heart.beat()

        asyncio.run(work())
        assert made.registry.names == []


def test_codes_of_pieces() -> None:
    error = RequestError("worker_lost", "gone")
    assert code_of(error_piece(error)) == code_of(error.frame()) == "worker_lost"
    assert code_of(json.dumps(error.body()).encode()) == "worker_lost"


@pytest.mark.parametrize(
    "piece", [b"", b": wait\n\n", b'{"text": "\\"error_code\\": 1", "error_code": 0}\0', b'{"error', b'["error"]']
)
def test_pieces_without_an_error(piece: bytes) -> None:
    assert code_of(piece) == "ok"


def test_requests_about_one_image_have_one_key() -> None:
    def chat(url: str) -> dict[str, Any]:
        part = {"type": "image_url", "image_url": {"url": url}}
        return {"messages": [{"role": "user", "content": [{"type": "text", "text": url * 2}, part]}]}

    assert affinity_of(chat("data:a")) == affinity_of(chat("data:a")) != affinity_of(chat("data:b"))
    assert affinity_of({"images": ["data:a"]}) == affinity_of(chat("data:a"))


@pytest.mark.parametrize("body", [{}, {"messages": 5}, {"messages": [5, {"content": "a"}]}, {"images": [5]}])
def test_requests_without_an_image_have_no_key(body: dict[str, Any]) -> None:
    assert affinity_of(body) is None


def test_the_cluster_key_goes_to_workers_that_have_shown_it_only() -> None:
    made = Controller(Registry(time.monotonic), GateSettings(cluster_key=CLUSTER))
    made.cluster_members.add("http://10.0.0.1:1")
    assert made.forwarder.headers_of("http://10.0.0.1:1") == {"x-llava-cluster": CLUSTER}
    assert made.forwarder.headers_of("http://127.0.0.1:1") == {}
