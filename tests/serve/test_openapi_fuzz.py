"""Generated requests to every documented route of worker and controller: none is answered with a fault of the server.

LLAVA_FUZZ_EXAMPLES=500 sets the number of requests for each route.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from llava.serve.failures import CODES
from tests.serve.test_controller import controller
from tests.support.served import ScriptedEngine, scripted_app, served

schemathesis = pytest.importorskip("schemathesis")

NUM_EXAMPLES = int(os.environ.get("LLAVA_FUZZ_EXAMPLES", "500"))


@contextmanager
def worker_url() -> Iterator[str]:
    with served(scripted_app(ScriptedEngine())) as url:
        yield url


@contextmanager
def controller_url() -> Iterator[str]:
    with controller(ScriptedEngine()) as (client, _):
        yield str(client.base_url).rstrip("/")


def check(response: Any) -> None:
    """Check that an answer is no fault of the server, and that an error has a known code."""
    assert response.status_code < 500, response.text
    if response.status_code >= 400 and "application/json" in response.headers.get("content-type", []):
        error = response.json()["error"]
        assert CODES[error["code"]][0] == response.status_code and error["message"]


@pytest.mark.extended
@pytest.mark.parametrize("serve", [worker_url, controller_url], ids=["worker", "controller"])
def test_generated_requests_are_never_faults_of_the_server(serve: Any) -> None:
    modes = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
    with serve() as url:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        num_routes = 0
        for found in schema.get_all_operations():
            operation = found.ok()
            for mode in modes if operation.body else modes[:1]:  # no path is wrong
                ask(operation, mode)
            num_routes += 1
        assert num_routes >= 8


def ask(operation: Any, mode: Any) -> None:
    """Send half of the requests for a route, that obey its schema or not."""

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=NUM_EXAMPLES // 2, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    def send(case: Any) -> None:
        check(case.call())

    send()
