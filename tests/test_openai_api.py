"""Client of chat endpoints against a faulty local endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava import openai_api
from llava.errors import ConfigError
from llava.openai_api import ApiError, ApiFailure, ApiSettings, ChatClient, Reply
from llava.openai_transport import read_error, read_reply
from llava.utils.lookup import require
from llava.utils.retry import backoff_seconds, duration_seconds, retry_after_seconds
from tests.support.fake_endpoint import KEY, MODEL, FakeEndpoint, Fault, Message, serve

SECRET = "Zyxxword shadow"  # stands for a patient's text
ASK = [{"role": "user", "content": SECRET}]


def echo(messages: list[Message]) -> str:
    return f"answer to {messages[-1]['content']}"


@pytest.fixture
def endpoint() -> Iterator[FakeEndpoint]:
    with serve(echo) as state:
        yield state


def client_of(endpoint: FakeEndpoint, *, max_retries: int = 2, **changes: object) -> ChatClient:
    given = {"api_key": KEY, "api_base": endpoint.address, "deployment": MODEL, **changes}
    client = ChatClient(ApiSettings(**given), max_concurrency=4, max_retries=max_retries)  # type: ignore[arg-type]
    client.first_wait = 0.01
    return client


def one(client: ChatClient, **options: object) -> Reply | ApiFailure:
    return next(client.replies([ASK], **options))


def test_one_answer_with_its_tokens(endpoint: FakeEndpoint) -> None:
    reply = one(client_of(endpoint), max_tokens=9)
    assert reply == Reply(f"answer to {SECRET}", "stop", MODEL, 2, 4)
    call = endpoint.calls[0]
    assert call.headers["authorization"] == f"Bearer {KEY}"
    assert call.body == {"model": MODEL, "messages": ASK, "temperature": 0.0, "max_tokens": 9}


def test_complete_in_an_own_event_loop(endpoint: FakeEndpoint) -> None:
    client = client_of(endpoint)

    async def both() -> list[str]:
        try:
            return list(await asyncio.gather(client.complete(ASK), client.complete(ASK)))
        finally:
            await client.close()

    for _ in range(2):  # a client outlives the loop it was used in
        assert asyncio.run(both()) == [f"answer to {SECRET}"] * 2


def test_map_keeps_order_and_bounds_requests(endpoint: FakeEndpoint) -> None:
    delays = iter([0.2, 0.1, 0.0, 0.05] * 5)

    def slow(messages: list[Message]) -> str:
        time.sleep(next(delays))
        return str(messages[-1]["content"])

    endpoint.answer = slow
    conversations = [[{"role": "user", "content": str(number)}] for number in range(20)]
    assert list(client_of(endpoint).map(conversations)) == [str(number) for number in range(20)]
    assert 1 < endpoint.most_at_once <= 4


def test_failures_are_values_in_order(endpoint: FakeEndpoint) -> None:
    endpoint.answer = lambda messages: Fault(400) if messages[-1]["content"] == "1" else "good"
    found = list(client_of(endpoint).map([[{"role": "user", "content": str(number)}] for number in range(3)]))
    assert found[0] == found[2] == "good"
    assert isinstance(found[1], ApiFailure) and found[1].reason == "refused" and not found[1].fatal


def test_leaving_early_stops_the_requests(endpoint: FakeEndpoint) -> None:
    endpoint.answer = lambda messages: Fault(stall=20) if messages[-1]["content"] != "0" else "first"
    replies = client_of(endpoint).map([[{"role": "user", "content": str(number)}] for number in range(9)])
    start = time.monotonic()
    assert next(replies) == "first"
    replies.close()  # type: ignore[attr-defined]
    assert time.monotonic() - start < 15


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(500), "unavailable"),
        (Fault(503), "unavailable"),
        (Fault(429), "rate_limited"),
        (Fault(408), "timeout"),
        (Fault(stall=60), "timeout"),
        (Fault(cut_after=20), "unreachable"),
        (Fault(body=b'{"choices": ['), "broken_answer"),
        (Fault(body=b"<html>"), "broken_answer"),
        (Fault(body=b"[1]"), "broken_answer"),
        (Fault(text=" \n"), "empty"),
    ],
)
def test_transient_failures_are_retried(endpoint: FakeEndpoint, fault: Fault, reason: str) -> None:
    timeout = 0.3 if fault.stall else 60.0
    endpoint.faults = [fault, fault]
    assert isinstance(one(client_of(endpoint, timeout=timeout, max_retries=30)), Reply)
    endpoint.faults = [fault] * 3
    failure = one(client_of(endpoint, timeout=timeout))
    assert isinstance(failure, ApiFailure)
    assert (failure.reason, failure.num_attempts, failure.fatal) == (reason, 3, False)


@pytest.mark.parametrize(
    ("fault", "reason", "fatal"),
    [
        (Fault(400), "refused", False),
        (Fault(400, code="context_length_exceeded"), "too_long", False),
        (Fault(400, code="content_filter"), "filtered", False),
        (Fault(finish_reason="content_filter"), "filtered", False),
        (Fault(finish_reason="length"), "cut_short", False),
        (Fault(401), "credentials", True),
        (Fault(403), "credentials", True),
        (Fault(404, code="model_not_found"), "unknown_model", True),
        (Fault(429, code="insufficient_quota"), "quota", True),
        (Fault(429, headers=(("Retry-After", "86400"),)), "rate_limited", True),
        (Fault(302, headers=(("Location", "http://127.0.0.1:9/"),)), "refused", False),
    ],
)
def test_other_failures_are_not_retried(endpoint: FakeEndpoint, fault: Fault, reason: str, fatal: bool) -> None:
    endpoint.faults = [fault]
    failure = one(client_of(endpoint))
    assert isinstance(failure, ApiFailure)
    assert (failure.reason, failure.num_attempts, failure.fatal) == (reason, 1, fatal)
    assert len(endpoint.calls) == 1


def test_truncated_answer_may_be_accepted_and_is_counted(endpoint: FakeEndpoint) -> None:
    endpoint.faults = [Fault(finish_reason="length")] * 2
    reply = one(client_of(endpoint), accept_cut_short=True)
    assert isinstance(reply, Reply) and reply.finish_reason == "length"
    failure = one(client_of(endpoint))
    assert isinstance(failure, ApiFailure)
    assert (failure.num_prompt_tokens, failure.num_answer_tokens) == (2, 4)


def test_unreachable_endpoint() -> None:
    with serve(echo) as gone:
        pass
    failure = one(client_of(gone, max_retries=1))
    assert isinstance(failure, ApiFailure) and (failure.reason, failure.num_attempts) == ("unreachable", 2)


def test_retry_after_pauses_all_requests(endpoint: FakeEndpoint) -> None:
    endpoint.faults = [Fault(429, headers=(("Retry-After", "0.5"),))]
    client = client_of(endpoint)
    client.max_concurrency = 1
    assert list(client.map([ASK] * 3)) == [f"answer to {SECRET}"] * 3
    times = [call.time for call in endpoint.calls]
    assert times[1] - times[0] >= 0.49 and len(times) == 4


@pytest.mark.parametrize(
    ("fault", "theirs", "ours"),
    [
        (Fault(429, code="insufficient_quota"), 3, 1),
        (Fault(text=" "), 1, 3),
        (Fault(body=b"[1]"), 1, 3),
        (Fault(503), 3, 3),
        (Fault(400), 1, 1),
    ],
)
def test_retries_differ_from_those_of_the_library(
    fault: Fault, theirs: int, ours: int, endpoint: FakeEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason for retries of our own; if both numbers become equal, the library's can be used."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    library = require("openai", "openai")
    endpoint.faults = [fault] * 9
    with contextlib.suppress(library.OpenAIError):
        client = library.OpenAI(api_key=KEY, base_url=endpoint.address, max_retries=2)
        client.chat.completions.create(model=MODEL, messages=ASK)
    assert len(endpoint.calls) == theirs
    assert isinstance(one(client_of(endpoint)), ApiFailure)
    assert len(endpoint.calls) - theirs == ours


@pytest.mark.parametrize("kind", ["requests", "tokens"])
def test_exhausted_rate_limit_is_waited_for(endpoint: FakeEndpoint, kind: str) -> None:
    headers = ((f"x-ratelimit-remaining-{kind}", "0"), (f"x-ratelimit-reset-{kind}", "400ms"))
    endpoint.faults = [Fault(headers=headers)]
    client = client_of(endpoint)
    client.max_concurrency = 1
    list(client.map([ASK] * 2))
    assert endpoint.calls[1].time - endpoint.calls[0].time >= 0.39


def test_newer_models_use_another_name_of_the_limit(endpoint: FakeEndpoint) -> None:
    endpoint.faults = [Fault(400, code="unsupported_parameter", param="max_tokens")]
    client = client_of(endpoint)
    assert isinstance(one(client, max_tokens=7, temperature=None), Reply)
    assert isinstance(one(client, max_tokens=7, temperature=None), Reply)
    assert [sorted(call.body) for call in endpoint.calls] == [
        ["max_tokens", "messages", "model"],
        ["max_completion_tokens", "messages", "model"],
        ["max_completion_tokens", "messages", "model"],
    ]


def test_azure(endpoint: FakeEndpoint) -> None:
    client = client_of(endpoint, api_type="azure", api_base=endpoint.root + "/", api_version="2023-03-15-preview")
    assert isinstance(one(client), Reply)
    call = endpoint.calls[0]
    assert call.path == f"/openai/deployments/{MODEL}/chat/completions?api-version=2023-03-15-preview"
    assert call.headers["api-key"] == KEY


def test_azure_without_a_key_names_the_variables(endpoint: FakeEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AZURE_OPENAI_API_KEY", "AZURE_OPENAI_AD_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    client = client_of(endpoint, api_type="azure", api_key="", api_base=endpoint.root, api_version="v")
    with pytest.raises(ConfigError, match="AZURE_OPENAI_AD_TOKEN"):
        one(client)
    monkeypatch.setenv("AZURE_OPENAI_AD_TOKEN", "token")
    assert isinstance(one(client), Reply)
    assert endpoint.calls[0].headers["authorization"] == "Bearer token"


def test_after_a_fatal_failure_nothing_is_sent(endpoint: FakeEndpoint) -> None:
    endpoint.key = "another"
    client = client_of(endpoint)
    found = list(client.map([ASK] * 12))
    assert all(isinstance(outcome, ApiFailure) and outcome.fatal for outcome in found)
    assert len(endpoint.calls) <= 4


def test_lone_surrogate_becomes_writable(endpoint: FakeEndpoint) -> None:
    endpoint.answer = lambda messages: "a \ud800 b"
    reply = one(client_of(endpoint))
    assert isinstance(reply, Reply) and reply.text == "a ? b"


def test_neither_key_nor_prompt_is_in_messages_or_logs(
    endpoint: FakeEndpoint, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    endpoint.key = "another"
    failure = one(client_of(endpoint))
    endpoint.key = ""
    endpoint.faults = [Fault(400, code=KEY, param=SECRET), Fault(400, code=KEY[3:]), Fault(500), Fault(500), Fault(500)]
    client = client_of(endpoint)
    shown = [str(failure), repr(failure), *(repr(one(client)) for _ in range(3)), repr(client.settings), caplog.text]
    with pytest.raises(ApiError) as raised:
        endpoint.faults = [Fault(400)]
        asyncio.run(client.ask(ASK))
    error: BaseException | None = raised.value
    while error is not None:
        shown.append(f"{error!r} {error}")
        error = error.__cause__ or error.__context__
    assert len(endpoint.calls) >= 6
    for text in shown:
        assert KEY not in text and KEY[3:] not in text and SECRET not in text


PASTED = """
openai.api_type = "azure"
openai.api_key = 'abc'
openai.api_base = 'https://example-endpoint.openai.azure.com/'
openai.api_version = "2023-03-15-preview"
DEPLOYMENT_ID="deployment-name"
"""
"""Lines of LLaVA-Med's README, with a key."""


