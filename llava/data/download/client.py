"""HTTP client for downloads, shared by all threads: rate limit per host, retry waits, safe redirects.

    URL --rate limit, URL policy--> request --redirects, each checked again--> Answer, a stream of bytes

httpx2 rather than urllib: it keeps connections open between hundreds of thousands of requests to one host, limits the
time of every read, returns bodies as sent (archives stay zipped), uses the proxies of the environment, and leaves
redirects to the caller. It is installed with the package, since huggingface_hub depends on it.
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
from llava.data.download.url_policy import UrlPolicy, check_base, redacted_url, split_bases, url_origin
from llava.errors import ConfigError, DownloadError
from llava.utils.cli import Parser
from llava.utils.retry import retry_after_seconds


class HostRateLimiter:
    """Limit of the request rate per host.

    Args:
        per_second: requests per second and host; 0: no limit.
        stopped: event that ends all waits.
    """

    def __init__(self, per_second: float, stopped: threading.Event) -> None:
        if per_second < 0:
            raise ConfigError(f"--rate must be at least 0, got {per_second}")
        self._interval = 1.0 / per_second if per_second else 0.0
        self._stopped = stopped
        self._next: dict[str, float] = {}
        self._lock = threading.Lock()

    def wait(self, host: str) -> None:
        """Wait until the next request to `host` is allowed."""
        while not self._stopped.is_set():
            with self._lock:
                now = time.monotonic()
                turn = self._next.get(host, now)
                if turn <= now:
                    self._next[host] = now + self._interval
                    return
            self._stopped.wait(turn - now)

    def pause(self, host: str, seconds: float) -> None:
        """Allow no request to `host` for this many seconds."""
        with self._lock:
            self._next[host] = max(self._next.get(host, 0.0), time.monotonic() + seconds)


RETRY_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
GONE = frozenset({404, 410})
REDIRECTS = frozenset({301, 302, 303, 307, 308})
TRANSIENT = frozenset({"unreachable", "stalled", "cut_off", "unavailable"})
"""Reasons after which a request is retried."""


@dataclass(frozen=True, slots=True)
class NetworkOptions:
    """Options of requests to servers.

    Attributes:
        user_agent: the User-Agent header; on long runs it should contain an e-mail address.
        per_second: requests per second and host (PMC allows programs three).
        max_attempts: attempts per file without progress.
        first_wait: seconds before the first retry; doubled for each further one.
        max_wait: longest wait before a retry in seconds, even if a server asks for more.
        connect_seconds: timeout of a connection attempt in seconds.
        stall_seconds: seconds of a transfer slower than `min_speed` after which it is aborted.
        min_speed: lowest accepted speed in bytes per second.
        max_redirects: maximum number of redirects per request.
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
            raise ConfigError(
                f"--rate, --first-wait, --max-wait, --stall-seconds and --min-speed must be finite numbers, got "
                f"{', '.join(map(str, numbers))}"
            )
        if self.max_attempts < 1 or self.stall_seconds <= 0 or self.connect_seconds <= 0:
            raise ConfigError(
                f"--max-attempts must be at least 1 and --stall-seconds above 0, got {self.max_attempts} and "
                f"{self.stall_seconds}"
            )


@dataclass(slots=True)
class Answer:
    """HTTP response whose body has not been read.

    Attributes:
        response: the response.
        url: the URL after all redirects.
    """

    response: httpx2.Response
    url: str

    @property
    def status(self) -> int:
        """The HTTP status code."""
        return self.response.status_code

    def header(self, name: str) -> str | None:
        """Return the value of a header; None if it is missing."""
        value = self.response.headers.get(name)
        return None if value is None else str(value)

    def close(self) -> None:
        """Close the response without reading the rest of its body."""
        self.response.close()


