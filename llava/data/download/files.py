"""Download of whole files: written to `NAME.part`, resumed, verified, then renamed.

    URLs in order --RemoteFile / copy--> NAME.part --size, sha256--> NAME
                        | fails                        | wrong: once more from the start
                        +--> next URL                  +--> next URL

A killed process leaves `NAME.part`. The next run resumes it, also from another URL, since the sha256 of the whole file
is verified.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llava.data.download.client import Client
from llava.data.download.transfer import POINTER, POINTER_HINT, RemoteFile, most_telling
from llava.data.download.url_policy import is_local, local_path, redacted_url
from llava.errors import DataError, DownloadError

if TYPE_CHECKING:
    from hashlib import _Hash

logger = logging.getLogger(__name__)

BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Expected:
    """Expected size in bytes and sha256 of a file, None if unknown, and the largest accepted size."""

    size: int | None = None
    sha256: str | None = None
    max_bytes: int | None = None

    def problem(self, size: int, digest: str) -> str:
        """Return the problem of a file of this size and sha256; empty if it is as expected."""
        if self.size is not None and size != self.size:
            return f"{size} bytes, expected {self.size}"
        if self.sha256 is not None and digest != self.sha256:
            return f"sha256 {digest[:12]}..., expected {self.sha256[:12]}..."
        return ""


def digest_of(path: Path, on_bytes: Callable[[int], object] = lambda count: None) -> tuple[int, _Hash]:
    """Return size and running sha256 of a file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
            size += len(block)
            on_bytes(len(block))
    return size, digest


def file_problem(path: Path, expected: Expected) -> str:
    """Return the problem of a local file; empty if it is as expected."""
    try:
        size = path.stat().st_size
        if expected.size is not None and size != expected.size:
            return expected.problem(size, "") + _pointer_hint(path, size)
        return expected.problem(size, digest_of(path)[1].hexdigest()) if expected.sha256 else ""
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _pointer_hint(path: Path, size: int) -> str:
    if size < 1024 and path.read_bytes().startswith(POINTER):
        return POINTER_HINT
    return ""


def fetch_file(
    client: Client,
    urls: Sequence[str],
    target: Path,
    *,
    expected: Expected,
    on_bytes: Callable[[int], object] = lambda count: None,
) -> str:
    """Download one file from the first URL that has it, and return that URL.

    Args:
        client: HTTP client.
        urls: URLs of the file, in order of preference; local paths are copied.
        target: the file; it is created complete and verified, or not at all.
        expected: size and sha256.
        on_bytes: called with the number of added bytes, including those of an earlier run; negative if the file is
            restarted.

    Raises:
        DownloadError: all URLs failed; the message lists every failure, the reason is the first in `REASONS`.
        DataError: the file cannot be written.
    """
    failures: list[DownloadError] = []
    for url in urls:
        try:
            _fetch_from(client, url, target, expected, on_bytes)
            return url
        except DownloadError as error:
            logger.warning("%s: %s", target.name, error)
            failures.append(error)
        except OSError as error:
            raise DataError(f"{target} cannot be written: {error.strerror or error}") from error
        if client.stopped.is_set():
            break
    if not failures:
        raise DownloadError(f"{target.name}: no URL was given", reason="not_found")
    raise DownloadError("; ".join(map(str, failures)), reason=most_telling(error.reason for error in failures))


def _fetch_from(client: Client, url: str, target: Path, expected: Expected, on_bytes: Callable[[int], object]) -> None:
    part = target.with_name(target.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    for attempt in (1, 2):
        if expected.size is not None and part.exists() and part.stat().st_size > expected.size:
            part.unlink()  # too long to be a part of this file
        start, digest = digest_of(part, on_bytes) if part.exists() else (0, hashlib.sha256())
        size = start
        try:
            for block in _blocks(client, url, start=start, digest=digest, expected=expected, part=part):
                size += len(block)
                on_bytes(len(block))
            problem = expected.problem(size, digest.hexdigest())
        except DownloadError as error:
            if error.reason != "wrong_content":
                on_bytes(-size)  # the next URL or the next run counts the existing bytes again
                if size == 0:
                    part.unlink(missing_ok=True)
                raise
            problem = str(error)
        if not problem:
            os.replace(part, target)
            return
        on_bytes(-size)
        part.unlink(missing_ok=True)
        if start == 0 or attempt == 2:  # not caused by the part of an earlier run
            raise DownloadError(
                f"{redacted_url(url)}: {problem.removeprefix(redacted_url(url) + ': ')}", reason="wrong_content"
            )
        logger.warning("%s: the part left by an earlier run is wrong (%s); restarting", target.name, problem)


def _blocks(client: Client, url: str, *, start: int, digest: _Hash, expected: Expected, part: Path) -> Iterator[bytes]:
    """Append the file's bytes from `start` on to `part`, update `digest`, and yield them."""
    if is_local(url):
        source = _local_blocks(local_path(url), start, digest, expected)
    else:
        source = iter(
            RemoteFile(client, url, start=start, digest=digest, size=expected.size, max_bytes=expected.max_bytes)
        )
    with part.open("ab") as stream:
        for block in source:
            stream.write(block)
            yield block
        stream.flush()
        os.fsync(stream.fileno())  # the file must be on disk before it is renamed


def _local_blocks(path: Path, start: int, digest: _Hash, expected: Expected) -> Iterator[bytes]:
    problem = file_problem(path, Expected(expected.size))
    if problem:
        raise DownloadError(f"{path}: {problem}", reason="not_found" if problem == "missing" else "wrong_size")
    try:
        stream = path.open("rb")
    except OSError as error:
        raise DownloadError(f"{path}: {error.strerror}", reason="refused") from error
    with stream:
        stream.seek(start)
        while block := stream.read(BLOCK):
            digest.update(block)
            yield block
