"""Judging of cases, optionally in both orders, with retries of unreadable replies.

Case --orders--> messages --Judge--> reply --parse--> scores of reference and answer
                    ^                  |
                    +---- reminder ----+  at most `num_rounds` times
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava.compat import parse_compat
from llava.errors import ConfigError
from llava.eval.judge.cases import Case
from llava.eval.judge.prompts import ORDERS, TEMPLATES, messages_after_unreadable, messages_of
from llava.judging.parsing import PARSERS, Scores, Unreadable, parser_of
from llava.judging.store import Judge, JudgeReply, Messages
from llava.utils import log
from llava.utils.lookup import lookup

REPLY_KEYS = {"none": "result", "v1.0": "result", "v1.5": "gpt_eval"}
"""Key of the judge's reply in a row of scores, by release."""


def chosen_defects(compat: str) -> frozenset[str]:
    """Return the defects that a list of `--compat` selects.

    Raises:
        ConfigError: a name is unknown, or two of the defects contradict each other.
    """
    chosen = parse_compat(compat, "judge")
    if {"cut_question", "tag_in_question"} <= chosen:
        raise ConfigError("--compat: cut_question and tag_in_question contradict each other; exclude one of them")
    return chosen


def release_of(compat: str) -> str:
    """Return the release that a list of `--compat` names last; `none` if it names no release."""
    words = [word.strip() for word in compat.split(",")]
    return next((word for word in reversed(words) if word in REPLY_KEYS and word != "none"), "none")


logger = logging.getLogger(__name__)

NOT_ANSWERED = "the answer failed"


@dataclass(frozen=True, slots=True)
class JudgeSettings:
    """Options of judging.

    Attributes:
        template: name in `TEMPLATES`.
        swap: judge in both orders and average the scores.
        num_rounds: maximum number of replies per case and order.
        defects: published defects to reproduce.
        release: release that names the key of the reply in the rows, see `REPLY_KEYS`.
    """

    template: str = "chat-v1"
    swap: bool = False
    num_rounds: int = 3
    defects: frozenset[str] = frozenset()
    release: str = "none"

    def __post_init__(self) -> None:
        lookup(TEMPLATES, self.template, "template")
        lookup(REPLY_KEYS, self.release, "release")
        if self.num_rounds < 1:
            raise ConfigError(f"--num-rounds must be at least 1, got {self.num_rounds}")

    @property
    def orders(self) -> tuple[str, ...]:
        return ORDERS if self.swap else ORDERS[:1]


@dataclass(frozen=True, slots=True)
class Opinion:
    """Scores of a case by a judge in one order.

    Attributes:
        order: one of `ORDERS`.
        scores: scores of the reference and of the answer under test, in this sequence for every order; None without
            scores.
        reason: why there are no scores.
        reply: the judge's last reply; None without a reply.
        num_replies: number of replies received.
    """

    order: str
    scores: Scores | None = None
    reason: str = ""
    reply: str | None = None
    num_replies: int = 0


@dataclass(frozen=True, slots=True)
class Judgment:
    """Opinions about a case in all orders, with their mean scores."""

    case: Case
    opinions: tuple[Opinion, ...]

    @property
    def failure(self) -> str:
        """Reason for a missing score, else empty; with two orders, both must have scores."""
        if self.case.failed:
            return NOT_ANSWERED
        reasons = [opinion.reason for opinion in self.opinions if opinion.scores is None]
        return reasons[0] if reasons else ""

    @property
    def scores(self) -> Scores | None:
        """Mean scores over the orders, of the reference and of the answer under test."""
        if self.failure:
            return None
        known = [opinion.scores for opinion in self.opinions if opinion.scores is not None]
        return sum(pair[0] for pair in known) / len(known), sum(pair[1] for pair in known) / len(known)


