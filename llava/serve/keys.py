"""API keys of clients and the cluster key: owner-only files, compared in constant time.

ID SECRET [rpm=N] [max_running=N]        SECRET: the key, or sha256:HEX of it
"""

from __future__ import annotations

import hashlib
import hmac
import re
import stat
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llava.errors import ConfigError, DataError
from llava.serve.failures import RequestError, busy
from llava.utils.jsonl import read_text

CLUSTER_HEADER = "x-llava-cluster"
"""Header with the cluster key, in requests between workers and controller."""

WINDOW_SECONDS = 60.0
HASHED = re.compile(r"sha256:([0-9a-fA-F]{64})")
KEY_ID = re.compile(r"[A-Za-z0-9._@-]{1,64}")
LIMIT = re.compile(r"0{0,9}[1-9][0-9]{0,8}")
"""Value of a limit, of few digits: Python refuses to read thousands of them."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """Key of a client.

    Attributes:
        name: id for logs and limits; not secret.
        digest: SHA-256 of the key.
        rpm: largest number of requests in 60 s; None: no limit.
        max_running: largest number of sequences that run; None: no limit of its own.
    """

    name: str
    digest: bytes
    rpm: int | None = None
    max_running: int | None = None


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """Return the keys of a file; blank lines and lines that start with `#` are skipped.

    Raises:
        ConfigError: others can read the file, it is not text, or a line is wrong.
    """
    keys: list[ApiKey] = []
    for number, line in enumerate(_private_text(path, "--api-keys").splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            keys.append(_read_line(line.split(), f"--api-keys {path}, line {number}"))
    names, digests = {key.name for key in keys}, {key.digest for key in keys}
    if not keys or len(names) < len(keys) or len(digests) < len(keys):
        problem = "two lines have the same id or key" if keys else "it holds no key"
        raise ConfigError(f"--api-keys {path}: {problem}; expected lines of ID SECRET [rpm=N] [max_running=N]")
    return tuple(keys)


def _read_line(words: list[str], where: str) -> ApiKey:
    expected = "expected ID SECRET [rpm=N] [max_running=N]"
    if len(words) < 2 or not KEY_ID.fullmatch(words[0]):
        raise ConfigError(f"{where}: {expected}, the ID of letters, digits and . _ @ -")
    limits: dict[str, int] = {}
    for word in words[2:]:
        name, _, value = word.partition("=")
        if name not in ("rpm", "max_running") or name in limits or not LIMIT.fullmatch(value):
            raise ConfigError(f"{where}: {expected}, N from 1 to 999999999")
        limits[name] = int(value)
    hashed = HASHED.fullmatch(words[1])
    if hashed is None and words[1].startswith("sha256:"):
        raise ConfigError(f"{where}: sha256: must be followed by 64 hexadecimal digits")
    if not words[1].isascii():  # headers are not UTF-8, so no request could have it
        raise ConfigError(f"{where}: the key has characters other than ASCII; expected letters, digits and signs")
    digest = bytes.fromhex(hashed[1]) if hashed else _digest(words[1])
    return ApiKey(words[0], digest, **limits)


def read_cluster_key(path: Path) -> str:
    """Return the key in a file of one line.

    Raises:
        ConfigError: others can read the file, it is not text, or it does not hold one word of at least 16 characters.
    """
    words = _private_text(path, "--cluster-key").split()
    if len(words) != 1 or len(words[0]) < 16 or not words[0].isascii():
        raise ConfigError(f"--cluster-key {path}: expected one word of at least 16 characters")
    return words[0]


def _private_text(path: Path, option: str) -> str:
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise ConfigError(f"{option} {path} is not a file")
        if mode & 0o077:
            raise ConfigError(f"{option} {path} can be read or changed by other users; run chmod 600 on it")
        return read_text(path)
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be read: {error.strerror or error}") from None
    except DataError as error:
        raise ConfigError(f"{option}: {error}") from None


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def same_key(given: str, expected: str) -> bool:
    """Return whether two keys are equal, in a time that does not depend on where they differ."""
    return hmac.compare_digest(_digest(given), _digest(expected))


@dataclass(slots=True)
class KeyRing:
    """Keys that a server accepts, with the requests of the last minute by key.

    Attributes:
        path: file of the keys; None accepts everybody.
        clock: returns seconds.
    """

    path: Path | None = None
    clock: Callable[[], float] = time.monotonic
    _keys: tuple[ApiKey, ...] = ()
    _recent: dict[str, deque[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reload()

    @property
    def is_needed(self) -> bool:
        """Whether requests need a key."""
        return self.path is not None

    def reload(self) -> None:
        """Read the file again.

        Raises:
            ConfigError: the file is not valid; the keys stay as they are.
        """
        if self.path is not None:
            self._keys = read_keys(self.path)

    def find(self, headers: Mapping[str, str]) -> ApiKey | None:
        """Return the key of a request; None where no key is needed.

        Raises:
            RequestError: it has no valid key.
        """
        if not self.is_needed:
            return None
        scheme, _, token = headers.get("authorization", "").partition(" ")
        digest = _digest(token.strip())
        found = None
        for key in self._keys:  # compare with all keys, so that timing reveals nothing
            if hmac.compare_digest(key.digest, digest):
                found = key
        if found is None or scheme.lower() != "bearer":
            raise RequestError("invalid_api_key", "a valid key is needed: Authorization: Bearer KEY")
        return found

    def count(self, key: ApiKey | None) -> None:
        """Count a request for an answer.

        Raises:
            RequestError: the key had its number of requests in the last minute.
        """
        if key is None or key.rpm is None:
            return
        recent, now = self._recent.setdefault(key.name, deque()), self.clock()
        while recent and recent[0] <= now - WINDOW_SECONDS:
            recent.popleft()
        if len(recent) >= key.rpm:
            wait = recent[0] + WINDOW_SECONDS - now
            raise busy("rate_limited", f"key {key.name} had {key.rpm} requests in the last 60 s", wait)
        recent.append(now)
