"""Store of judges' replies: no request is sent twice, and a run can be replayed without a judge.

    judge, sampling, messages --key--> line of the store --> reply
                                            |  missing: request
                                            +------ reply, appended at once

One JSON object per line: `key`, `judge`, `reply`. The messages are not stored, only their hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.errors import DataError
from llava.utils import jsonl

Message = dict[str, str]

Messages = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class NoReply:
    """Missing reply of a judge; `reason` names the kind of failure without text of the data."""

    reason: str


JudgeReply = str | NoReply

Ask = Callable[[Sequence[Messages]], Iterator[tuple[int, JudgeReply]]]
"""Sends requests to a judge; yields the index of each request and its reply, in order of arrival."""


def reply_not_stored(requests: Sequence[Messages]) -> Iterator[tuple[int, JudgeReply]]:
    """Yield `NoReply` for every request: the `Ask` of a judge that only replays its store."""
    return ((place, NoReply("not in the store")) for place in range(len(requests)))


class Store:
    """Replies of judges in a file; an incomplete last line, left by a killed run, is dropped."""

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path)
        self.replies: dict[str, str] = {}
        if self.path is not None and self.path.exists():
            jsonl.drop_incomplete_line(self.path)
            for index, row in enumerate(jsonl.read_records(self.path)):
                key, reply = row.get("key"), row.get("reply")
                if not isinstance(key, str) or not isinstance(reply, str):
                    raise DataError(
                        f"{self.path}, row {index}: fields 'key' and 'reply' must be text; the file is not a store of "
                        f"replies, name another one with --store"
                    )
                self.replies[key] = reply

    def put(self, key: str, judge: str, reply: str) -> None:
        """Store a reply; it is on disk when this returns."""
        self.replies[key] = reply
        if self.path is not None:
            jsonl.append_record(self.path, {"key": key, "judge": judge, "reply": reply})


class Judge:
    """Judge with a store of its replies.

    Args:
        name: name of the model or deployment.
        ask: sends the requests whose replies are not stored.
        store: the replies.
        sampling: sampling parameters, part of the key of a reply.
    """

    def __init__(self, name: str, ask: Ask, store: Store, *, sampling: Mapping[str, Any] | None = None) -> None:
        self.name = name
        self.store = store
        self.sampling = dict(sampling or {})
        self.num_asked = 0
        self._ask = ask

    def key(self, messages: Messages) -> str:
        """Return the hash of everything that a reply depends on."""
        request = {"judge": self.name, "sampling": self.sampling, "messages": list(messages)}
        return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()

    def knows(self, messages: Messages) -> bool:
        """Return whether the reply to messages is in the store."""
        return self.key(messages) in self.store.replies

    def replies(self, requests: Sequence[Messages]) -> Iterator[tuple[int, JudgeReply]]:
        """Yield the index of each request and its reply, stored replies first; equal requests are sent once."""
        places: dict[str, list[int]] = {}
        for place, messages in enumerate(requests):
            key = self.key(messages)
            if key in self.store.replies:
                yield place, self.store.replies[key]
            else:
                places.setdefault(key, []).append(place)
        keys = list(places)
        for number, reply in self._ask([requests[places[key][0]] for key in keys]):
            self.num_asked += 1
            if isinstance(reply, str):
                self.store.put(keys[number], self.name, reply)
            for place in places[keys[number]]:
                yield place, reply