class _Pending:
    """State of one case in one order until its opinion is final."""

    def __init__(self, case: Case, order: str, settings: JudgeSettings) -> None:
        self.messages: Messages = messages_of(
            case, order, template=TEMPLATES[settings.template], defects=settings.defects
        )
        self.opinion = Opinion(order, reason="not asked")

    def take(self, reply: JudgeReply, settings: JudgeSettings) -> None:
        """Store the scores of a reply; if it has none, extend the messages by the reply and a reminder."""
        order, number = self.opinion.order, self.opinion.num_replies
        if not isinstance(reply, str):
            self.opinion = Opinion(order, reason=f"no reply: {reply.reason}", num_replies=number)
            return
        read = PARSERS[parser_of(settings.defects)](reply)
        scores, reason = (None, read.reason) if isinstance(read, Unreadable) else (read, "")
        if scores is not None and order == "21":
            scores = scores[1], scores[0]
        if scores is not None and scores[0] == 0.0:  # the relative score divides by the reference's
            scores, reason = None, "reference scored 0"
        self.opinion = Opinion(order, scores, reason, reply, number + 1)
        if scores is None:
            self.messages = messages_after_unreadable(self.messages, reply, TEMPLATES[settings.template])

    @property
    def unreadable(self) -> bool:
        """Whether the judge replied without scores."""
        return self.opinion.scores is None and self.opinion.reply is not None


def review_cases(cases: Sequence[Case], judge: Judge, settings: JudgeSettings) -> list[Judgment]:
    """Return the judgments of cases, in their order.

    Every reply is stored before the next is read, so a killed run resumes without repeated requests.
    """
    pending = [[_Pending(case, order, settings) for order in settings.orders] for case in cases if not case.failed]
    left = [one for orders in pending for one in orders]
    for number in range(settings.num_rounds):
        if not left:
            break
        title = "judging" if number == 0 else f"retry {number}"
        with log.progress_bar(len(left), title=title, unit="reply") as bar:
            for place, reply in judge.replies([one.messages for one in left]):
                left[place].take(reply, settings)
                bar.update()
        left = [one for one in left if one.unreadable]
    done = iter(pending)
    judgments = [Judgment(case, () if case.failed else tuple(one.opinion for one in next(done))) for case in cases]
    failures = Counter(judgment.failure for judgment in judgments if judgment.failure)
    if failures:
        text = ", ".join(f"{reason}: {count}" for reason, count in failures.most_common())
        logger.warning("%d of %d questions have no score (%s)", failures.total(), len(cases), text)
    return judgments


def num_to_ask(cases: Sequence[Case], judge: Judge, settings: JudgeSettings) -> tuple[int, int]:
    """Return the number of first requests that are not in the store, and their length in characters."""
    requests = {
        judge.key(one.messages): one.messages
        for case in cases
        if not case.failed
        for one in (_Pending(case, order, settings) for order in settings.orders)
        if not judge.knows(one.messages)
    }
    return len(requests), sum(len(message["content"]) for one in requests.values() for message in one)


def score_row(judgment: Judgment, settings: JudgeSettings) -> dict[str, Any]:
    """Return the row of a judgment.

    It holds the question's row, the two answers, the reply under its published key, and `judgement` with everything
    that the summary needs.
    """
    case = judgment.case
    replies = {opinion.order: opinion.reply for opinion in judgment.opinions}
    key = REPLY_KEYS[settings.release]
    row: dict[str, Any] = {
        **case.row,
        "question": case.question,
        "ans1": case.reference,
        "ans2": case.answer,
        key: replies.get("12"),
    }
    if settings.swap:
        row[f"{key}_swapped"] = replies.get("21")
    row["judgement"] = {
        "scores": None if judgment.scores is None else list(judgment.scores),
        "failure": judgment.failure,
        "orders": {
            opinion.order: {
                "scores": None if opinion.scores is None else list(opinion.scores),
                "failure": opinion.reason,
                "num_replies": opinion.num_replies,
            }
            for opinion in judgment.opinions
        },
    }
    return row