def test_the_published_lines_can_be_put_into_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    space = {"openai": type("Copy", (), {})()}
    exec(PASTED, space)
    monkeypatch.setattr(openai_api, "openai", space["openai"])
    monkeypatch.setattr(openai_api, "DEPLOYMENT_ID", space["DEPLOYMENT_ID"])
    base = "https://example-endpoint.openai.azure.com/"
    expected = ApiSettings("azure", "abc", base, "2023-03-15-preview", "deployment-name")
    assert ApiSettings.from_env(environ={}) == expected
    environ = {"AZURE_OPENAI_API_KEY": "other", "OPENAI_API_KEY": "third"}
    assert ApiSettings.from_env(environ=environ) == dataclasses.replace(expected, api_key="other")
    assert ApiSettings.from_env(environ=environ, deployment="flag").deployment == "flag"


def test_the_file_holds_no_key() -> None:
    assert vars(openai_api.openai) == dict.fromkeys(("api_type", "api_key", "api_base", "api_version"), "")
    assert openai_api.DEPLOYMENT_ID == ""


def test_the_environment_of_todays_client() -> None:
    azure = {"AZURE_OPENAI_ENDPOINT": "https://a.example", "AZURE_OPENAI_API_KEY": "k", "OPENAI_API_VERSION": "v"}
    assert ApiSettings.from_env(environ=azure, deployment="d").api_type == "azure"
    both = ApiSettings.from_env(environ={**azure, "OPENAI_API_KEY": "sk-o"}, deployment="d")
    assert (both.api_type, both.api_key, both.api_base) == ("openai", "sk-o", "")
    local = ApiSettings.from_env(environ=azure, api_base="http://localhost:1/v1", deployment="d")
    assert (local.api_type, local.api_key) == ("openai", "")
    other = ApiSettings.from_env(environ={"OPENAI_API_KEY": "a", "MINE": "b\n"}, api_key_env="MINE", deployment="d")
    assert other.api_key == "b"


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"deployment": "", "api_key": "k"}, "OPENAI_MODEL"),
        ({"deployment": "m"}, "OPENAI_API_KEY"),
        ({"deployment": "m", "api_key": "se\ncret"}, "line end"),
        ({"deployment": "m", "api_base": "ftp://x"}, "http"),
        ({"deployment": "m", "api_base": "http://user:pass@host/"}, "without a user"),
        ({"deployment": "m", "api_type": "azure", "api_key": "k"}, "--api-version"),
        ({"deployment": "m", "api_type": "bard", "api_key": "k"}, "known: azure"),
        ({"deployment": "m", "api_key": "k", "timeout": 0.0}, "timeout"),
        ({"deployment": "m", "api_key_env": "ABSENT"}, "ABSENT"),
    ],
)
def test_invalid_settings(given: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word) as raised:
        ApiSettings.from_env(environ={}, **given)
    assert "cret" not in str(raised.value) and "pass@" not in str(raised.value)


