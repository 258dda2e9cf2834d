"""The contact with the client library: one connection to a chat endpoint, within one event loop.

    body of a request  --send-->  Reply | ApiFailure

It sends once; whether to send again is decided by `llava.openai_api.ChatClient`.
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
from llava.utils.retry import duration, retry_after

REASONS: dict[str, str] = {
    "rate_limited": "the endpoint asks to wait longer than allowed, or again and again",
    "unavailable": "the endpoint answers with a server error",
    "timeout": "no answer in time",
    "unreachable": "no connection, or it broke",
    "broken_answer": "the answer is not the JSON that the protocol describes",
    "empty": "the answer has no text",
    "cut_short": "the answer reached its limit of tokens before its end",
    "filtered": "the endpoint's content filter withheld the answer",
    "too_long": "the request has more tokens than the model takes",
    "refused": "the endpoint does not accept the request",
    "credentials": "the key is missing, wrong, or not allowed to use the model",
    "quota": "the account has nothing left to spend",
    "unknown_model": "there is no such model, deployment or address",
}
"""Reasons of failures and what they mean."""

TRY_AGAIN = frozenset({"rate_limited", "unavailable", "timeout", "unreachable", "broken_answer", "empty"})
"""Reasons that another attempt may cure."""

FATAL = frozenset({"credentials", "quota", "unknown_model"})
"""Reasons that every later request would share."""

_PLAIN_CODE = re.compile(r"[A-Za-z][A-Za-z0-9_.]{0,47}")


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer.

    Attributes:
        text: what the model wrote.
        finish_reason: the endpoint's word for why it ended (`stop`).
        model: the model's name as the endpoint states it.
        num_prompt_tokens: as the endpoint counted; None when it did not say.
        num_answer_tokens: likewise.
        wasted_tokens: of prompts and answers of earlier attempts, which could not be used.
    """

    text: str
    finish_reason: str = "stop"
    model: str = ""
    num_prompt_tokens: int | None = None
    num_answer_tokens: int | None = None
    wasted_tokens: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class ApiFailure:
    """Why there is no answer; holds nothing of the request's or the answer's text.

    Attributes:
        reason: a key of `REASONS`.
        detail: status and code of the server's answer, where there was one.
        num_attempts: how often it was tried.
        num_prompt_tokens: what the endpoint counted for an answer that could not be used; 0 when it did not say.
        num_answer_tokens: likewise.
        wait: seconds the server asked to wait; None when it did not.
        param: the name of the parameter that the server does not accept.
        fatal: every later request would fail likewise.
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
    """A chat endpoint gave no usable answer; `failure` says why."""

    def __init__(self, failure: ApiFailure) -> None:
        super().__init__(str(failure))
        self.failure = failure


def read_reply(content: bytes, *, accept_cut_short: bool = False) -> Reply | ApiFailure:
    """Read the body of a successful answer.

    Args:
        content: the body, JSON of a chat completion.
        accept_cut_short: take an answer that reached the limit of tokens for an answer.
    """
    try:
        body = json.loads(content)
        choice = body["choices"][0]
        text = choice["message"]["content"]
        finish_reason = str(choice.get("finish_reason") or "stop")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ApiFailure("broken_answer", "no JSON object with choices[0].message.content")
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
    """Return a count of `usage`, or None when it is not one."""
    usage = body.get("usage")
    value = usage.get(name) if isinstance(usage, Mapping) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def read_error(status: int, code: object, param: object, *, wait: float | None, key: str) -> ApiFailure:
    """Name what a status other than success means.

    Args:
        status: HTTP status.
        code: `error.code` of the body; shown only when it looks like a plain word and is not part of the key.
        param: `error.param` of the body; likewise.
        wait: seconds the server asks to wait.
        key: what must not be shown.
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
    """A connection pool, the slots of requests under way, and the common pause; belongs to one event loop.

    Args:
        api_type: `openai` or `azure`.
        api_key: the key; may be empty.
        api_base: address; empty for OpenAI's own.
        api_version: Azure only.
        timeout: seconds for one request.
        num_slots: requests under way at once.
        max_pause: longest pause in seconds that a good answer's headers may cause.
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
            "max_retries": 0,
            "timeout": timeout,
            # A redirect could carry the key to another host.
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
                "no key for the Azure endpoint: set AZURE_OPENAI_API_KEY or AZURE_OPENAI_AD_TOKEN"
            ) from None

    def pause(self, seconds: float) -> None:
        """Let no request start for so long."""
        if seconds > 0:
            self._not_before = max(self._not_before, self._loop.time() + seconds)

    async def turn(self) -> None:
        """Return when requests may start."""
        while (seconds := self._not_before - self._loop.time()) > 0:
            await asyncio.sleep(seconds)

    async def send(self, body: Mapping[str, Any], *, accept_cut_short: bool = False) -> Reply | ApiFailure:
        """Send one request and read what comes back; see `read_reply`."""
        try:
            async with asyncio.timeout(self._timeout):  # the library's own counts anew with every byte
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
    """Return the seconds that an answer with an error status asks to wait; None when it does not say."""
    milliseconds = duration(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000.0
    asked = retry_after(headers.get("retry-after"))
    return asked if asked is not None else used_up_wait(headers) or None


def used_up_wait(headers: Mapping[str, str]) -> float:
    """Return the seconds until an allowance that is used up is renewed; 0 when none is."""
    waits = [
        duration(headers.get(f"x-ratelimit-reset-{kind}")) or 0.0
        for kind in ("requests", "tokens")
        if (headers.get(f"x-ratelimit-remaining-{kind}") or "").strip() == "0"
    ]
    return max(waits, default=0.0)
