"""What the server commands share: options of listening, limits and keys, and a start without signals.

Importing this module loads neither torch nor the packages of the extra `serve`.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from llava.errors import ConfigError
from llava.serve.addresses import is_address
from llava.utils.cli import Parser, is_server_url

WITHOUT_EFFECT = ("multi_modal", "keep_aspect_ratio", "stream_interval", "use_flash_attn")
"""Options of the original workers that have no effect here."""

HOST_NAME = re.compile(r"[A-Za-z0-9._-]{1,253}")

# No option may begin with --controller or --worker: the published commands use these prefixes.


def add_loading_names(parser: Parser) -> None:
    """Add names of options for loading a model that the original commands have."""
    parser.add_argument("--load-8bit", dest="bits", action="store_const", const=8, help="as --bits 8")
    parser.add_argument("--load-4bit", dest="bits", action="store_const", const=4, help="as --bits 4")
    parser.add_argument(
        "--weights",
        choices=["stored", "int8"],
        default="stored",
        help="int8: text layers with weights of 8 bits, faster on a CPU; answers may differ slightly",
    )
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs over which the model is spread")


def add_guard_options(parser: Parser) -> None:
    """Add the guard rails that every server has."""
    parser.add_argument("--public-host", action="append", default=[], help="host name under which clients ask; repeat")
    parser.add_argument("--cors-origin", action="append", default=[], help="origin of pages that may ask; repeat")
    parser.add_argument("--api-keys", type=Path, help="file of lines ID SECRET [rpm=N] [max_running=N]; mode 600")
    parser.add_argument("--cluster-key", type=Path, help="file with the key of workers on other machines; mode 600")
    parser.add_argument("--max-body-mb", type=float, default=32.0, help="largest body of a request in MiB")
    parser.add_argument("--audit-file", type=Path, help="file to which a line for each request is appended")
    parser.add_argument("--drain-seconds", type=float, default=30.0, help="time of running requests after SIGTERM")


def add_queue_options(parser: Parser) -> None:
    """Add the limits of a worker's queue and of its requests."""
    parser.add_argument(
        "--max-running",
        "--limit-model-concurrency",
        dest="max_running",
        type=int,
        default=32,
        help="largest number of sequences that are answered at a time",
    )
    parser.add_argument("--max-waiting", type=int, default=64, help="largest number of requests that wait for a place")
    parser.add_argument(
        "--kv-cache-mb",
        type=int,
        help="megabytes of keys and values of running sequences; default: a quarter of free memory",
    )
    parser.add_argument(
        "--prefix-cache-mb",
        type=int,
        default=512,
        help="megabytes kept for later requests: keys and values, an eighth for images; 0: none",
    )
    parser.add_argument(
        "--prefill-chunk", type=int, default=512, help="tokens of prompts that are read between two steps"
    )
    parser.add_switch("--share-prefix-cache", help="let keys use what is kept of each other's requests")
    parser.add_argument("--request-timeout", type=float, default=600.0, help="seconds of a request, waiting included")
    parser.add_argument("--max-images", type=int, default=16, help="largest number of images of a request")
    parser.add_argument(
        "--max-pixels", type=int, help="largest number of pixels of an image; default: that of training"
    )
    parser.add_argument("--allow-image-url", action="append", default=[], help="URL under which images may be fetched")
    parser.add_argument("--image-folder", type=Path, help="folder whose files may be named by file: URLs")
    parser.add_switch("--log-content", help="log prompts and answers; they may identify patients")


def check_guards(args: argparse.Namespace) -> None:
    """Check the numbers and the hosts of the guard rails.

    Raises:
        ConfigError: a number is out of range, or a host cannot be that of a request.
    """
    if not 0 < args.max_body_mb <= 4096:
        raise ConfigError(f"--max-body-mb is {args.max_body_mb}; expected more than 0 and at most 4096")
    if not 0 <= args.drain_seconds <= 86400:
        raise ConfigError(f"--drain-seconds is {args.drain_seconds}; expected 0 to 86400")
    public_hosts(args)


def public_hosts(args: argparse.Namespace) -> frozenset[str]:
    """Return the hosts of --public-host in lower case.

    Raises:
        ConfigError: one cannot be the host of a request, which is compared without port and brackets.
    """
    hosts: Iterable[str] = args.public_host
    for host in hosts:
        if not (HOST_NAME.fullmatch(host) or is_address(host)):
            raise ConfigError(
                f"--public-host {host!r} is not a host name or an address; expected it without scheme, port, brackets "
                "and path, and a name with other letters as xn--..."
            )
    return frozenset(host.lower() for host in hosts)


def checked_port(port: int, option: str = "--port") -> int:
    """Return a port number.

    Raises:
        ConfigError: it is out of range.
    """
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"{option} is {port}; expected 0 to 65535")
    return port


def checked_url(url: str, option: str) -> str:
    """Return an http(s) URL of a server without a slash at its end.

    Raises:
        ConfigError: it is not such a URL.
    """
    if not is_server_url(url):
        raise ConfigError(f"{option} {url!r} is not the URL of a server; expected http://HOST:PORT")
    return url.rstrip("/")


def url_of(host: str, port: int) -> str:
    """Return the URL under which this machine reaches a server that listens on `host`."""
    name = "localhost" if host in ("", "0.0.0.0", "::") else host
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def host_of(url: str) -> str:
    """Return the host of a URL, in lower case."""
    return (urlsplit(url).hostname or "").lower()


@contextlib.contextmanager
def hangups_ignored() -> Iterator[None]:
    """Ignore SIGHUP, which ends a process by default, until the server handles it.

    Example::

        with hangups_ignored():
            load_model()
    """
    before = None
    with contextlib.suppress(ValueError):  # not in the main thread, as in tests
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGHUP, before)
