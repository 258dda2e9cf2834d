"""Store of judges' replies: no request is sent twice, and a run can be replayed without a judge.

    judge, sampling, messages --key--> line of the store --> reply
                                            |  missing: request
                                            +------ reply, appended at once

One JSON object per line: `key`, `judge`, `reply`; with a budget `prompt_tokens` and `answer_tokens`. The messages are
not stored, only their hash.
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
from llava.utils.json_rows import read_records

Message = dict[str, Any]

Messages = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class NoReply:
    """Missing reply of a judge.

    Attributes:
        reason: kind of failure, without text of the data.
        tokens: tokens of prompts and answers that were spent on it.
    """

    reason: str
    tokens: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class CountedReply:
    """Reply of a judge, with the tokens of prompts and answers that were spent on it."""

    text: str
    tokens: tuple[int, int]


JudgeReply = str | NoReply

Ask = Callable[[Sequence[Messages]], Iterator[tuple[int, JudgeReply | CountedReply]]]
"""Sends requests to a judge; yields the index of each request and its reply, in order of arrival.

Requests that a limit of tokens or cost forbids are left out.
"""


def reply_not_stored(requests: Sequence[Messages]) -> Iterator[tuple[int, JudgeReply]]:
    """Yield `NoReply` for every request: the `Ask` of a judge that only replays its store."""
    return ((place, NoReply("not in the store")) for place in range(len(requests)))


class Store:
    """Replies of judges in a file; an incomplete last line, left by a killed run, is dropped."""

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path)
        self.replies: dict[str, str] = {}
        self.judges: set[str] = set()
        self.spent = (0, 0)
        if self.path is not None and self.path.exists():
            jsonl.drop_incomplete_line(self.path)
            for index, row in enumerate(read_records(self.path)):
                key, reply = row.get("key"), row.get("reply")
                if not isinstance(key, str) or not isinstance(reply, str):
                    raise DataError(
                        f"{self.path}, row {index}: fields 'key' and 'reply' must be text; the file is not a store of "
                        f"replies, name another one with --store"
                    )
                self.replies[key] = reply
                self.judges.add(str(row.get("judge")))
                self._add(row.get("prompt_tokens"), row.get("answer_tokens"))

    def _add(self, *tokens: Any) -> None:
        prompt, answer = (number if isinstance(number, int) else 0 for number in tokens)
        self.spent = (self.spent[0] + prompt, self.spent[1] + answer)

    def put(self, key: str, judge: str, reply: str, *, tokens: tuple[int, int] | None = None) -> None:
        """Store a reply, with the tokens spent on it if they are counted; it is on disk when this returns."""
        self.replies[key] = reply
        row: dict[str, Any] = {"key": key, "judge": judge, "reply": reply}
        if tokens is not None:
            self._add(*tokens)
            row |= {"prompt_tokens": tokens[0], "answer_tokens": tokens[1]}
        if self.path is not None:
            jsonl.append_record(self.path, row)

    def settle(self) -> None:
        """Sort the lines of the file by key, so that it does not depend on the order of arrival."""
        if self.path is not None and self.path.exists():
            rows = sorted(read_records(self.path), key=lambda row: str(row["key"]))
            jsonl.write_records(self.path, rows)


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
            text = reply.text if isinstance(reply, CountedReply) else reply
            if isinstance(text, str):
                counted = reply.tokens if isinstance(reply, CountedReply) else None
                self.store.put(keys[number], self.name, text, tokens=counted)
            for place in places[keys[number]]:
                yield place, text
