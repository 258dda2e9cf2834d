"""Chat endpoints that speak the OpenAI protocol: OpenAI, Azure, vLLM and others.

    flags > environment > the five names below  --ApiSettings-->  ChatClient  --Reply | ApiFailure-->  one per request

To fill in this file as LLaVA-Med's README shows, put values into the five names that follow. The environment is the
better place: a key in a file is easily published. `VARIABLES` lists the environment variables.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

from llava.errors import ConfigError
from llava.openai_transport import FATAL, TRY_AGAIN, ApiError, ApiFailure, Connection, Reply
from llava.utils.lookup import lookup, require
from llava.utils.retry import backoff

__all__ = ["ApiError", "ApiFailure", "ApiSettings", "ChatClient", "Messages", "Reply", "Requests", "add_api_flags"]

openai = SimpleNamespace()
openai.api_type = ""
openai.api_key = ""
openai.api_base = ""
openai.api_version = ""
DEPLOYMENT_ID = ""

Messages = Sequence[Mapping[str, Any]]
"""A conversation as the protocol has it: objects with `role` and `content`."""

VARIABLES: dict[str, dict[str, tuple[str, ...]]] = {
    "openai": {
        "api_key": ("OPENAI_API_KEY",),
        "api_base": ("OPENAI_BASE_URL", "OPENAI_API_BASE"),
        "api_version": (),
        "deployment": ("OPENAI_MODEL", "OPENAI_DEPLOYMENT"),
    },
    "azure": {
        "api_key": ("AZURE_OPENAI_API_KEY", "OPENAI_API_KEY"),
        "api_base": ("AZURE_OPENAI_ENDPOINT", "OPENAI_API_BASE"),
        "api_version": ("OPENAI_API_VERSION",),
        "deployment": ("AZURE_OPENAI_DEPLOYMENT", "OPENAI_DEPLOYMENT"),
    },
}
"""By type of endpoint: the environment variables of each setting; the first that is set counts."""

TYPES = {"openai": "openai", "open_ai": "openai", "azure": "azure"}
"""Types of endpoints, `open_ai` as the old client library called it."""

MAX_WAIT = 300.0
"""Longest wait in seconds; an endpoint that asks for more (a daily quota) fails the request."""

FIRST_WAIT = 1.0
"""Longest wait in seconds after a first failure."""


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """Where and as whom to ask.

    Attributes:
        api_type: `openai` (any compatible server) or `azure`.
        api_key: never shown; may stay empty for a server of one's own, or for Azure with AZURE_OPENAI_AD_TOKEN.
        api_base: address; empty for OpenAI's own.
        api_version: Azure only.
        deployment: name of the model, on Azure of the deployment.
        timeout: seconds for one request.
    """

    api_type: str = "openai"
    api_key: str = field(default="", repr=False)
    api_base: str = ""
    api_version: str = ""
    deployment: str = ""
    timeout: float = 120.0

    def __post_init__(self) -> None:
        lookup(TYPES, self.api_type, "type of endpoint")
        azure, variables = self.api_type == "azure", VARIABLES[TYPES[self.api_type]]
        if not self.deployment:
            raise ConfigError(f"no model is named; give --model NAME or set {' or '.join(variables['deployment'])}")
        if not self.api_key and not self.api_base:
            raise ConfigError(
                f"neither a key nor an address of an endpoint: set {variables['api_key'][0]}, or give --api-base "
                f"(or {variables['api_base'][0]}) of a server that wants no key"
            )
        if not (self.api_key.isascii() and self.api_key.isprintable()) or " " in self.api_key:
            raise ConfigError("the key has characters that no key has (a line end?); it is not shown here")
        if azure and not (self.api_base and self.api_version):
            raise ConfigError("an Azure endpoint needs --api-base (AZURE_OPENAI_ENDPOINT) and --api-version")
        parts = urlsplit(self.api_base)
        if self.api_base and (parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc):
            raise ConfigError("the endpoint's address must be http(s)://HOST[:PORT]/PATH without a user or password")
        if self.timeout <= 0:
            raise ConfigError(f"the timeout must be above 0 seconds, got {self.timeout}")

    @classmethod
    def from_env(cls, *, environ: Mapping[str, str] | None = None, **given: Any) -> ApiSettings:
        """Return the settings: what is `given`, else the environment, else the names at the top of this file.

        Args:
            environ: in the place of the process's own environment.
            given: values of the attributes; None and "" mean not given. `api_key_env` names another variable for
                the key.

        Raises:
            ConfigError: something is missing or cannot be used; says which variable or flag to set.
        """
        known = os.environ if environ is None else environ
        values = {name: value for name, value in given.items() if value not in (None, "")}
        key_variable = values.pop("api_key_env", None)
        written = values.pop("api_type", None) or known.get("OPENAI_API_TYPE") or openai.api_type
        if not written:
            only_azure = bool(known.get("AZURE_OPENAI_ENDPOINT")) and not known.get("OPENAI_API_KEY")
            written = "azure" if only_azure and "api_base" not in values else "openai"
        api_type = lookup(TYPES, written, "type of endpoint")
        for name, variables in VARIABLES[api_type].items():
            found = [known[variable] for variable in variables if known.get(variable)]
            fallback = DEPLOYMENT_ID if name == "deployment" else getattr(openai, name)
            values.setdefault(name, found[0] if found else fallback)
        if key_variable is not None:
            if not known.get(key_variable):
                raise ConfigError(f"the environment variable {key_variable} (from --api-key-env) is not set")
            values["api_key"] = known[key_variable]
        return cls(api_type=api_type, **{**values, "api_key": values["api_key"].strip()})


def add_api_flags(parser: argparse.ArgumentParser) -> None:
    """Add the options of an endpoint; `settings_of` reads them back. There is none for the key: others see flags."""
    group = parser.add_argument_group("endpoint", "environment variables are read where a flag is not given")
    for name, text in {
        "--api-type": "openai (any server that speaks its protocol) or azure",
        "--api-base": "address of the endpoint, such as http://localhost:8000/v1",
        "--api-version": "Azure's version of the protocol",
        "--api-key-env": "environment variable that holds the key, in the place of OPENAI_API_KEY",
        "--model": "the model to ask, or Azure's name of the deployment",
    }.items():
        group.add_argument(name, default="", help=text)
    group.add_argument("--timeout", type=float, default=120.0, help="seconds for one request")
    group.add_argument("--max-retries", type=int, default=5, help="further attempts after a failure that may pass")


def settings_of(args: argparse.Namespace) -> ApiSettings:
    """Return the settings that the flags of `add_api_flags` and the environment describe."""
    names = ("api_type", "api_base", "api_version", "api_key_env", "timeout")
    return ApiSettings.from_env(**{name: getattr(args, name) for name in names}, deployment=args.model)


class ChatClient:
    """Asks one endpoint, a bounded number of requests at once.

    Failures that may pass are tried again with growing, jittered waits. When the endpoint asks everybody to wait
    (`Retry-After`, or `x-ratelimit-remaining-*: 0` with its reset time), all requests of this client wait. After a
    failure that every request would share (a wrong key, nothing left to spend), nothing more is sent: what follows
    fails likewise at once.

    Args:
        settings: of the endpoint.
        max_concurrency: requests under way at once.
        max_retries: further attempts after the first.
    """

    def __init__(self, settings: ApiSettings, *, max_concurrency: int = 8, max_retries: int = 5) -> None:
        if max_concurrency < 1 or max_retries < 0:
            raise ConfigError(f"need max_concurrency >= 1 and max_retries >= 0, got {max_concurrency}, {max_retries}")
        require("openai", "openai")
        self.settings = settings
        self.max_concurrency = max_concurrency
        self.max_retries = max_retries
        self.first_wait = FIRST_WAIT
        self.max_wait = MAX_WAIT
        self.num_attempts = 0
        self._limit_name = "max_tokens"
        self._fatal: ApiFailure | None = None
        self._connected: tuple[asyncio.AbstractEventLoop, Connection] | None = None

    async def complete(self, messages: Messages, *, temperature: float | None = 0.0, **options: Any) -> str:
        """Return the answer's text; the arguments and errors of `ask`."""
        return (await self.ask(messages, temperature=temperature, **options)).text

    async def ask(
        self,
        messages: Messages,
        *,
        temperature: float | None = 0.0,
        max_tokens: int | None = None,
        accept_cut_short: bool = False,
    ) -> Reply:
        """Return the answer to one conversation.

        Args:
            messages: the conversation.
            temperature: None leaves it to the endpoint (some models take no other).
            max_tokens: limit of the answer.
            accept_cut_short: take an answer that reached the limit.

        Raises:
            ApiError: no usable answer after all attempts.
        """
        outcome = await self.outcome(
            messages, temperature=temperature, max_tokens=max_tokens, accept_cut_short=accept_cut_short
        )
        if isinstance(outcome, ApiFailure):
            raise ApiError(outcome)
        return outcome

    async def outcome(
        self,
        messages: Messages,
        *,
        temperature: float | None = 0.0,
        max_tokens: int | None = None,
        accept_cut_short: bool = False,
    ) -> Reply | ApiFailure:
        """As `ask`, but a failure is returned."""
        connection = self._connection()
        prompt_spent = answer_spent = 0
        attempt = 1
        while self._fatal is None:
            body: dict[str, Any] = {"model": self.settings.deployment, "messages": list(messages)}
            body |= {} if temperature is None else {"temperature": temperature}
            limit_name = self._limit_name
            body |= {} if max_tokens is None else {limit_name: max_tokens}
            async with connection.slots:
                await connection.turn()
                self.num_attempts += 1
                found = await connection.send(body, accept_cut_short=accept_cut_short)
            if isinstance(found, Reply):
                return replace(found, wasted_tokens=(prompt_spent, answer_spent))
            if found.param == limit_name == "max_tokens":  # newer models know the limit by its other name only
                self._limit_name = "max_completion_tokens"
                continue
            prompt_spent += found.num_prompt_tokens
            answer_spent += found.num_answer_tokens
            too_long = found.wait is not None and found.wait > self.max_wait
            if too_long or found.reason not in TRY_AGAIN or attempt > self.max_retries:
                fatal = too_long or found.reason in FATAL
                self._fatal = replace(found, fatal=True) if fatal else self._fatal
                found = replace(found, num_prompt_tokens=prompt_spent, num_answer_tokens=answer_spent)
                return replace(found, num_attempts=attempt, fatal=fatal)
            wait = max(found.wait or 0.0, backoff(attempt, first=self.first_wait, most=self.max_wait))
            if found.wait is not None or found.reason == "rate_limited":
                connection.pause(wait)
            await asyncio.sleep(wait)
            attempt += 1
        return self._fatal

    def map(self, batches: Iterable[Messages], **options: Any) -> Iterator[str | ApiFailure]:
        """Yield the answer's text or the failure of each conversation, in order; `options` as of `ask`."""
        for reply in self.replies(batches, **options):
            yield reply.text if isinstance(reply, Reply) else reply

    def replies(self, batches: Iterable[Messages], **options: Any) -> Iterator[Reply | ApiFailure]:
        """As `map`, with all that is known of an answer. At most `8 * max_concurrency` conversations are read ahead."""
        source = iter(batches)
        waiting: dict[int, Reply | ApiFailure] = {}
        num_read = num_given = 0
        with Requests(self, **options) as requests:
            while True:
                while requests.num_running < self.max_concurrency and num_read - num_given < 8 * self.max_concurrency:
                    messages = next(source, None)
                    if messages is None:
                        break
                    requests.submit(num_read, messages)
                    num_read += 1
                if num_given == num_read:
                    return
                key, outcome = requests.next()
                waiting[key] = outcome
                while num_given in waiting:
                    yield waiting.pop(num_given)
                    num_given += 1

    def _connection(self) -> Connection:
        """Return the running event loop's connection: one cannot be shared between loops."""
        loop = asyncio.get_running_loop()
        if self._connected is None or self._connected[0] is not loop:
            at = self.settings
            connection = Connection(
                at.api_type,
                api_key=at.api_key,
                api_base=at.api_base,
                api_version=at.api_version,
                timeout=at.timeout,
                num_slots=self.max_concurrency,
                max_pause=self.max_wait,
            )
            self._connected = (loop, connection)
        return self._connected[1]

    async def close(self) -> None:
        """Close the connections of the running event loop."""
        if self._connected is not None and self._connected[0] is asyncio.get_running_loop():
            await self._connected[1].close()
            self._connected = None


