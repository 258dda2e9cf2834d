"""Request fields that a server refuses, learned from its errors, and their replacements.

400 for a request with `top_k` --learn--> the request without it, and one line in the log; later ones never send it
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from llava.generation.remote_facts import ServerFailure

logger = logging.getLogger(__name__)

INSTEAD: dict[str, str] = {
    "n": "each answer is asked for alone, with a seed of its own",
    "return_token_ids": "its answers have no token ids",
    "top_k": "tokens are sampled without it, as by --top-k 0",
    "repetition_penalty": "tokens are chosen without it",
    "seed": "sampled answers cannot be repeated",
    "stop": "answers are cut at these strings here",
    "max_tokens": "the limit is sent as max_completion_tokens",
}
"""Optional request fields, and the replacement when a server refuses one."""

STATED_ONLY = frozenset({"max_tokens"})
"""Fields whose names also occur in other messages; only an error that states one as its field counts."""


class ServerHabits:
    """Refused fields of one server; any thread may use it.

    Attributes:
        notes: what was done instead, by field.
    """

    def __init__(self, url: str) -> None:
        """Create an empty record for the server at `url`."""
        self.url = url
        self.notes: dict[str, str] = {}

    def refuses(self, name: str) -> bool:
        """Return whether the server refuses a field."""
        return name in self.notes

    def fitted(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of a request without those that the server refuses."""
        kept = {name: value for name, value in fields.items() if name not in self.notes}
        if self.refuses("max_tokens") and "max_tokens" in fields:
            kept["max_completion_tokens"] = fields["max_tokens"]
        return kept

    def learn(self, found: ServerFailure, body: Mapping[str, Any]) -> bool:
        """Record the field that a failure is about; return whether a retry makes sense."""
        if found.failure.reason != "refused" or found.code == "invalid_value":
            return False
        sent = [name for name in INSTEAD if name in body]
        name = _named(found, sent)
        if name is None:
            return False
        self.note(name)
        return True

    def note(self, name: str) -> None:
        """Record that the server does not support a field, and log it once."""
        if name not in self.notes:
            self.notes[name] = INSTEAD[name]
            logger.warning("%s does not serve %s; %s", self.url, name, INSTEAD[name])


def _named(found: ServerFailure, sent: list[str]) -> str | None:
    """Return the field of a request that an error names."""
    last = found.param.rpartition(".")[2]
    if found.param:
        return last if last in sent else None
    for name in sorted(set(sent) - STATED_ONLY, key=len, reverse=True):
        # A one-letter name also occurs as a word in messages, so it only counts in quotes.
        pattern = rf"(?<!\w){name}(?!\w)" if len(name) > 1 else rf"[\"'`]{name}[\"'`]"
        if re.search(pattern, found.said):
            return name
    return None
