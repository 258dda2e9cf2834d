"""Facts about an OpenAI-protocol server: its models, its errors, and how to address it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from llava.constants import SERVER_KEY_VARIABLE
from llava.errors import ConfigError
from llava.openai_transport import ApiFailure
from llava.utils.cli import is_server_url

MAX_SAID = 300
"""Characters of a message searched for the name of a refused field; later ones may quote the request."""

OWNER = "llava"
"""Value of `owned_by` in the models of our servers."""


@dataclass(frozen=True, slots=True)
class ServerFailure:
    """Failure of a request.

    Attributes:
        failure: reason, attempts and wait.
        message: message of one of our servers, which quotes nothing of the request; "" from others.
        code: code of the error.
        param: name of the field that is refused, as the server gives it.
        said: the first characters of the server's message, never shown.
    """

    failure: ApiFailure
    message: str = ""
    code: str = ""
    param: str = ""
    said: str = ""

    def __str__(self) -> str:
        return self.message if self.message and self.failure.reason in SAID_BY_SERVER else str(self.failure)


SAID_BY_SERVER = frozenset({"refused", "too_long"})
"""Reasons of failures about the request itself, for which the message of one of our servers is shown."""


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """Facts of a served model, as far as its server states them.

    Attributes:
        name: name of the model.
        is_ours: whether the server is one of this package.
        context: largest number of tokens of a prompt with its answer.
        template: name of the conversation template.
        placement: where prompts have images, `front` or `as_written`.
        weights: hash of the weight files.
        others: further numbers and texts about the model.
    """

    name: str
    is_ours: bool = False
    context: int | None = None
    template: str | None = None
    placement: str = "front"
    weights: str | None = None
    others: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def shown_name(self) -> str:
        """Model name for answer files: the last component of a path, which other servers report as the name."""
        return self.name.rstrip("/").rpartition("/")[2] if self.name.startswith(("/", ".", "~")) else self.name

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> ServerFacts:
        """Return the facts in an entry of GET /v1/models."""
        context, texts = entry.get("max_model_len"), {name: entry.get(name) for name in ("template", "weights")}
        known = ("id", "object", "created", "owned_by", "max_model_len", "template", "weights")
        return cls(
            name=str(entry["id"]),
            is_ours=entry.get("owned_by") == OWNER,
            context=context if type(context) is int and context > 0 else None,
            placement=str(entry.get("image_placement", "front")),
            others={
                name: value
                for name, value in entry.items()
                # Texts may be paths of the server, which are kept private.
                if name not in known and isinstance(value, str | int | float | bool) and "/" not in str(value)
            },
            **{name: value if isinstance(value, str) else None for name, value in texts.items()},
        )


def served_names(folder: str) -> tuple[str, ...]:
    """Return the model names under which our workers serve a checkpoint folder."""
    parts = [part for part in folder.split("/") if part not in ("", ".")]
    return (parts[-1], "_".join(parts[-2:])) if parts else ()


def error_fields(found: Any) -> tuple[str, str, str]:
    """Return code, field and message of an error body in any usual form; empty where not stated."""
    table = found if isinstance(found, dict) else {}
    error = table.get("error", table)
    if not isinstance(error, dict):
        return "", "", str(error)
    detail = error.get("detail")
    first = detail[0] if isinstance(detail, list) and detail and isinstance(detail[0], dict) else {}
    place = first.get("loc")  # a validation error of FastAPI
    param = error.get("param") or (".".join(map(str, place)) if isinstance(place, list) else "")
    message = error.get("message") or first.get("msg") or (detail if isinstance(detail, str) else "")
    return str(error.get("code") or first.get("type") or ""), str(param or ""), str(message)


def base_url(url: str) -> str:
    """Return the base URL of a server; `/v1` is added to one without a path.

    Raises:
        ConfigError: it is not such a URL.
    """
    if not is_server_url(url) or not url.isascii():
        raise ConfigError("--engine must be the URL of a server, http(s)://HOST[:PORT][/v1], without user or password")
    return url.rstrip("/") if urlsplit(url).path.strip("/") else f"{url.rstrip('/')}/v1"


def client_key() -> str:
    """Return the key of `LLAVA_API_KEY`; "" without one.

    Raises:
        ConfigError: it cannot be sent.
    """
    key = os.environ.get(SERVER_KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError(f"{SERVER_KEY_VARIABLE} contains invalid characters; the key itself is not shown")
    return key
