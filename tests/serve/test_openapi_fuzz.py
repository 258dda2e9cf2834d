"""Generated requests to every documented route of worker and controller: none is a fault of the server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from llava.serve.failures import CODES
from tests.serve.test_controller import controller
from tests.support.served import ScriptedEngine, scripted_app, served


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


@pytest.mark.parametrize("num_examples", [10, pytest.param(500, marks=pytest.mark.extended)])
@pytest.mark.parametrize("serve", [worker_url, controller_url], ids=["worker", "controller"])
def test_generated_requests_are_never_faults_of_the_server(serve: Any, num_examples: int) -> None:
    modes = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
    with serve() as url:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        num_routes = 0
        for found in schema.get_all_operations():
            operation = found.ok()
            for mode in modes if operation.body else modes[:1]:  # no path is wrong
                ask(operation, mode, num_examples // 2)
            num_routes += 1
        assert num_routes >= 8


def ask(operation: Any, mode: Any, num_examples: int) -> None:
    """Send requests for a route that obey its schema, or do not."""

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=num_examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    def send(case: Any) -> None:
        check(case.call(timeout=120))

    send()
