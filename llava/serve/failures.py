"""Request errors: codes and statuses, the OpenAI protocol's error body and the old protocol's frame.

RequestError(code, message) --error_response--> {"error": {"message", "type", "param", "code"}}
                            --error_frame-->    {"text", "error_code", "detail"} and a zero byte
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from llava.errors import LlavaError
from llava.utils.terminal import visible

INVALID, DENIED, BUSY, BROKEN = "invalid_request_error", "authentication_error", "rate_limit_error", "server_error"

CODES: dict[str, tuple[int, str]] = {
    "invalid_json": (400, INVALID),
    "invalid_value": (400, INVALID),
    "unknown_parameter": (400, INVALID),
    "unsupported_parameter": (400, INVALID),
    "invalid_content": (400, INVALID),
    "bad_base64": (400, INVALID),
    "bad_image": (400, INVALID),
    "image_too_large": (400, INVALID),
    "too_many_images": (400, INVALID),
    "image_url_not_allowed": (400, INVALID),
    "context_length_exceeded": (400, INVALID),
    "invalid_api_key": (401, DENIED),
    "model_not_found": (404, INVALID),
    "not_found": (404, INVALID),
    "method_not_allowed": (405, INVALID),
    "request_too_large": (413, INVALID),
    "queue_full": (429, BUSY),
    "rate_limited": (429, BUSY),
    "internal_error": (500, BROKEN),
    "no_worker": (503, BROKEN),
    "worker_lost": (503, BROKEN),
    "draining": (503, BROKEN),
    "timeout": (504, BROKEN),
}
"""Status and `type` of each code."""

FRAME_STATUSES = {"invalid_json", "invalid_api_key", "request_too_large", "queue_full", "rate_limited", "draining"}
"""Codes whose status the old protocol keeps; its other failures have status 200."""

OLD_CODES = {"no_worker": 2, "worker_lost": 3}
"""`error_code` of the old protocol; 1 for all other codes."""

MAX_TEXT = 500
"""Largest number of characters of a message or of the name of a field; of a longer one both ends are kept."""

SERVER_FAULTS = frozenset(code for code, (status, _) in CODES.items() if status >= 500)


class RequestError(LlavaError):
    """Failed request.

    Attributes:
        code: key of `CODES`.
        param: name of the field that is wrong.
        retry_after: seconds after which a client may try again.
    """

    def __init__(self, code: str, message: str, *, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param
        self.retry_after = retry_after

    @property
    def status(self) -> int:
        """HTTP status."""
        return CODES[self.code][0]

    @property
    def headers(self) -> dict[str, str]:
        """Headers that belong to the error."""
        found = {"WWW-Authenticate": "Bearer"} if self.code == "invalid_api_key" else {}
        return found if self.retry_after is None else {**found, "Retry-After": str(self.retry_after)}

    def body(self) -> dict[str, Any]:
        """Return the body of the OpenAI protocol."""
        message, param = (text and _shown(text) for text in (str(self), self.param))
        return {"error": {"message": message, "type": CODES[self.code][1], "param": param, "code": self.code}}

    @property
    def frame_status(self) -> int:
        """HTTP status in the old protocol."""
        return self.status if self.code in FRAME_STATUSES else 200

    def frame(self) -> bytes:
        """Return the frame of the old protocol."""
        return frame({"text": _shown(str(self)), "error_code": OLD_CODES.get(self.code, 1), "detail": self.code})


def _shown(text: str) -> str:
    """Return error text for a response body; text from clients may be long or not Unicode."""
    shown = visible(text.encode(errors="replace").decode())
    return shown if len(shown) <= MAX_TEXT else f"{shown[: MAX_TEXT // 2]} ... {shown[-MAX_TEXT // 2 :]}"


def frame(message: Mapping[str, Any]) -> bytes:
    """Return a message of the old protocol: JSON and a zero byte."""
    return json.dumps(message, ensure_ascii=True).encode() + b"\0"


def internal_error(request_id: str) -> RequestError:
    """Return the error for a failure whose cause is in the log only."""
    return RequestError("internal_error", f"the request failed; the log names the cause under request {request_id}")


def busy(code: str, message: str, seconds: float = 1.0) -> RequestError:
    """Return an error after which a client may try again."""
    # Rounded up: a client that obeys must not come too early.
    return RequestError(code, message, retry_after=max(1, math.ceil(seconds)))
