"""Language model as judge of two answers, behind an endpoint or replayed from its stored replies.

usable answers --pairs of places--> comparisons --both orders--> scores --mean--> score of each answer
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any

from llava.errors import DataError
from llava.instruct.preferences.prompts import PairPrompt
from llava.instruct.preferences.rows import Answered
from llava.instruct.preferences.verdicts import mean_scores
from llava.judging.orders import NOT_ASKED, AskSettings, MessagesOf, Opinion, ask_in_orders
from llava.judging.store import Judge, Messages


class PairJudge:
    """Judge of answers in comparisons of two.

    Args:
        judge: the language model, with the store of its replies.
        prompt: the texts that instruct it.
        how: orders, rounds and parser.
    """

    def __init__(self, judge: Judge, prompt: PairPrompt, how: AskSettings) -> None:
        self.judge = judge
        self.prompt = prompt
        self.how = how

    def __call__(self, batch: Sequence[tuple[Answered, Sequence[int]]]) -> list[dict[str, Any] | None]:
        """Return `comparisons` and `scores` of each question, or a `failure`; None where a limit was reached.

        Args:
            batch: questions, each with the places of its usable answers.
        """
        failures: dict[int, str] = {}
        comparisons: list[tuple[int, tuple[int, int]]] = []
        asked: list[MessagesOf] = []
        for number, (one, usable) in enumerate(batch):
            try:
                made = {places: self._messages(one, places) for places in combinations(usable, 2)}
            except DataError as error:
                failures[number] = str(error)
                continue
            comparisons += [(number, places) for places in made]
            asked += made.values()
        opinions = ask_in_orders(asked, self.judge, self.how, show_progress=False)
        found: dict[int, list[dict[str, Any]]] = {}
        unasked: set[int] = set()
        for (number, places), given in zip(comparisons, opinions, strict=True):
            found.setdefault(number, []).append(_comparison(places, given))
            if any(one.reason == NOT_ASKED for one in given):
                unasked.add(number)
        return [
            None if number in unasked else _judged(one, found.get(number, []), failures.get(number, ""))
            for number, (one, _) in enumerate(batch)
        ]

    def _messages(self, one: Answered, places: tuple[int, int]) -> MessagesOf:
        """Return the messages of a comparison, which are made once for each order."""
        answers = (one.answers[places[0]], one.answers[places[1]])
        made: Mapping[str, Messages] = {
            order: self.prompt.messages(one.asked.text, answers, one.asked.images, order) for order in self.how.orders
        }
        return partial(_of_order, made)


def _of_order(made: Mapping[str, Messages], order: str) -> Messages:
    return made[order]


def _comparison(places: tuple[int, int], opinions: Sequence[Opinion]) -> dict[str, Any]:
    orders = {}
    for one in opinions:
        wasted = {"wasted": list(one.wasted)} if any(one.wasted) else {}
        orders[one.order] = {**one.record(), "reply": one.reply, **wasted}
    return {"answers": list(places), "orders": orders}


def _judged(one: Answered, comparisons: list[dict[str, Any]], failure: str) -> dict[str, Any]:
    if failure:
        return {"failure": failure}
    return {"scores": mean_scores(len(one.answers), comparisons), "comparisons": comparisons}


def wasted_tokens(rows: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Return the tokens of prompts and answers that judged rows have spent without a reply."""
    found = [
        order["wasted"]
        for row in rows
        for comparison in row.get("judgment", {}).get("comparisons", ())
        for order in comparison["orders"].values()
        if "wasted" in order
    ]
    return sum(one[0] for one in found), sum(one[1] for one in found)
