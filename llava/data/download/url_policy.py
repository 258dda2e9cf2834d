"""Which urls may be fetched, and how mirrors are put together.

    base (URL, file: URL or folder) + relative path --join--> url --check, also after every redirect--> request

What the user typed is trusted, wherever it leads: a mirror in the hospital's own network is the usual case. What a
server or a data file says is not: it must be http(s), must not step down from https to http, and must not lead to a
private address (a redirect to 169.254.169.254 asks a cloud machine for its keys).
"""

from __future__ import annotations

import ipaddress
import re
import socket
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from llava.errors import ConfigError, DownloadError

WEB = ("http", "https")
_ODD = re.compile(r"[^\x21-\x7e]|[\\\"<>^`{|}]")
_PORTS = {"http": 80, "https": 443}

Origin = tuple[str, int]
"""Host name in lower case, and port."""


def split_bases(text: str) -> list[str]:
    """Return the bases of an environment variable: separated by white space or commas, in order of preference."""
    return [word for word in re.split(r"[\s,]+", text) if word]


def check_base(base: str) -> str:
    """Return a base as the user gave it.

    Raises:
        ConfigError: it is neither an http(s) url, a file: url nor an existing folder.
    """
    scheme = urlsplit(base).scheme if "://" in base or base.startswith("file:") else ""
    if scheme in WEB:
        _origin_or_error(base)
        return base
    if scheme not in ("", "file"):
        raise ConfigError(f"base {shown(base)!r}: expected http://, https://, file:// or a folder, got {scheme}://")
    if not local_path(base).is_dir():
        raise ConfigError(f"base {base!r} is not a folder; give the folder of the mirror, or an http(s) url")
    return base


def _origin_or_error(url: str) -> Origin:
    try:
        return origin(url)
    except DownloadError as error:
        raise ConfigError(f"base {shown(url)!r} cannot be used: {error}") from error


def is_local(url: str) -> bool:
    """Whether an url is a path of this machine."""
    return "://" not in url or url.startswith("file:")


def local_path(url: str) -> Path:
    """Return the path of a local url."""
    return Path(unquote(urlsplit(url).path)) if url.startswith("file:") else Path(url)


def join(base: str, path: str) -> str:
    """Return the url of relative `path` under `base`."""
    if is_local(base) and not base.startswith("file:"):
        return str(Path(base) / path)
    return base.rstrip("/") + "/" + quote(path)


def shown(url: str) -> str:
    """Return an url for messages: without the password or the query it may carry."""
    return re.sub(r"//[^/@\s]*@", "//", url).split("?", 1)[0]


def origin(url: str) -> Origin:
    """Return host and port of an http(s) url.

    Raises:
        DownloadError: it is not http(s), or has no host.
    """
    try:
        if _ODD.search(url):  # what other programs may take for the end of the host's name
            raise ValueError("odd characters")
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise DownloadError(f"not an url: {shown(url)!r}", reason="unsafe_address") from error
    if parts.scheme not in WEB or not host:
        raise DownloadError(f"{shown(url)!r} is not an http(s) url", reason="unsafe_address")
    return host.lower(), port or _PORTS[parts.scheme]


class UrlPolicy:
    """What may be asked.

    Args:
        bases: urls the user gave; their hosts (with that port) are trusted even when they are private.
        proxies: whether the environment names proxies; behind one, names are resolved there, so only urls
            written as numbers can be judged here.
    """

    def __init__(self, bases: Iterable[str] = (), *, proxies: bool | None = None) -> None:
        self._trusted = {origin(base) for base in bases if not is_local(base)}
        known = urllib.request.getproxies()
        self._proxies = any(known.get(scheme) for scheme in ("http", "https", "all")) if proxies is None else proxies

    def trusts(self, url: str) -> bool:
        """Whether the user named this host and port."""
        return origin(url) in self._trusted

    def check(self, url: str, *, before: str | None = None) -> None:
        """Make sure that `url` may be fetched.

        Args:
            url: what will be asked.
            before: the url that redirected here.

        Raises:
            DownloadError: it may not (`unsafe_address`), or its host is unknown (`unreachable`).
        """
        host, port = origin(url)
        if before is not None and before.startswith("https:") and not url.startswith("https:"):
            raise DownloadError(
                f"{shown(before)} redirects from https to {shown(url)}; that is not followed",
                reason="unsafe_address",
            )
        if (host, port) in self._trusted:
            return
        for number in self._numbers(host, port):
            check_ip(number, url)

    def check_peer(self, url: str, number: str) -> None:
        """Make sure that the machine which answered is one that `check` would allow: names may change in between."""
        if not self._behind_proxy(origin(url)[0]) and not self.trusts(url):
            check_ip(number, url)

    def _behind_proxy(self, host: str) -> bool:
        return self._proxies and not urllib.request.proxy_bypass(host)

    def _numbers(self, host: str, port: int) -> list[str]:
        try:
            return [str(ipaddress.ip_address(host))]
        except ValueError:
            pass
        if self._behind_proxy(host):
            return []
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise DownloadError(f"the name of {host} cannot be resolved ({error})", reason="unreachable") from error
        return [str(entry[4][0]) for entry in found]


def check_ip(number: str, url: str) -> None:
    """Make sure that an IP url is a public one.

    Raises:
        DownloadError: it is private, local, multicast or reserved.
    """
    found = ipaddress.ip_address(number.split("%", 1)[0])
    inner = getattr(found, "ipv4_mapped", None) or getattr(found, "sixtofour", None) or found
    if not inner.is_global or inner.is_multicast:
        raise DownloadError(
            f"{shown(url)} leads to the private address {inner}; if that is your own server, give it as the base",
            reason="unsafe_address",
        )
