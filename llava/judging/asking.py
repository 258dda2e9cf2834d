"""Chat endpoint as a judge: the requests of `store.Judge` whose replies are not stored yet.

messages --Requests--> Reply | ApiFailure --> text | NoReply, in order of arrival
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llava.judging.store import Ask, CountedReply, JudgeReply, Messages, NoReply
from llava.openai_api import ApiError, ApiFailure, ApiSettings, ChatClient, Requests
from llava.openai_transport import Reply as ApiReply
from llava.utils.budget import Budget, estimate_tokens

_LAST_WORD = re.compile(r"\S+$")


def _whole_words(reply: ApiReply) -> str:
    """Return the text of a reply, without its last word if it was truncated."""
    # A truncated `10` may read as `1`.
    return reply.text if reply.finish_reason != "length" else _LAST_WORD.sub("", reply.text)


def ask_endpoint(
    settings: ApiSettings,
    *,
    sampling: Mapping[str, Any],
    max_concurrency: int = 8,
    max_retries: int = 5,
    budget: Budget | None = None,
) -> Ask:
    """Return a function that sends requests to an endpoint.

    A reply truncated at the token limit is used without its last word, since its scores are on the first line. The
    function raises `ApiError` for a failure that every request would share (a wrong key, an unknown model) and returns
    all other failures as values.

    Args:
        settings: settings of the endpoint.
        sampling: `temperature` and `max_tokens` of the judge, and other parameters as `sampling`.
        max_concurrency: requests in flight at once.
        max_retries: retries after a transient failure.
        budget: limits of tokens and cost; replies are then counted, and what a limit forbids is not sent.
    """
    client = ChatClient(settings, max_concurrency=max_concurrency, max_retries=max_retries)

    def ask(requests: Sequence[Messages]) -> Iterator[tuple[int, JudgeReply | CountedReply]]:
        if not requests:
            return
        left = deque(range(len(requests)))
        with Requests(client, **sampling, accept_cut_short=True) as running:
            while True:
                while left and running.num_running < max_concurrency:
                    messages = requests[left[0]]
                    if budget is not None and not budget.reserve(str(left[0]), estimate_tokens(messages)):
                        break
                    running.submit(left.popleft(), messages)
                if not running.num_running:
                    return
                place, outcome = running.next()
                if isinstance(outcome, ApiFailure):
                    yield place, _no_reply(outcome, budget, str(place))
                else:
                    yield place, _counted(outcome, budget, str(place))

    return ask


def _no_reply(failure: ApiFailure, budget: Budget | None, key: str) -> NoReply:
    """Return the missing reply of a failed request.

    Raises:
        ApiError: every request would fail for the same reason.
    """
    tokens = (failure.num_prompt_tokens, failure.num_answer_tokens)
    if budget is not None:
        budget.release(key, *tokens)
    if failure.fatal:
        raise ApiError(failure)
    return NoReply(f"{failure.reason}, {failure.detail}" if failure.detail else failure.reason, tokens)


def _counted(reply: ApiReply, budget: Budget | None, key: str) -> str | CountedReply:
    """Return the text of a reply, with its tokens if there is a budget."""
    if budget is None:
        return _whole_words(reply)
    wasted = reply.wasted_tokens
    budget.spend(*wasted)
    spent = budget.settle(key, reply.num_prompt_tokens, reply.num_answer_tokens, answer=reply.text)
    return CountedReply(_whole_words(reply), (spent[0] + wasted[0], spent[1] + wasted[1]))
