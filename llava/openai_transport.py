"""Connection to a chat endpoint through the OpenAI client library, within one event loop.

    body of a request  --send-->  Reply | ApiFailure

Each request is sent once; retries are up to `llava.openai_api.ChatClient`.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from llava.errors import ConfigError, GenerationError
from llava.utils.lookup import require
from llava.utils.retry import duration_seconds, retry_after_seconds

REASONS: dict[str, str] = {
    "rate_limited": "the endpoint asked for a longer wait than allowed, or repeatedly",
    "unavailable": "the endpoint returned a server error",
    "timeout": "no response within the timeout",
    "unreachable": "no connection, or it was interrupted",
    "broken_answer": "the response is not the JSON of the protocol",
    "empty": "the answer has no text",
    "cut_short": "the answer reached the token limit before its end",
    "filtered": "the endpoint's content filter withheld the answer",
    "too_long": "the request has more tokens than the model accepts",
    "refused": "the endpoint does not accept the request",
    "credentials": "the key is missing, wrong, or not allowed to use the model",
    "quota": "the quota of the account is exhausted",
    "unknown_model": "the model, deployment or URL does not exist",
}
"""Reasons of failures and their meanings."""

RETRY_REASONS = frozenset({"rate_limited", "unavailable", "timeout", "unreachable", "broken_answer", "empty"})
"""Reasons of transient failures, which are retried."""

FATAL = frozenset({"credentials", "quota", "unknown_model"})
"""Reasons of failures that every later request would share."""

_PLAIN_CODE = re.compile(r"[A-Za-z][A-Za-z0-9_.]{0,47}")


@dataclass(frozen=True, slots=True)
class Reply:
    """Answer of a chat endpoint.

    Attributes:
        text: text of the answer.
        finish_reason: the endpoint's reason for its end (`stop`).
        model: name of the model as the endpoint states it.
        num_prompt_tokens: tokens of the prompt as counted by the endpoint; None if not stated.
        num_answer_tokens: tokens of the answer as counted by the endpoint; None if not stated.
        wasted_tokens: tokens of prompts and answers of earlier attempts that were not usable.
    """

    text: str
    finish_reason: str = "stop"
    model: str = ""
    num_prompt_tokens: int | None = None
    num_answer_tokens: int | None = None
    wasted_tokens: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class ApiFailure:
    """Failure of a request; contains no text of the request or the answer.

    Attributes:
        reason: a key of `REASONS`.
        detail: status and code of the server's response; empty without a response.
        num_attempts: number of attempts.
        num_prompt_tokens: prompt tokens that the endpoint counted for an unusable answer; 0 if not stated.
        num_answer_tokens: answer tokens that the endpoint counted for an unusable answer; 0 if not stated.
        wait: seconds that the server asked to wait; None if it did not.
        param: name of the parameter that the server does not accept.
        fatal: whether every later request would fail for the same reason.
    """

    reason: str
    detail: str = ""
    num_attempts: int = 1
    num_prompt_tokens: int = 0
    num_answer_tokens: int = 0
    wait: float | None = None
    param: str = ""
    fatal: bool = False

    def __str__(self) -> str:
        tried = f" after {self.num_attempts} attempts" if self.num_attempts > 1 else ""
        return f"{self.reason}{tried}: {REASONS[self.reason]}" + (f" ({self.detail})" if self.detail else "")


class ApiError(GenerationError):
    """Error for a request without a usable answer; `failure` has the reason."""

    def __init__(self, failure: ApiFailure) -> None:
        super().__init__(str(failure))
        self.failure = failure


def read_reply(content: bytes, *, accept_cut_short: bool = False) -> Reply | ApiFailure:
    """Return the answer in the body of a successful response, or the failure.

    Args:
        content: the body, JSON of a chat completion.
        accept_cut_short: accept an answer that reached the token limit.
    """
    try:
        body = json.loads(content)
        choice = body["choices"][0]
        text = choice["message"]["content"]
        finish_reason = str(choice.get("finish_reason") or "stop")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ApiFailure("broken_answer", "not a JSON object with choices[0].message.content")
    prompt, answer = _count(body, "prompt_tokens"), _count(body, "completion_tokens")
    failed = ApiFailure("empty", num_prompt_tokens=prompt or 0, num_answer_tokens=answer or 0)
    if finish_reason == "content_filter":
        return replace(failed, reason="filtered")
    if finish_reason == "length" and not accept_cut_short:
        return replace(failed, reason="cut_short")
    if not isinstance(text, str) or not text.strip():
        return failed
    text = text.encode("utf-8", "replace").decode()  # half a surrogate pair could not be written to a file
    return Reply(text, finish_reason, str(body.get("model") or ""), prompt, answer)


def _count(body: Mapping[str, Any], name: str) -> int | None:
    """Return a count of `usage`; None if it is missing or not a count."""
    usage = body.get("usage")
    value = usage.get(name) if isinstance(usage, Mapping) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def read_error(status: int, code: object, param: object, *, wait: float | None, key: str) -> ApiFailure:
    """Return the failure that an error status means.

    Args:
        status: HTTP status.
        code: `error.code` of the body; shown only if it is a plain identifier and not part of the key.
        param: `error.param` of the body; shown under the same condition.
        wait: seconds that the server asks to wait.
        key: the key, which must not be shown.
    """
    word, name = _plain(code, key), _plain(param, key)
    reason = _reason(status, word)
    detail = f"status {status}" + (f", {word}" if word else "") + (f", parameter {name}" if name else "")
    return ApiFailure(reason, detail, wait=wait, param=name, fatal=reason in FATAL)


def _plain(value: object, key: str) -> str:
    text = value if isinstance(value, str) else ""
    return text if _PLAIN_CODE.fullmatch(text) and not (key and (text in key or key in text)) else ""


_BY_CODE = {
    "insufficient_quota": "quota",
    "billing_hard_limit_reached": "quota",
    "context_length_exceeded": "too_long",
    "content_filter": "filtered",
    "model_not_found": "unknown_model",
    "DeploymentNotFound": "unknown_model",
    "invalid_api_key": "credentials",
}
_BY_STATUS = {401: "credentials", 403: "credentials", 404: "unknown_model", 408: "timeout", 409: "unavailable"}


def _reason(status: int, code: str) -> str:
    if code in _BY_CODE:
        return _BY_CODE[code]
    if status == 429:
        return "rate_limited"
    return _BY_STATUS.get(status, "unavailable" if status >= 500 else "refused")


class Connection:
    """Connection pool with slots for requests in flight and a shared pause; belongs to one event loop.

    Args:
        api_type: `openai` or `azure`.
        api_key: the key; may be empty.
        api_base: URL of the endpoint; empty for OpenAI's.
        api_version: version of the protocol, Azure only.
        timeout: timeout of one request in seconds.
        num_slots: requests in flight at once.
        max_pause: longest pause in seconds that headers of a successful response may cause.
    """

    def __init__(
        self,
        api_type: str,
        *,
        api_key: str,
        api_base: str,
        api_version: str,
        timeout: float,
        num_slots: int,
        max_pause: float,
    ) -> None:
        self.slots = asyncio.Semaphore(num_slots)
        self._library = require("openai", "openai")
        self._key, self._timeout, self._max_pause = api_key, timeout, max_pause
        self._loop = asyncio.get_running_loop()
        self._not_before = 0.0
        common: dict[str, Any] = {
            # Retries are ours: the library's own repeat requests of an exhausted quota, do not repeat one whose answer
            # is empty or broken, wait at most 8 s without a header, and pause one request only (openai 3.52, tested).
            "max_retries": 0,
            "timeout": timeout,
            # A redirect could send the key to another host.
            "http_client": self._library.DefaultAsyncHttpxClient(follow_redirects=False),
        }
        if api_type != "azure":
            base = api_base or None
            self._client = self._library.AsyncOpenAI(api_key=api_key or "none", base_url=base, **common)
            return
        key = api_key or None
        try:
            self._client = self._library.AsyncAzureOpenAI(
                api_key=key, azure_endpoint=api_base, api_version=api_version, **common
            )
        except self._library.OpenAIError:
            raise ConfigError(
                "the Azure endpoint has no key; set AZURE_OPENAI_API_KEY or AZURE_OPENAI_AD_TOKEN"
            ) from None

    def pause(self, seconds: float) -> None:
        """Allow no request to start for this many seconds."""
        if seconds > 0:
            self._not_before = max(self._not_before, self._loop.time() + seconds)

    async def turn(self) -> None:
        """Wait until requests may start."""
        while (seconds := self._not_before - self._loop.time()) > 0:
            await asyncio.sleep(seconds)

    async def send(self, body: Mapping[str, Any], *, accept_cut_short: bool = False) -> Reply | ApiFailure:
        """Send one request and return its answer or failure; see `read_reply`."""
        try:
            async with asyncio.timeout(self._timeout):  # the library's own timeout restarts with every byte
                raw = await self._client.chat.completions.with_raw_response.create(**body)
        except (TimeoutError, self._library.APITimeoutError):
            return ApiFailure("timeout", f"{self._timeout:g} s")
        except self._library.APIConnectionError:
            return ApiFailure("unreachable")
        except self._library.APIStatusError as error:
            wait = asked_wait(error.response.headers)
            return read_error(error.status_code, error.code, error.param, wait=wait, key=self._key)
        except self._library.APIResponseValidationError:
            return ApiFailure("broken_answer")
        self.pause(min(used_up_wait(raw.headers), self._max_pause))
        return read_reply(raw.http_response.content, accept_cut_short=accept_cut_short)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()


def asked_wait(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a response with an error status asks to wait; None if not stated."""
    milliseconds = duration_seconds(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000.0
    asked = retry_after_seconds(headers.get("retry-after"))
    return asked if asked is not None else used_up_wait(headers) or None


def used_up_wait(headers: Mapping[str, str]) -> float:
    """Return the seconds until an exhausted rate limit is reset; 0 without an exhausted limit."""
    waits = [
        duration_seconds(headers.get(f"x-ratelimit-reset-{kind}")) or 0.0
        for kind in ("requests", "tokens")
        if (headers.get(f"x-ratelimit-remaining-{kind}") or "").strip() == "0"
    ]
    return max(waits, default=0.0)
