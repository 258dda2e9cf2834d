"""Judging of two answers in one order or both, with retries of unreadable replies.

comparison --order--> messages --Judge--> reply --parse--> scores of the first and the second answer
                         ^                  |
                         +---- reminder ----+  at most `num_rounds` times
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from llava.errors import ConfigError
from llava.judging.parsing import Scores, Unreadable, parse_strict
from llava.judging.store import Judge, JudgeReply, Messages
from llava.utils import log

ORDERS = ("12", "21")
"""Order of the two answers: the first one first, or the second one first."""

NOT_ASKED = "not asked"
"""Reason of an opinion whose request was not sent, for example since a limit of cost forbids it."""

MessagesOf = Callable[[str], Messages]
"""Messages of a comparison in an order of `ORDERS`."""


def accept(scores: Scores) -> str:
    """Return an empty reason, so that all scores are accepted."""
    return ""


@dataclass(frozen=True, slots=True)
class AskSettings:
    """How a judge is asked.

    Attributes:
        remind: returns the messages after a reply without readable scores.
        orders: orders in which every comparison is judged.
        num_rounds: maximum number of replies per comparison and order.
        parse: reads the scores of a reply.
        refuse: returns why scores cannot be used, else empty.
    """

    remind: Callable[[Messages, str], Messages]
    orders: tuple[str, ...] = ORDERS
    num_rounds: int = 3
    parse: Callable[[str], Scores | Unreadable] = parse_strict
    refuse: Callable[[Scores], str] = accept

    def __post_init__(self) -> None:
        if self.num_rounds < 1:
            raise ConfigError(f"--num-rounds must be at least 1, got {self.num_rounds}")


@dataclass(frozen=True, slots=True)
class Opinion:
    """Scores of a comparison by a judge in one order.

    Attributes:
        order: one of `ORDERS`.
        scores: scores of the first and of the second answer, in this sequence for every order; None without scores.
        reason: why there are no scores.
        reply: the judge's last reply; None without a reply.
        num_replies: number of replies received.
        wasted: tokens of prompts and answers spent without a reply.
    """

    order: str
    scores: Scores | None = None
    reason: str = ""
    reply: str | None = None
    num_replies: int = 0
    wasted: tuple[int, int] = (0, 0)

    def record(self) -> dict[str, Any]:
        """Return what a row keeps of the opinion, without the reply."""
        return {
            "scores": None if self.scores is None else list(self.scores),
            "failure": self.reason,
            "num_replies": self.num_replies,
        }


class _Pending:
    """State of one comparison in one order until its opinion is final."""

    def __init__(self, messages_of: MessagesOf, order: str) -> None:
        self.messages = messages_of(order)
        self.opinion = Opinion(order, reason=NOT_ASKED)

    def take(self, reply: JudgeReply, how: AskSettings) -> None:
        """Store the scores of a reply; if it has none, extend the messages by the reply and a reminder."""
        order, number = self.opinion.order, self.opinion.num_replies
        if not isinstance(reply, str):
            self.opinion = Opinion(order, reason=f"no reply: {reply.reason}", num_replies=number, wasted=reply.tokens)
            return
        read = how.parse(reply)
        scores, reason = (None, read.reason) if isinstance(read, Unreadable) else (read, "")
        if scores is not None and order == ORDERS[1]:
            scores = scores[1], scores[0]
        if scores is not None and (refused := how.refuse(scores)):
            scores, reason = None, refused
        self.opinion = Opinion(order, scores, reason, reply, number + 1)
        if scores is None:
            self.messages = how.remind(self.messages, reply)

    @property
    def unreadable(self) -> bool:
        """Whether the judge replied without scores."""
        return self.opinion.scores is None and self.opinion.reply is not None


def ask_in_orders(
    comparisons: Sequence[MessagesOf], judge: Judge, how: AskSettings, *, show_progress: bool = True
) -> list[tuple[Opinion, ...]]:
    """Return the opinions about each comparison, one for each order.

    Every reply is stored before the next is read, so a killed run resumes without repeated requests.

    Args:
        comparisons: messages of each comparison.
        judge: the judge.
        how: orders, rounds and parser.
        show_progress: show a progress bar for each round.
    """
    pending = [[_Pending(messages_of, order) for order in how.orders] for messages_of in comparisons]
    left = [one for orders in pending for one in orders]
    for number in range(how.num_rounds):
        if not left:
            break
        title = "judging" if number == 0 else f"retry {number}"
        with log.progress_bar(len(left), title=title, unit="reply") if show_progress else nullcontext() as bar:
            for place, reply in judge.replies([one.messages for one in left]):
                left[place].take(reply, how)
                if bar is not None:
                    bar.update()
        left = [one for one in left if one.unreadable]
    return [tuple(one.opinion for one in orders) for orders in pending]


def requests_of(comparisons: Sequence[MessagesOf], judge: Judge, orders: Sequence[str]) -> dict[str, Messages]:
    """Return the first requests that are not in the store, by key."""
    found: dict[str, Messages] = {}
    for messages_of in comparisons:
        for order in orders:
            messages = messages_of(order)
            if not judge.knows(messages):
                found[judge.key(messages)] = messages
    return found
