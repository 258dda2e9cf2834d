"""Streamed responses that end as soon as their client leaves, and report failures in the stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from llava.serve.failures import RequestError, internal_error
from llava.serve.gate import LEFT, RequestRecord, log_failure, record_of, unless_left

STALL_SECONDS = 600.0
"""Time in which a client reads a piece, where a controller does not know the deadline of its worker."""

LAST_SECONDS = 1.0
"""Time for the last piece after the deadline, which says that it has passed."""


class PieceStream(Response):
    """Response whose body comes in pieces."""

    def __init__(
        self,
        first: bytes,
        pieces: AsyncIterator[bytes],
        *,
        media_type: str,
        on_error: Callable[[RequestError], bytes],
        close: Callable[[], Awaitable[None]],
    ) -> None:
        """Send pieces.

        Args:
            first: first piece, already made.
            pieces: the others.
            media_type: content type.
            on_error: returns the last piece for an error.
            close: awaited at the end, also when the client leaves.
        """
        super().__init__(media_type=media_type, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.first = first
        self.pieces = pieces
        self.on_error = on_error
        self.close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        request = Request(scope, receive)
        record = record_of(request)
        try:
            await unless_left(request, self._send(_bounded(send, record), record))
        except TimeoutError:
            record.code = "timeout"
        except (ClientDisconnect, OSError):
            record.code = LEFT
        finally:
            await self.close()

    async def _send(self, send: Send, record: RequestRecord) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.first, "more_body": True})
        try:
            async for piece in self.pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except RequestError as error:
            await self._send_error(send, error, record)
        except OSError:
            raise
        except Exception as error:
            log_failure(error, record.request_id)
            await self._send_error(send, internal_error(record.request_id), record)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_error(self, send: Send, error: RequestError, record: RequestRecord) -> None:
        record.code = error.code
        await send({"type": "http.response.body", "body": self.on_error(error), "more_body": True})


def _bounded(send: Send, record: RequestRecord) -> Send:
    """Return `send` with a limit of time, so that the request of a client that does not read ends.

    The connection closes when the client has read what was sent, or is gone.
    """

    async def bounded(message: Message) -> None:
        left = STALL_SECONDS if record.deadline is None else record.deadline - time.monotonic()
        async with asyncio.timeout(max(left, LAST_SECONDS)):
            await send(message)

    return bounded


async def with_first(
    request: Request, pieces: AsyncGenerator[bytes, None], *, media_type: str, on_error: Callable[[RequestError], bytes]
) -> PieceStream:
    """Return a stream after its first piece has been made, so that earlier errors still have a status.

    Raises:
        RequestError: the request failed before it.
    """
    try:
        first = await unless_left(request, _next(pieces))
    except BaseException:
        await pieces.aclose()
        raise
    return PieceStream(first, pieces, media_type=media_type, on_error=on_error, close=pieces.aclose)


async def _next(pieces: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(pieces)
