"""Which addresses may be fetched, and how mirrors are put together.

    base (URL, file: URL or folder) + relative path --join--> address --check, also after every redirect--> request

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
        ConfigError: it is neither an http(s) address, a file: address nor an existing folder.
    """
    scheme = urlsplit(base).scheme if "://" in base or base.startswith("file:") else ""
    if scheme in WEB:
        _origin_or_error(base)
        return base
    if scheme not in ("", "file"):
        raise ConfigError(f"base {shown(base)!r}: expected http://, https://, file:// or a folder, got {scheme}://")
    if not local_path(base).is_dir():
        raise ConfigError(f"base {base!r} is not a folder; give the folder of the mirror, or an http(s) address")
    return base


def _origin_or_error(address: str) -> Origin:
    try:
        return origin(address)
    except DownloadError as error:
        raise ConfigError(f"base {shown(address)!r} cannot be used: {error}") from error


def is_local(address: str) -> bool:
    """Whether an address is a path of this machine."""
    return "://" not in address or address.startswith("file:")


def local_path(address: str) -> Path:
    """Return the path of a local address."""
    return Path(unquote(urlsplit(address).path)) if address.startswith("file:") else Path(address)


def join(base: str, path: str) -> str:
    """Return the address of relative `path` under `base`."""
    if is_local(base) and not base.startswith("file:"):
        return str(Path(base) / path)
    return base.rstrip("/") + "/" + quote(path)


def shown(address: str) -> str:
    """Return an address for messages: without the password or the query it may carry."""
    return re.sub(r"//[^/@\s]*@", "//", address).split("?", 1)[0]


def origin(address: str) -> Origin:
    """Return host and port of an http(s) address.

    Raises:
        DownloadError: it is not http(s), or has no host.
    """
    try:
        if _ODD.search(address):  # what other programs may take for the end of the host's name
            raise ValueError("odd characters")
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise DownloadError(f"not an address: {shown(address)!r}", reason="unsafe_address") from error
    if parts.scheme not in WEB or not host:
        raise DownloadError(f"{shown(address)!r} is not an http(s) address", reason="unsafe_address")
    return host.lower(), port or _PORTS[parts.scheme]


class AddressPolicy:
    """What may be asked.

    Args:
        bases: addresses the user gave; their hosts (with that port) are trusted even when they are private.
        proxies: whether the environment names proxies; behind one, names are resolved there, so only addresses
            written as numbers can be judged here.
    """

    def __init__(self, bases: Iterable[str] = (), *, proxies: bool | None = None) -> None:
        self._trusted = {origin(base) for base in bases if not is_local(base)}
        known = urllib.request.getproxies()
        self._proxies = any(known.get(scheme) for scheme in ("http", "https", "all")) if proxies is None else proxies

    def trusts(self, address: str) -> bool:
        """Whether the user named this host and port."""
        return origin(address) in self._trusted

    def check(self, address: str, *, before: str | None = None) -> None:
        """Make sure that `address` may be fetched.

        Args:
            address: what will be asked.
            before: the address that redirected here.

        Raises:
            DownloadError: it may not (`unsafe_address`), or its host is unknown (`unreachable`).
        """
        host, port = origin(address)
        if before is not None and before.startswith("https:") and not address.startswith("https:"):
            raise DownloadError(
                f"{shown(before)} redirects from https to {shown(address)}; that is not followed",
                reason="unsafe_address",
            )
        if (host, port) in self._trusted:
            return
        for number in self._numbers(host, port):
            check_number(number, address)

    def check_peer(self, address: str, number: str) -> None:
        """Make sure that the machine which answered is one that `check` would allow: names may change in between."""
        if not self._behind_proxy(origin(address)[0]) and not self.trusts(address):
            check_number(number, address)

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


def check_number(number: str, address: str) -> None:
    """Make sure that an IP address is a public one.

    Raises:
        DownloadError: it is private, local, multicast or reserved.
    """
    found = ipaddress.ip_address(number.split("%", 1)[0])
    inner = getattr(found, "ipv4_mapped", None) or getattr(found, "sixtofour", None) or found
    if not inner.is_global or inner.is_multicast:
        raise DownloadError(
            f"{shown(address)} leads to the private address {inner}; if that is your own server, give it as the base",
            reason="unsafe_address",
        )
