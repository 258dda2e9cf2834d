"""Hosts and addresses of a connection: what its headers name, and whether it was made on this machine."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.types import Scope


def header_map(scope: Scope) -> dict[str, str]:
    """Return the headers by lower-case name; the last of equal names counts."""
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def host_name(header: str) -> str:
    """Return the host in a Host header, in lower case and without the port."""
    try:
        return (urlsplit(f"//{header}").hostname or "") if "@" not in header and "/" not in header else ""
    except ValueError:
        return ""


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