class Client:
    """HTTP client; may be shared by threads.

    Args:
        options: options of requests.
        bases: URLs given by the user, which may be private.
        num_connections: maximum number of open connections.
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
        """End all waits and connections; threads that are still reading get a `DownloadError`."""
        self.stopped.set()
        self._http.close()

    def wait(self, seconds: float) -> None:
        """Wait for this many seconds, or until the client is closed."""
        self.stopped.wait(seconds)

    def open(self, url: str, *, start: int = 0, etag: str | None = None) -> Answer:
        """Request a file from byte `start` on and return a response of status 200, 206 or 416.

        Args:
            url: an http(s) URL.
            start: first byte to return.
            etag: version of the file that the bytes before `start` belong to, if known.

        Raises:
            DownloadError: another status, or no response; the reason is in `TRANSIENT` if a retry may help.
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
        raise DownloadError(f"{redacted_url(url)}: more than {self.options.max_redirects} redirects", reason="refused")

    def _ask(self, url: str, headers: dict[str, str], before: str | None) -> Answer:
        if self.stopped.is_set():
            raise DownloadError("stopped", reason="cut_off")
        self.policy.check(url, before=before)
        self._turns.wait(url_origin(url)[0])
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
        """Return a response of status 200, 206 or 416; raise the error that any other status means."""
        if answer.status in (200, 206, 416):
            return answer
        answer.close()
        message = (
            f"{redacted_url(answer.url)}: the server returned {answer.status} {answer.response.reason_phrase}".rstrip()
        )
        if answer.status in RETRY_STATUSES:
            seconds = retry_after_seconds(answer.header("Retry-After"))
            if seconds is not None:
                self._turns.pause(urlsplit(answer.url).hostname or "", min(seconds, self.options.max_wait))
            raise DownloadError(message, reason="unavailable")
        raise DownloadError(message, reason="not_found" if answer.status in GONE else "refused")

    def chunks(self, answer: Answer) -> Iterator[bytes]:
        """Yield the body of a response in chunks.

        Raises:
            DownloadError: the transfer stops, is too slow, or ends before the body is complete.
        """
        pieces = answer.response.iter_raw()
        waited, num_bytes = 0.0, 0
        try:
            while True:
                before = time.monotonic()
                piece = next(pieces, None)
                waited += time.monotonic() - before  # excludes the time that the caller spends on a chunk
                if piece is None:
                    return
                if self.stopped.is_set():
                    raise DownloadError("stopped", reason="cut_off")
                num_bytes += len(piece)
                if waited >= self.options.stall_seconds:
                    if num_bytes < self.options.min_speed * waited:
                        speed = f"only {num_bytes} bytes in {waited:.0f} s"
                        raise DownloadError(f"{redacted_url(answer.url)}: {speed}", reason="stalled")
                    waited, num_bytes = 0.0, 0
                yield piece
        except (httpx2.HTTPError, httpx2.StreamError, RuntimeError) as error:
            raise named_error(error, answer.url) from error
        finally:
            answer.close()


def _target(url: str, location: str | None) -> str:
    """Return the target URL of a redirect."""
    try:
        return urljoin(url, location or "")
    except ValueError as error:
        raise DownloadError(f"{redacted_url(url)} redirects to an invalid URL", reason="unsafe_address") from error


def named_error(error: Exception, url: str) -> DownloadError:
    """Return the error with a reason for an error of the HTTP library."""
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError):
        reason = "unreachable"
    elif isinstance(error, httpx2.TimeoutException):
        reason = "stalled"
    elif isinstance(error, httpx2.InvalidURL | httpx2.UnsupportedProtocol | httpx2.LocalProtocolError):
        reason = "unsafe_address"
    else:
        reason = "cut_off"
    return DownloadError(f"{redacted_url(url)}: {type(error).__name__} {error}".rstrip(), reason=reason)


DEFAULTS = NetworkOptions()


def add_network_options(parser: Parser) -> None:
    """Add the options of `NetworkOptions`."""
    group = parser.add_argument_group("network")
    group.add_argument(
        "--rate", type=float, default=DEFAULTS.per_second, help="requests per second and host; 0: no limit"
    )
    group.add_argument(
        "--max-attempts",
        type=int,
        default=DEFAULTS.max_attempts,
        help="attempts per file without progress",
    )
    group.add_argument(
        "--first-wait",
        type=float,
        default=DEFAULTS.first_wait,
        help="seconds before the first retry; doubled for each further one",
    )
    group.add_argument(
        "--max-wait",
        type=float,
        default=DEFAULTS.max_wait,
        help="longest wait before a retry in seconds, even if a server asks for more",
    )
    group.add_argument(
        "--stall-seconds",
        type=float,
        default=DEFAULTS.stall_seconds,
        help="abort a transfer that is slower than --min-speed for this many seconds",
    )
    group.add_argument(
        "--min-speed", type=float, default=DEFAULTS.min_speed, help="lowest accepted speed in bytes per second"
    )
    group.add_argument(
        "--user-agent", default=DEFAULTS.user_agent, help="User-Agent header; add an e-mail address on long runs"
    )


def network_options(args: argparse.Namespace) -> NetworkOptions:
    """Return the options that the flags describe."""
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
    """Return the bases given to a flag or, without any, those of an environment variable.

    Raises:
        ConfigError: a base is neither an http(s) URL nor a folder.
    """
    return [check_base(base) for base in given or split_bases(os.environ.get(variable, ""))]
