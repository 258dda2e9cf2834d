"""HTTP for downloads: one client for all threads, which asks politely, follows redirects only where that is safe.

    url --turn of the host, url policy--> request --redirects, each checked again--> Answer, a stream of bytes

httpx2 and not urllib: connections stay open between the hundred thousands of requests to one host, every single read
has a time limit, bodies come as they were sent (an archive is not unzipped on the way), proxies of the environment are
used, and redirects are left to us. It is installed with the package, since huggingface_hub needs it as well.
"""

from __future__ import annotations

import argparse
import math
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

import httpx2

import llava
from llava.data.download.url_policy import UrlPolicy, check_base, origin, shown, split_bases
from llava.errors import ConfigError, DownloadError
from llava.utils.cli import Parser
from llava.utils.retry import retry_after


class HostRateLimiter:
    """Spreads the requests to each host evenly over time.

    Args:
        per_second: requests a second and host; 0 does not limit.
        stopped: set when the program ends; nobody waits any longer then.
    """

    def __init__(self, per_second: float, stopped: threading.Event) -> None:
        if per_second < 0:
            raise ConfigError(f"the rate of requests must not be negative, got {per_second}")
        self._interval = 1.0 / per_second if per_second else 0.0
        self._stopped = stopped
        self._next: dict[str, float] = {}
        self._lock = threading.Lock()

    def wait(self, host: str) -> None:
        """Return when it is the caller's turn to ask `host`."""
        while not self._stopped.is_set():
            with self._lock:
                now = time.monotonic()
                turn = self._next.get(host, now)
                if turn <= now:
                    self._next[host] = now + self._interval
                    return
            self._stopped.wait(turn - now)

    def pause(self, host: str, seconds: float) -> None:
        """Let nobody ask `host` for so long."""
        with self._lock:
            self._next[host] = max(self._next.get(host, 0.0), time.monotonic() + seconds)


RETRY_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
GONE = frozenset({404, 410})
REDIRECTS = frozenset({301, 302, 303, 307, 308})
TRANSIENT = frozenset({"unreachable", "stalled", "cut_off", "unavailable"})
"""Reasons to ask again."""


@dataclass(frozen=True, slots=True)
class NetworkOptions:
    """How servers are asked.

    Attributes:
        user_agent: how we introduce ourselves; a contact url in it is good manners on long runs.
        per_second: requests a second and host (the archive's own rule for programs is three).
        max_attempts: how often a file is asked for that makes no progress.
        first_wait: seconds before the second attempt; doubled for each further one.
        max_wait: longest wait in seconds, also where a server asks for a longer one.
        connect_seconds: longest time to a connection.
        stall_seconds: a server that sends fewer than `min_speed` bytes a second for so long is given up.
        min_speed: bytes a second.
        max_redirects: redirects that are followed.
    """

    user_agent: str = f"llava/{llava.__version__} (research data download)"
    per_second: float = 3.0
    max_attempts: int = 5
    first_wait: float = 1.0
    max_wait: float = 120.0
    connect_seconds: float = 20.0
    stall_seconds: float = 30.0
    min_speed: float = 1024.0
    max_redirects: int = 5

    def __post_init__(self) -> None:
        numbers = (self.per_second, self.first_wait, self.max_wait, self.stall_seconds, self.min_speed)
        if not all(map(math.isfinite, numbers)):
            raise ConfigError(f"rates, waits and speeds must be finite numbers, got {', '.join(map(str, numbers))}")
        if self.max_attempts < 1 or self.stall_seconds <= 0 or self.connect_seconds <= 0:
            raise ConfigError("--max-attempts must be at least 1, and --stall-seconds above 0")


