"""The contact with the client library: one connection to a chat endpoint, within one event loop.

    body of a request  --send-->  Reply | ApiFailure

It sends once; whether to send again is decided by `llava.openai_api.ChatClient`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from llava.errors import ConfigError
from llava.openai_failures import ApiFailure, Reply, read_error, read_reply
from llava.utils.lookup import require
from llava.utils.retry import duration, retry_after


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
