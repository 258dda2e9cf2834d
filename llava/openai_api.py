"""Client of chat endpoints with the OpenAI protocol: OpenAI, Azure, vLLM and others.

    flags > environment > the five names below  --ApiSettings-->  ChatClient  --Reply | ApiFailure-->  one per request

The five names below can be filled in as LLaVA-Med's README shows. Prefer the environment variables in `VARIABLES`,
since a key in a file is easily published.
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
from llava.openai_transport import FATAL, RETRY_REASONS, ApiError, ApiFailure, Connection, Reply
from llava.utils.lookup import lookup, require
from llava.utils.retry import backoff_seconds

__all__ = ["ApiError", "ApiFailure", "ApiSettings", "ChatClient", "Messages", "Reply", "Requests", "add_api_flags"]

openai = SimpleNamespace()
openai.api_type = ""
openai.api_key = ""
openai.api_base = ""
openai.api_version = ""
DEPLOYMENT_ID = ""

Messages = Sequence[Mapping[str, Any]]
"""Conversation in the form of the protocol: objects with `role` and `content`."""

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
"""Environment variables of each setting, by type of endpoint; the first one that is set is used."""

TYPES = {"openai": "openai", "open_ai": "openai", "azure": "azure"}
"""Types of endpoints by name; `open_ai` is the name in old versions of the client library."""

MAX_WAIT = 300.0
"""Longest wait before a retry in seconds; if an endpoint asks for more (a daily quota), the request fails."""

FIRST_WAIT = 1.0
"""Longest wait before the first retry in seconds."""


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """Settings of an endpoint.

    Attributes:
        api_type: `openai` (any compatible server) or `azure`.
        api_key: the key, never shown; may be empty for a local server, or for Azure with AZURE_OPENAI_AD_TOKEN.
        api_base: URL of the endpoint; empty for OpenAI's.
        api_version: version of the protocol, Azure only.
        deployment: name of the model, on Azure of the deployment.
        timeout: timeout of one request in seconds.
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
            raise ConfigError(f"no model is named; pass --model NAME or set {' or '.join(variables['deployment'])}")
        if not self.api_key and not self.api_base:
            raise ConfigError(
                f"the endpoint has neither a key nor a URL; set {variables['api_key'][0]}, or pass --api-base (or set "
                f"{variables['api_base'][0]}) for a server that needs no key"
            )
        if not (self.api_key.isascii() and self.api_key.isprintable()) or " " in self.api_key:
            raise ConfigError("the key contains invalid characters (a line end?); the key itself is not shown")
        if azure and not (self.api_base and self.api_version):
            raise ConfigError("an Azure endpoint requires --api-base (AZURE_OPENAI_ENDPOINT) and --api-version")
        parts = urlsplit(self.api_base)
        if self.api_base and (parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc):
            raise ConfigError("--api-base must be a URL http(s)://HOST[:PORT]/PATH without a user or password")
        if self.timeout <= 0:
            raise ConfigError(f"--timeout must be above 0 seconds, got {self.timeout}")

    @classmethod
    def from_env(cls, *, environ: Mapping[str, str] | None = None, **given: Any) -> ApiSettings:
        """Return the settings from `given`, else the environment, else the names at the top of this file.

        Args:
            environ: environment variables; None for those of the process.
            given: values of the attributes; None and "" mean not given. `api_key_env` names another variable for
                the key.

        Raises:
            ConfigError: a setting is missing or invalid; the message names the variable or flag to set.
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
                raise ConfigError(f"environment variable {key_variable}, named by --api-key-env, is not set")
            values["api_key"] = known[key_variable]
        return cls(api_type=api_type, **{**values, "api_key": values["api_key"].strip()})


def add_api_flags(parser: argparse.ArgumentParser) -> None:
    """Add the options of an endpoint, which `settings_of` reads."""
    group = parser.add_argument_group("endpoint", "environment variables are used for flags that are not given")
    # No flag takes the key itself, because other users of a machine can see command lines.
    for name, text in {
        "--api-type": "openai (any server with the same protocol) or azure",
        "--api-base": "URL of the endpoint, such as http://localhost:8000/v1",
        "--api-version": "Azure's version of the protocol",
        "--api-key-env": "environment variable that holds the key, instead of OPENAI_API_KEY",
        "--model": "name of the model, or Azure's name of the deployment",
    }.items():
        group.add_argument(name, default="", help=text)
    group.add_argument("--timeout", type=float, default=120.0, help="timeout of one request in seconds")
    group.add_argument("--max-retries", type=int, default=5, help="retries after a transient failure")


def settings_of(args: argparse.Namespace) -> ApiSettings:
    """Return the settings that the flags of `add_api_flags` and the environment describe."""
    names = ("api_type", "api_base", "api_version", "api_key_env", "timeout")
    return ApiSettings.from_env(**{name: getattr(args, name) for name in names}, deployment=args.model)


class ChatClient:
    """Client of one endpoint with a bounded number of concurrent requests.

    Transient failures are retried after growing, jittered waits. If the endpoint limits the rate (`Retry-After`, or
    `x-ratelimit-remaining-*: 0` with its reset time), all requests of the client wait. After a failure that every
    request would share (a wrong key, an exhausted quota), all further requests fail at once without being sent.

    Args:
        settings: settings of the endpoint.
        max_concurrency: requests in flight at once.
        max_retries: retries per request.

    Example::

        client = ChatClient(ApiSettings.from_env(deployment="model-name"))
        for answer in client.map([[{"role": "user", "content": "What is a pneumothorax?"}]]):
            print(answer)  # text, or an ApiFailure
    """

    def __init__(self, settings: ApiSettings, *, max_concurrency: int = 8, max_retries: int = 5) -> None:
        if max_concurrency < 1 or max_retries < 0:
            raise ConfigError(
                f"the number of concurrent requests must be at least 1 and --max-retries at least 0, got "
                f"{max_concurrency} and {max_retries}"
            )
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
        """Return the text of the answer; arguments and errors are those of `ask`."""
        return (await self.ask(messages, temperature=temperature, **options)).text

    async def ask(
        self,
        messages: Messages,
        *,
        temperature: float | None = 0.0,
        max_tokens: int | None = None,
        accept_cut_short: bool = False,
        sampling: Mapping[str, Any] | None = None,
    ) -> Reply:
        """Return the answer to one conversation.

        Args:
            messages: the conversation.
            temperature: sampling temperature; None for the endpoint's default, which some models require.
            max_tokens: limit of the answer in tokens.
            accept_cut_short: accept an answer that reached the limit.
            sampling: other sampling parameters of the protocol, such as `top_p`.

        Raises:
            ApiError: no usable answer after all retries.
        """
        outcome = await self.outcome(
            messages,
            temperature=temperature,
            max_tokens=max_tokens,
            accept_cut_short=accept_cut_short,
            sampling=sampling,
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
        sampling: Mapping[str, Any] | None = None,
    ) -> Reply | ApiFailure:
        """Return the answer or the failure of one conversation; arguments are those of `ask`."""
        connection = self._connection()
        prompt_spent = answer_spent = 0
        attempt = 1
        while self._fatal is None:
            body: dict[str, Any] = {"model": self.settings.deployment, "messages": list(messages)}
            body |= dict(sampling or {}) | ({} if temperature is None else {"temperature": temperature})
            limit_name = self._limit_name
            body |= {} if max_tokens is None else {limit_name: max_tokens}
            async with connection.slots:
                await connection.turn()
                self.num_attempts += 1
                found = await connection.send(body, accept_cut_short=accept_cut_short)
            if isinstance(found, Reply):
                return replace(found, wasted_tokens=(prompt_spent, answer_spent))
            if found.param == limit_name == "max_tokens":  # newer models accept only the other name of the limit
                self._limit_name = "max_completion_tokens"
                continue
            prompt_spent += found.num_prompt_tokens
            answer_spent += found.num_answer_tokens
            too_long = found.wait is not None and found.wait > self.max_wait
            if too_long or found.reason not in RETRY_REASONS or attempt > self.max_retries:
                fatal = too_long or found.reason in FATAL
                self._fatal = replace(found, fatal=True) if fatal else self._fatal
                found = replace(found, num_prompt_tokens=prompt_spent, num_answer_tokens=answer_spent)
                return replace(found, num_attempts=attempt, fatal=fatal)
            wait = max(found.wait or 0.0, backoff_seconds(attempt, first=self.first_wait, most=self.max_wait))
            if found.wait is not None or found.reason == "rate_limited":
                connection.pause(wait)
            await asyncio.sleep(wait)
            attempt += 1
        return self._fatal

    def map(self, batches: Iterable[Messages], **options: Any) -> Iterator[str | ApiFailure]:
        """Yield the text or the failure of each conversation, in order; `options` are those of `ask`."""
        for reply in self.replies(batches, **options):
            yield reply.text if isinstance(reply, Reply) else reply

    def replies(self, batches: Iterable[Messages], **options: Any) -> Iterator[Reply | ApiFailure]:
        """Yield the answer or the failure of each conversation, in order; `options` are those of `ask`.

        At most `8 * max_concurrency` conversations are read ahead.
        """
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
        """Return the connection of the running event loop; connections cannot be shared between loops."""
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
    """Requests in flight for a caller without an event loop; use it in a `with` block.

    submit(key, messages) ... next() -> (key, Reply | ApiFailure), in order of arrival

    Args:
        client: the client that sends them.
        options: those of `ChatClient.ask`.
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
        """Number of requests that were submitted and not yet returned by `next`."""
        return len(self._futures)

    def submit(self, key: Any, messages: Messages) -> None:
        """Start a request; `next` returns `key` with its outcome."""
        coroutine = self._client.outcome(messages, **self._options)
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        self._futures.add(future)
        future.add_done_callback(lambda done: self._arrived.put((key, done)))

    def next(self) -> tuple[Any, Reply | ApiFailure]:
        """Wait for the next outcome and return it with its key."""
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