class Requests:
    """Requests under way, for a caller without an event loop; use it in a `with` block.

    submit(key, messages) ... next() -> (key, Reply | ApiFailure), in order of arrival

    Args:
        client: who asks.
        options: as of `ChatClient.ask`.
    """

    def __init__(self, client: ChatClient, **options: Any) -> None:
        self._client = client
        self._options = options
        self._arrived: queue.SimpleQueue[tuple[Any, Future[Reply | ApiFailure]]] = queue.SimpleQueue()
        self._futures: set[Future[Reply | ApiFailure]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="chat-requests")

    def __enter__(self) -> Requests:
        self._thread.start()
        return self

    @property
    def num_running(self) -> int:
        """How many were submitted and not yet returned by `next`."""
        return len(self._futures)

    def submit(self, key: Any, messages: Messages) -> None:
        """Start a request; `key` comes back with its outcome."""
        coroutine = self._client.outcome(messages, **self._options)
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        self._futures.add(future)
        future.add_done_callback(lambda done: self._arrived.put((key, done)))

    def next(self) -> tuple[Any, Reply | ApiFailure]:
        """Wait for the next outcome."""
        key, future = self._arrived.get()
        self._futures.discard(future)
        return key, future.result()

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result(timeout=30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=30)
        self._loop.close()

    async def _shut(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.close()
