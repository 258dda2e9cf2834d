"""Fields that a server refuses, learned once from its errors, and what is done instead.

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
"""Fields that a request can do without, and what is done instead."""

STATED_ONLY = frozenset({"max_tokens"})
"""Fields that messages also name for other reasons; the error must state them as its field."""


class ServerHabits:
    """What is known of one server; any thread may use it.

    Attributes:
        notes: what was done instead, by field.
    """

    def __init__(self, url: str) -> None:
        """Know nothing of the server at `url`."""
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
        """Note the field that a failure is about; return whether the request is worth another attempt."""
        if found.failure.reason != "refused" or found.code == "invalid_value":
            return False
        sent = [name for name in INSTEAD if name in body]
        name = _named(found, sent)
        if name is None:
            return False
        self.note(name)
        return True

    def note(self, name: str) -> None:
        """Note that the server does not serve a field; the log says so once."""
        if name not in self.notes:
            self.notes[name] = INSTEAD[name]
            logger.warning("%s does not serve %s; %s", self.url, name, INSTEAD[name])


def _named(found: ServerFailure, sent: list[str]) -> str | None:
    """Return the field of a request that an error names."""
    last = found.param.rpartition(".")[2]
    if found.param:
        return last if last in sent else None
    for name in sorted(set(sent) - STATED_ONLY, key=len, reverse=True):
        # A name of one letter is a word of many messages, so it counts in quotes only.
        pattern = rf"(?<!\w){name}(?!\w)" if len(name) > 1 else rf"[\"'`]{name}[\"'`]"
        if re.search(pattern, found.said):
            return name
    return None
