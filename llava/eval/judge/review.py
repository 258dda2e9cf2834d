"""Judging of cases, optionally in both orders, with retries for unreadable replies.

Case --messages_of--> messages in each order --Judge--> scores of reference and answer --> Judgment
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from llava.compat import parse_compat
from llava.errors import ConfigError
from llava.eval.judge.cases import Case
from llava.eval.judge.prompts import TEMPLATES, messages_after_unreadable, messages_of
from llava.judging.orders import ORDERS, AskSettings, MessagesOf, Opinion, ask_in_orders, requests_of
from llava.judging.parsing import PARSERS, Scores, parser_of
from llava.judging.store import Judge
from llava.utils.lookup import lookup

REPLY_KEYS = {"none": "result", "v1.0": "result", "v1.5": "gpt_eval"}
"""Key of the judge's reply in a row of scores, by release."""


CONTRADICTING = frozenset({"cut_question", "tag_in_question"})
"""Defects of different releases that exclude each other; `all` selects the first one unless it names the other."""


def chosen_defects(compat: str) -> frozenset[str]:
    """Return the defects that a list of `--compat` selects.

    Raises:
        ConfigError: a name is unknown, or two of the defects contradict each other.
    """
    chosen = parse_compat(compat, "judge")
    if not chosen >= CONTRADICTING:
        return chosen
    words = {word.strip() for word in compat.split(",")}
    named = words & CONTRADICTING
    if "all" not in words or words & {"v1.0", "v1.5"} or named == CONTRADICTING:
        raise ConfigError("--compat: cut_question and tag_in_question contradict each other; exclude one of them")
    return chosen - CONTRADICTING | (named or {"cut_question"})


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

    def comparison(self, case: Case) -> MessagesOf:
        """Return the messages of a case, by order."""
        return partial(messages_of, case, template=TEMPLATES[self.template], defects=self.defects)

    def asking(self) -> AskSettings:
        """Return the settings of asking."""
        return AskSettings(
            partial(messages_after_unreadable, template=TEMPLATES[self.template]),
            orders=self.orders,
            num_rounds=self.num_rounds,
            parse=PARSERS[parser_of(self.defects)],
            refuse=_without_ratio,
        )


def _without_ratio(scores: Scores) -> str:
    """Return why scores cannot be used: the relative score divides by the reference's."""
    return "reference scored 0" if scores[0] == 0.0 else ""


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


def review_cases(cases: Sequence[Case], judge: Judge, settings: JudgeSettings) -> list[Judgment]:
    """Return the judgments of cases, in their order.

    Every reply is stored before the next is read, so a killed run resumes without repeated requests.
    """
    asked = [case for case in cases if not case.failed]
    done = iter(ask_in_orders([settings.comparison(case) for case in asked], judge, settings.asking()))
    judgments = [Judgment(case, () if case.failed else next(done)) for case in cases]
    failures = Counter(judgment.failure for judgment in judgments if judgment.failure)
    if failures:
        text = ", ".join(f"{reason}: {count}" for reason, count in failures.most_common())
        logger.warning("%d of %d questions have no score (%s)", failures.total(), len(cases), text)
    return judgments


def num_to_ask(cases: Sequence[Case], judge: Judge, settings: JudgeSettings) -> tuple[int, int]:
    """Return the number of first requests that are not in the store, and their length in characters."""
    comparisons = [settings.comparison(case) for case in cases if not case.failed]
    requests = requests_of(comparisons, judge, settings.orders)
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
        "orders": {opinion.order: opinion.record() for opinion in judgment.opinions},
    }
    return row