@dataclass(slots=True)
class Answer:
    """An answer whose body has not been read.

    Attributes:
        response: the answer.
        url: where it came from in the end.
    """

    response: httpx2.Response
    url: str

    @property
    def status(self) -> int:
        """The HTTP status code."""
        return self.response.status_code

    def header(self, name: str) -> str | None:
        """Return a header, or None."""
        value = self.response.headers.get(name)
        return None if value is None else str(value)

    def close(self) -> None:
        """End the answer; what was not read is not fetched."""
        self.response.close()


class Client:
    """Asks servers; may be shared by threads.

    Args:
        options: how.
        bases: urls the user gave, which may be private.
        num_connections: most connections that are open at a time.
    """

    def __init__(
        self, options: NetworkOptions | None = None, *, bases: Iterable[str] = (), num_connections: int = 16
    ) -> None:
        self.options = options or NetworkOptions()
        self.stopped = threading.Event()
        self.policy = UrlPolicy(bases)
        self._turns = HostRateLimiter(self.options.per_second, self.stopped)
        timeout = httpx2.Timeout(self.options.stall_seconds, connect=self.options.connect_seconds, pool=None)
        self._http = httpx2.Client(
            headers={"User-Agent": self.options.user_agent, "Accept-Encoding": "identity"},
            timeout=timeout,
            follow_redirects=False,
            limits=httpx2.Limits(max_connections=num_connections, max_keepalive_connections=num_connections),
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End all waiting and all connections; threads that still read get a `DownloadError`."""
        self.stopped.set()
        self._http.close()

    def wait(self, seconds: float) -> None:
        """Wait, unless the client is closed in the meantime."""
        self.stopped.wait(seconds)

    def open(self, url: str, *, start: int = 0, etag: str | None = None) -> Answer:
        """Ask for a file from byte `start` on; the answer has status 200, 206 or 416.

        Args:
            url: an http(s) url.
            start: first byte that is wanted.
            etag: the version of the file that the bytes before `start` belong to, if known.

        Raises:
            DownloadError: any other answer, or none; its reason is one of `TRANSIENT` where asking again may help.
        """
        headers = {} if start == 0 else {"Range": f"bytes={start}-"}
        if start and etag and not etag.startswith("W/"):
            headers["If-Range"] = etag
        before: str | None = None
        for _ in range(self.options.max_redirects + 1):
            answer = self._ask(url, headers, before)
            if answer.status not in REDIRECTS:
                return self._accepted(answer)
            answer.close()
            before, url = url, _target(url, answer.header("Location"))
        raise DownloadError(f"{shown(url)}: more than {self.options.max_redirects} redirects", reason="refused")

    def _ask(self, url: str, headers: dict[str, str], before: str | None) -> Answer:
        if self.stopped.is_set():
            raise DownloadError("stopped", reason="cut_off")
        self.policy.check(url, before=before)
        self._turns.wait(origin(url)[0])
        try:
            request = self._http.build_request("GET", url, headers=headers)
            response = self._http.send(request, stream=True)
        except (httpx2.HTTPError, httpx2.InvalidURL, RuntimeError) as error:
            raise named_error(error, url) from error
        answer = Answer(response, url)
        try:
            self._check_peer(answer)
        except DownloadError:
            answer.close()
            raise
        return answer

    def _check_peer(self, answer: Answer) -> None:
        stream = answer.response.extensions.get("network_stream")
        peer = None if stream is None else stream.get_extra_info("server_addr")
        if peer:
            self.policy.check_peer(answer.url, str(peer[0]))

    def _accepted(self, answer: Answer) -> Answer:
        """Return an answer that has a body to read (or 416), and raise what any other one means."""
        if answer.status in (200, 206, 416):
            return answer
        answer.close()
        message = (
            f"{shown(answer.url)}: the server answers {answer.status} {answer.response.reason_phrase}".rstrip()
        )
        if answer.status in RETRY_STATUSES:
            seconds = retry_after(answer.header("Retry-After"))
            if seconds is not None:
                self._turns.pause(urlsplit(answer.url).hostname or "", min(seconds, self.options.max_wait))
            raise DownloadError(message, reason="unavailable")
        raise DownloadError(message, reason="not_found" if answer.status in GONE else "refused")

    def chunks(self, answer: Answer) -> Iterator[bytes]:
        """Yield the body of an answer as it comes.

        Raises:
            DownloadError: it stops coming, comes too slowly, or ends before it is complete.
        """
        pieces = answer.response.iter_raw()
        waited, num_bytes = 0.0, 0
        try:
            while True:
                before = time.monotonic()
                piece = next(pieces, None)
                waited += time.monotonic() - before  # what the reader does with a piece is not the server's time
                if piece is None:
                    return
                if self.stopped.is_set():
                    raise DownloadError("stopped", reason="cut_off")
                num_bytes += len(piece)
                if waited >= self.options.stall_seconds:
                    if num_bytes < self.options.min_speed * waited:
                        told = f"{num_bytes} bytes in {waited:.0f} s"
                        raise DownloadError(f"{shown(answer.url)}: {told}", reason="stalled")
                    waited, num_bytes = 0.0, 0
                yield piece
        except (httpx2.HTTPError, httpx2.StreamError, RuntimeError) as error:
            raise named_error(error, answer.url) from error
        finally:
            answer.close()


def _target(url: str, location: str | None) -> str:
    """Return where a redirect leads."""
    try:
        return urljoin(url, location or "")
    except ValueError as error:
        raise DownloadError(f"{shown(url)} redirects to what is no url", reason="unsafe_address") from error


def named_error(error: Exception, url: str) -> DownloadError:
    """Return the named error for one of the HTTP library's."""
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError):
        reason = "unreachable"
    elif isinstance(error, httpx2.TimeoutException):
        reason = "stalled"
    elif isinstance(error, httpx2.InvalidURL | httpx2.UnsupportedProtocol | httpx2.LocalProtocolError):
        reason = "unsafe_address"
    else:
        reason = "cut_off"
    return DownloadError(f"{shown(url)}: {type(error).__name__} {error}".rstrip(), reason=reason)


