"""Free ports of this machine for tests."""

from __future__ import annotations

import contextlib
import secrets
import socket

FIRST, LAST = 15_000, 32_000
"""Ports below those that systems give to connections, so that none takes a port before its server has it."""


def free_ports(number: int) -> list[int]:
    """Return different ports that nothing listens on; other processes draw others, whatever seed their test has."""
    ports: list[int] = []
    while len(ports) < number:
        port = FIRST + secrets.randbelow(LAST - FIRST)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports += [port] if port not in ports else []
    return ports
