"""Chat endpoint as a judge: the requests of `store.Judge` whose replies are not stored yet.

messages --Requests--> Reply | ApiFailure --> text | NoReply, in order of arrival
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llava.judging.store import Ask, JudgeReply, Messages, NoReply
from llava.openai_api import ApiError, ApiFailure, ApiSettings, ChatClient, Requests
from llava.openai_transport import Reply as ApiReply

_LAST_WORD = re.compile(r"\S+$")


def _whole_words(reply: ApiReply) -> str:
    """Return the text of a reply, without its last word if it was truncated."""
    # A truncated `10` may read as `1`.
    return reply.text if reply.finish_reason != "length" else _LAST_WORD.sub("", reply.text)


def ask_endpoint(
    settings: ApiSettings, *, sampling: Mapping[str, Any], max_concurrency: int = 8, max_retries: int = 5
) -> Ask:
    """Return a function that sends requests to an endpoint.

    A reply truncated at the token limit is used without its last word, since its scores are on the first line. The
    function raises `ApiError` for a failure that every request would share (a wrong key, an unknown model) and returns
    all other failures as values.

    Args:
        settings: settings of the endpoint.
        sampling: `temperature` and `max_tokens` of the judge.
        max_concurrency: requests in flight at once.
        max_retries: retries after a transient failure.
    """
    client = ChatClient(settings, max_concurrency=max_concurrency, max_retries=max_retries)

    def ask(requests: Sequence[Messages]) -> Iterator[tuple[int, JudgeReply]]:
        if not requests:
            return
        next_one = 0
        with Requests(client, **sampling, accept_cut_short=True) as running:
            while next_one < len(requests) or running.num_running:
                while next_one < len(requests) and running.num_running < max_concurrency:
                    running.submit(next_one, requests[next_one])
                    next_one += 1
                place, outcome = running.next()
                if not isinstance(outcome, ApiFailure):
                    yield place, _whole_words(outcome)
                elif outcome.fatal:
                    raise ApiError(outcome)
                else:
                    yield place, NoReply(f"{outcome.reason}, {outcome.detail}" if outcome.detail else outcome.reason)

    return ask
