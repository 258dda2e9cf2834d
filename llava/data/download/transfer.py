"""Remote file as a resumable stream: after a broken connection it continues at the current offset.

    read() <-- bytes <-- connection --broken--> wait --> Range: bytes=OFFSET- --206--> continue
                                                         (200, the whole file again --> the known part is compared)

The same reader serves files that are stored (starting after the bytes on disk) and archives that are only scanned. The
table of reasons names each way in which a download fails: one word for manifests, summaries and exit codes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from llava.data.download.client import TRANSIENT, Answer, Client
from llava.data.download.url_policy import redacted_url
from llava.errors import DownloadError
from llava.utils.retry import backoff_seconds

if TYPE_CHECKING:
    from hashlib import _Hash

PROGRESS = 1 << 20
"""Bytes after which the count of failures restarts, so that a long file over a bad connection can finish."""

POINTER = b"version https://git-lfs.github.com/spec/"
"""Beginning of a Git LFS pointer, which replaces a large file in a repository."""

POINTER_HINT = "; the file is a Git LFS pointer, the mirror was cloned without its large files"

_RANGE = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)")
_NUMBER = re.compile(r"[0-9]{1,18}")


class Reason(NamedTuple):
    """Meaning of one reason.

    Attributes:
        text: description.
        lasting: whether a retry of the same URLs gives the same result; a resumed run then skips it.
        expected: whether it happens to a part of any old list of URLs; it then does not change the exit status.
    """

    text: str
    lasting: bool = False
    expected: bool = False


REASONS: dict[str, Reason] = {
    "unreachable": Reason("no connection to the server"),
    "stalled": Reason("the server stopped sending, or sent too slowly"),
    "cut_off": Reason("the connection ended before the file did"),
    "unavailable": Reason("the server is overloaded or failing (429, 5xx)"),
    "refused": Reason("the server refuses the request (401, 403, other 4xx)"),
    "wrong_size": Reason("the size on the server differs from the published one"),
    "wrong_content": Reason("the content differs from the published one, or changed during the download"),
    "unsafe_address": Reason("the URL is not allowed", lasting=True),
    "too_large": Reason("larger than the limit", lasting=True),
    "not_an_archive": Reason("the file is not a .tar.gz", lasting=True),
    "corrupted": Reason("the archive is damaged", lasting=True),
    "truncated": Reason("the archive is incomplete", lasting=True),
    "bomb": Reason("the unpacked archive exceeds the limits", lasting=True),
    "unsafe_member": Reason("the figure's name in the archive is a link or device", lasting=True),
    "broken_image": Reason("the image cannot be decoded", lasting=True),
    "bad_row": Reason("the row of the list is invalid", lasting=True),
    "not_in_archive": Reason("the archive does not contain the figure", lasting=True, expected=True),
    "not_found": Reason("the server has no such file (404, 410)", lasting=True, expected=True),
}
"""Reasons by name; if several sources fail differently, the first in this order is reported: transient ones first."""


def most_telling(reasons: Iterable[str]) -> str:
    """Return the reason that comes first in `REASONS`."""
    order = list(REASONS)
    return min(reasons, key=order.index)


class RemoteFile:
    """Bytes of a remote file from `start` on.

    Args:
        client: HTTP client.
        url: an http(s) URL.
        start: offset of the first byte to return.
        digest: sha256 of the bytes before `start`; it is updated with the returned bytes.
        size: size of the whole file, if known; another size on the server is an error before any byte is read.
        max_bytes: size of the largest accepted file.

    Attributes:
        offset: offset of the next byte.
        size: size of the whole file; None while unknown.
        num_fetched: number of received bytes.
    """

    def __init__(
        self,
        client: Client,
        url: str,
        *,
        start: int = 0,
        digest: _Hash | None = None,
        size: int | None = None,
        max_bytes: int | None = None,
    ) -> None:
        self.url = url
        self.offset = start
        self.digest = digest or hashlib.sha256()
        self.size = size
        self.num_fetched = 0
        self._announced = size
        self._client = client
        self._max_bytes = max_bytes
        self._etag: str | None = None
        self._chunks: Iterator[bytes] | None = None
        self._ended = False
        self._failures = 0
        self._failed_at = start

    def read(self) -> bytes:
        """Return the next chunk; empty at the end of the file.

        Raises:
            DownloadError: the download failed, or the file changed during it.
        """
        while not self._ended:
            try:
                chunk = self._next_chunk()
            except DownloadError as error:
                self._chunks = None
                self._wait_or_give_up(error)
                continue
            if chunk:
                return self._taken(chunk)
        return b""

    def close(self) -> None:
        """Close the connection."""
        if self._chunks is not None:
            getattr(self._chunks, "close", lambda: None)()
            self._chunks = None

    def __iter__(self) -> Iterator[bytes]:
        while chunk := self.read():
            yield chunk

    def _next_chunk(self) -> bytes:
        """Return the next chunk; at the end, set `_ended` and return no bytes."""
        if self._chunks is None:
            if self.size is not None and self.offset == self.size and self.offset > 0:
                self._ended = True
                return b""
            self._chunks = self._connect()
            if self._ended:
                return b""
        chunk = next(self._chunks, b"")
        if not chunk:
            if self.size is not None and self.offset < self.size:
                raise DownloadError(
                    f"{redacted_url(self.url)}: ended at byte {self.offset} of {self.size}", reason="cut_off"
                )
            self._ended = True
        return chunk

    def _taken(self, chunk: bytes) -> bytes:
        self.offset += len(chunk)
        self.num_fetched += len(chunk)
        limit = self.size if self.size is not None else self._max_bytes
        if limit is not None and self.offset > limit:
            self.close()
            raise DownloadError(
                f"{redacted_url(self.url)}: more than {limit} bytes",
                reason="wrong_content" if self.size is not None else "too_large",
            )
        self.digest.update(chunk)
        return chunk

    def _wait_or_give_up(self, error: DownloadError) -> None:
        if error.reason not in TRANSIENT or self._client.stopped.is_set():
            raise error
        self._failures = 1 if self.offset - self._failed_at >= PROGRESS else self._failures + 1
        self._failed_at = self.offset
        if self._failures >= self._client.options.max_attempts:
            raise DownloadError(f"{error} ({self._failures} attempts)", reason=error.reason) from error
        options = self._client.options
        self._client.wait(backoff_seconds(self._failures, first=options.first_wait, most=options.max_wait))

    def _connect(self) -> Iterator[bytes]:
        answer = self._client.open(self.url, start=self.offset, etag=self._etag)
        try:
            total, first = self._extent(answer)
            self._check_size(total, answer)
        except DownloadError:
            answer.close()
            raise
        self._etag = answer.header("ETag") or self._etag
        if self._ended:
            answer.close()
            return iter(())
        chunks = self._client.chunks(answer)
        return chunks if first == self.offset else self._after_known_part(chunks)

    def _extent(self, answer: Answer) -> tuple[int | None, int]:
        """Return the size of the whole file, None if not stated, and the offset of the response's first byte."""
        if answer.status == 200:
            length = answer.header("Content-Length")
            return (int(length) if length is not None and _NUMBER.fullmatch(length) else None), 0
        stated = (answer.header("Content-Range") or "").strip()
        if answer.status == 416:
            total = stated.removeprefix("bytes */")
            self._ended = total == str(self.offset) and self.offset > 0
            if not self._ended:
                raise self._changed(f"the server has {total or 'no'} bytes, {self.offset} were received")
            return self.offset, self.offset
        match = _RANGE.fullmatch(stated)
        if match is None or int(match[1]) != self.offset:
            raise self._changed(f"requested bytes from {self.offset} on, got {stated!r}")
        return (None if match[2] == "*" else int(match[2])), self.offset

    def _check_size(self, total: int | None, answer: Answer) -> None:
        if total is None:
            return
        if self.size is not None and total != self.size:
            if self._announced is None:
                raise self._changed(f"it had {self.size} bytes and now has {total}")
            raise DownloadError(
                f"{redacted_url(self.url)}: {total} bytes, expected {self.size}{self._pointer(total, answer)}",
                reason="wrong_size",
            )
        if self._max_bytes is not None and total > self._max_bytes:
            raise DownloadError(
                f"{redacted_url(self.url)}: {total} bytes, the limit is {self._max_bytes}", reason="too_large"
            )
        self.size = total

    def _pointer(self, total: int, answer: Answer) -> str:
        """Return the hint for a Git LFS pointer; empty for other files."""
        if answer.status == 200 and total < 1024:
            body = b"".join(self._client.chunks(answer))
            if body.startswith(POINTER):
                return POINTER_HINT
        return ""

    def _after_known_part(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """Yield the bytes after the known part of a file that is sent whole again; the known part is verified."""
        left, seen = self.offset, hashlib.sha256()
        for chunk in chunks:
            self.num_fetched += min(left, len(chunk))
            seen.update(chunk[:left])
            rest, left = chunk[left:], max(0, left - len(chunk))
            if left == 0:
                if seen.digest() != self.digest.digest():
                    raise self._changed("its beginning differs from the received one")
                if rest:
                    yield rest
                break
        yield from chunks

    def _changed(self, what: str) -> DownloadError:
        return DownloadError(f"{redacted_url(self.url)} changed during the download: {what}", reason="wrong_content")
