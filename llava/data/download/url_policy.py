"""Policy of URLs that may be requested, and composition of URLs from mirrors.

    base (URL, file: URL or folder) + relative path --join--> URL --check, also after every redirect--> request

URLs given by the user are trusted, including those of a hospital's own network. URLs from a server or a data file are
not: they must be http(s), must not redirect from https to http, and must not lead to a private IP address (a redirect
to 169.254.169.254 would read the credentials of a cloud machine).
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
    """Return the bases of an environment variable, which whitespace or commas separate."""
    return [word for word in re.split(r"[\s,]+", text) if word]


def check_base(base: str) -> str:
    """Return a base unchanged after checking it.

    Raises:
        ConfigError: it is neither an http(s) URL, a file: URL nor an existing folder.
    """
    scheme = urlsplit(base).scheme if "://" in base or base.startswith("file:") else ""
    if scheme in WEB:
        _origin_or_error(base)
        return base
    if scheme not in ("", "file"):
        raise ConfigError(
            f"base {redacted_url(base)!r}: expected http://, https://, file:// or a folder, got {scheme}://"
        )
    if not local_path(base).is_dir():
        raise ConfigError(f"base {base!r} is not a folder; pass the folder of a mirror, or an http(s) URL")
    return base


def _origin_or_error(url: str) -> Origin:
    try:
        return url_origin(url)
    except DownloadError as error:
        raise ConfigError(f"base {redacted_url(url)!r} is invalid: {error}") from error


def is_local(url: str) -> bool:
    """Return whether a URL is a local path or a file: URL."""
    return "://" not in url or url.startswith("file:")


def local_path(url: str) -> Path:
    """Return the path of a local URL."""
    return Path(unquote(urlsplit(url).path)) if url.startswith("file:") else Path(url)


def join_url(base: str, path: str) -> str:
    """Return the URL of relative `path` under `base`."""
    if is_local(base) and not base.startswith("file:"):
        return str(Path(base) / path)
    return base.rstrip("/") + "/" + quote(path)


def redacted_url(url: str) -> str:
    """Return a URL for messages, without password and query."""
    return re.sub(r"//[^/@\s]*@", "//", url).split("?", 1)[0]


def url_origin(url: str) -> Origin:
    """Return host and port of an http(s) URL.

    Raises:
        DownloadError: it is not http(s), or has no host.
    """
    try:
        if _ODD.search(url):  # other programs may treat such a character as the end of the host name
            raise ValueError("odd characters")
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise DownloadError(f"{redacted_url(url)!r} is not a URL", reason="unsafe_address") from error
    if parts.scheme not in WEB or not host:
        raise DownloadError(f"{redacted_url(url)!r} is not an http(s) URL", reason="unsafe_address")
    return host.lower(), port or _PORTS[parts.scheme]


class UrlPolicy:
    """Policy of URLs that may be requested.

    Args:
        bases: URLs given by the user; their hosts (with that port) are trusted even if they are private.
        proxies: whether a proxy is used; a proxy resolves host names itself, so only numeric hosts can be checked.
            None: as the environment says.
    """

    def __init__(self, bases: Iterable[str] = (), *, proxies: bool | None = None) -> None:
        self._trusted = {url_origin(base) for base in bases if not is_local(base)}
        known = urllib.request.getproxies()
        self._proxies = any(known.get(scheme) for scheme in ("http", "https", "all")) if proxies is None else proxies

    def trusts(self, url: str) -> bool:
        """Return whether the user named this host and port."""
        return url_origin(url) in self._trusted

    def check(self, url: str, *, before: str | None = None) -> None:
        """Check that `url` may be requested.

        Args:
            url: the URL.
            before: the URL that redirected to it.

        Raises:
            DownloadError: it may not be requested (`unsafe_address`), or its host is unknown (`unreachable`).
        """
        host, port = url_origin(url)
        if before is not None and before.startswith("https:") and not url.startswith("https:"):
            raise DownloadError(
                f"{redacted_url(before)} redirects from https to {redacted_url(url)}, which is not allowed",
                reason="unsafe_address",
            )
        if (host, port) in self._trusted:
            return
        for number in self._numbers(host, port):
            check_ip(number, url)

    def check_peer(self, url: str, number: str) -> None:
        """Check the IP address of the server that responded.

        Raises:
            DownloadError: it is not public, and the user did not name the host.
        """
        # A host name may resolve to another address between `check` and the connection.
        if not self._behind_proxy(url_origin(url)[0]) and not self.trusts(url):
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
            raise DownloadError(f"host {host} cannot be resolved ({error})", reason="unreachable") from error
        return [str(entry[4][0]) for entry in found]


def check_ip(number: str, url: str) -> None:
    """Check that an IP address is public.

    Raises:
        DownloadError: it is private, local, multicast or reserved.
    """
    found = ipaddress.ip_address(number.split("%", 1)[0])
    inner = getattr(found, "ipv4_mapped", None) or getattr(found, "sixtofour", None) or found
    if not inner.is_global or inner.is_multicast:
        raise DownloadError(
            f"{redacted_url(url)} leads to the private IP address {inner}; if that is your own server, pass it as a "
            "base",
            reason="unsafe_address",
        )
