"""What judges said, kept in a file: nobody is asked twice, and a stored run can be replayed without a judge.

    judge, sampling, messages --key--> line of the store --> reply
                                            |  none: ask
                                            +------ reply, appended at once

One JSON object a line: `key`, `judge`, `reply`. The messages themselves are not stored, only their hash.
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
    """A judge did not reply; `reason` names the kind of failure, without any text of the data."""

    reason: str


Reply = str | NoReply

Ask = Callable[[Sequence[Messages]], Iterator[tuple[int, Reply]]]
"""Asks a judge many things; yields the place of a request and its reply as soon as it is there, in any order."""


def ask_nobody(requests: Sequence[Messages]) -> Iterator[tuple[int, Reply]]:
    """A judge that is not there: only what is in the store is replayed."""
    return ((place, NoReply("not in the store")) for place in range(len(requests)))


class Store:
    """The replies of judges in a file; a last line that was cut off by a kill is dropped."""

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path)
        self.replies: dict[str, str] = {}
        if self.path is not None and self.path.exists():
            jsonl.drop_torn_line(self.path)
            for index, row in enumerate(jsonl.read_records(self.path)):
                key, reply = row.get("key"), row.get("reply")
                if not isinstance(key, str) or not isinstance(reply, str):
                    raise DataError(f"{self.path}, row {index}: expected the texts 'key' and 'reply'; not a store")
                self.replies[key] = reply

    def put(self, key: str, judge: str, reply: str) -> None:
        """Keep a reply, on disk before this returns."""
        self.replies[key] = reply
        if self.path is not None:
            jsonl.append(self.path, {"key": key, "judge": judge, "reply": reply})


class Judge:
    """A judge with a memory.

    Args:
        name: which model judges (a deployment's name).
        ask: how it is asked.
        store: where its replies are kept.
        sampling: how it chooses its words; part of what replies depend on.
    """

    def __init__(self, name: str, ask: Ask, store: Store, *, sampling: Mapping[str, Any] | None = None) -> None:
        self.name = name
        self.store = store
        self.sampling = dict(sampling or {})
        self.num_asked = 0
        self._ask = ask

    def key(self, messages: Messages) -> str:
        """Return the hash of everything a reply depends on."""
        request = {"judge": self.name, "sampling": self.sampling, "messages": list(messages)}
        return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()

    def knows(self, messages: Messages) -> bool:
        """Say whether the reply to some messages is in the store."""
        return self.key(messages) in self.store.replies

    def replies(self, requests: Sequence[Messages]) -> Iterator[tuple[int, Reply]]:
        """Yield the place of each request and its reply, what is stored first; equal requests are asked once."""
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