def test_import_loads_neither_torch_nor_the_client() -> None:
    code = "import sys, llava.openai_api; assert not {'torch', 'PIL', 'openai', 'httpx2'} & sys.modules.keys()"
    root = Path(__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("6m0s", 360.0), ("1.5s", 1.5), ("20ms", 0.02), ("1h2m3s", 3723.0), ("3", 3.0), ("", None), ("soon", None)],
)
def test_durations(text: str, seconds: float | None) -> None:
    assert duration_seconds(text) == (None if seconds is None else pytest.approx(seconds))


def test_retry_after_dates() -> None:
    assert retry_after_seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert retry_after_seconds("nan") is None and retry_after_seconds("x") is None and retry_after_seconds(None) is None


@settings(deadline=None)
@given(st.integers(1, 10_000), st.integers(0, 2**32))
def test_backoff_is_bounded_and_never_zero(attempt: int, seed: int) -> None:
    random.seed(seed)
    assert 0.5 <= backoff_seconds(attempt, first=1.0, most=60.0) <= 60.0


@settings(deadline=None)
@given(st.text(max_size=30))
def test_any_header_is_a_duration_or_not(text: str) -> None:
    assert (duration_seconds(text) or 0.0) >= 0.0 and (retry_after_seconds(text) or 0.0) >= 0.0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "message", "content", "usage", "finish_reason"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(JSON | st.builds(lambda inner: {"choices": [{"message": inner}], "usage": inner}, JSON))
def test_any_body_is_a_reply_or_a_failure(body: object) -> None:
    assert isinstance(read_reply(json.dumps(body).encode()), Reply | ApiFailure)


@settings(deadline=None)
@given(st.binary(max_size=40))
def test_any_bytes_are_a_failure(content: bytes) -> None:
    assert isinstance(read_reply(content), ApiFailure)


@settings(deadline=None)
@given(st.integers(300, 599), JSON, JSON)
def test_any_error_has_a_reason(status: int, code: object, param: object) -> None:
    assert str(read_error(status, code, param, wait=None, key="k" * 20))