DEFAULTS = NetworkOptions()


def add_network_options(parser: Parser) -> None:
    """Add the flags of `NetworkOptions`."""
    group = parser.add_argument_group("network")
    group.add_argument(
        "--rate", type=float, default=DEFAULTS.per_second, help="requests a second and host; 0: no limit"
    )
    group.add_argument(
        "--max-attempts",
        type=int,
        default=DEFAULTS.max_attempts,
        help="how often a file that makes no progress is asked for",
    )
    group.add_argument(
        "--first-wait", type=float, default=DEFAULTS.first_wait, help="seconds before asking again; doubles"
    )
    group.add_argument(
        "--max-wait",
        type=float,
        default=DEFAULTS.max_wait,
        help="longest wait, also when a server asks for a longer one",
    )
    group.add_argument(
        "--stall-seconds",
        type=float,
        default=DEFAULTS.stall_seconds,
        help="give up a server that is this long too slow",
    )
    group.add_argument(
        "--min-speed", type=float, default=DEFAULTS.min_speed, help="bytes a second that are not too slow"
    )
    group.add_argument(
        "--user-agent", default=DEFAULTS.user_agent, help="how to introduce oneself; add an e-mail address on long runs"
    )


def network_options(args: argparse.Namespace) -> NetworkOptions:
    """Return what the flags say."""
    return NetworkOptions(
        user_agent=args.user_agent,
        per_second=args.rate,
        max_attempts=args.max_attempts,
        first_wait=args.first_wait,
        max_wait=args.max_wait,
        stall_seconds=args.stall_seconds,
        min_speed=args.min_speed,
    )


def bases_from(given: Sequence[str] | None, variable: str) -> list[str]:
    """Return the bases of a flag, or else those of an environment variable.

    Raises:
        ConfigError: one of them is neither an http(s) url nor a folder.
    """
    return [check_base(base) for base in given or split_bases(os.environ.get(variable, ""))]
