"""Running of a server: what its sockets and its process are set to."""

from __future__ import annotations

import gc
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from llava.errors import ConfigError
from llava.serve.admission import Admission
from llava.serve.keys import KeyRing
from llava.serve.listen import ServerRun, bind
from tests.serve.test_keys import bearer, key_file
from tests.support.waiting import until

NUM_REQUESTS = 20


@contextmanager
def running(keys: KeyRing | None = None) -> Iterator[str]:
    """Yield the URL of a server in a thread."""
    over = threading.Event()

    async def answer(request: object) -> PlainTextResponse:
        return PlainTextResponse("here")

    sockets = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
    app = Starlette(routes=[Route("/health", answer)])
    run = ServerRun(app, Admission(), keys=keys or KeyRing(), fatal=lambda: "the test is over" if over.is_set() else "")
    thread = threading.Thread(target=run.run, args=(sockets,), kwargs={"url": url})
    thread.start()
    try:
        assert until(lambda: answers(url))
        yield url
    finally:
        over.set()
        thread.join()


def answers(url: str) -> bool:
    try:
        return httpx2.get(url + "/health", trust_env=False).text == "here"
    except httpx2.HTTPError:
        return False


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
