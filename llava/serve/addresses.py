"""Hosts and addresses of a connection: what its headers name, and whether it was made on this machine."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from starlette.types import Scope

EMBEDDING = [ipaddress.IPv6Network(text) for text in ("::ffff:0:0/96", "::/96", "::ffff:0:0:0/96", "64:ff9b::/96")]
"""IPv6 addresses that end with an IPv4 address: mapped, compatible, translated, and those of NAT64 (RFC 6052)."""


def header_map(scope: Scope) -> dict[str, str]:
    """Return the headers by lower-case name; the last of equal names counts."""
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def host_name(header: str) -> str:
    """Return the host in a Host header, in lower case and without the port."""
    try:
        return (urlsplit(f"//{header}").hostname or "") if "@" not in header and "/" not in header else ""
    except ValueError:
        return ""


def is_address(host: str) -> bool:
    """Return whether a host is an IPv4 or IPv6 address, without brackets, and no name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine by its name or its address."""
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.split("%", 1)[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def reached_addresses(host: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """Return an address, and the IPv4 address that is reached through it if it is one of IPv6.

    Raises:
        ValueError: the host is not an address.
    """
    address = ipaddress.ip_address(host.split("%", 1)[0])
    if address.version == 4:
        return [address]
    # Python 3.11 does not count such addresses as those of the IPv4 address in them.
    is_embedded = any(address in network for network in EMBEDDING)
    inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if is_embedded else address.sixtofour
    return [address] if inner is None else [address, inner]


def comes_from_here(scope: Scope, headers: Mapping[str, str]) -> bool:
    """Return whether a request was made on this machine, and not by a proxy on behalf of others."""
    if any(name in headers for name in ("x-forwarded-for", "forwarded", "x-real-ip")):
        return False
    client = str((scope.get("client") or ("", 0))[0])
    own = str((scope.get("server") or ("", 0))[0] or "")
    return bool(client) and (is_loopback(client) or client == own)


def is_same_address(name: str, own: str) -> bool:
    """Return whether a host is the connection's own address; locally, any loopback address counts."""
    return bool(name) and (name == own or (is_loopback(name) and is_loopback(own)))
