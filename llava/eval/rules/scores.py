"""Scores per turn, conversation and case, with intervals clustered by patient or image.

RuleDialogue + answers --extract--> HeldDialogue --> accuracies, contradictions, order, flips --Draws--> estimates
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llava.eval.intervals import Draws, ItemScores
from llava.eval.rules.cases import RuleDialogue
from llava.symbolic.extract import extract
from llava.symbolic.structure import CONFLICT, NO_MATCH, RuleSet

NAN = math.nan


@dataclass(frozen=True, slots=True)
class HeldDialogue:
    """Conversation with the answers of a model.

    Attributes:
        asked: the conversation that was held.
        answers: T answers.
        values: T values as extracted.
        hedged: whether each value is stated as uncertain.
        violations: ids of the constraints that the values break.
        failed: whether the model gave not all answers.
        unfinished: number of answers that reached the limit of tokens.
    """

    asked: RuleDialogue
    answers: tuple[str, ...]
    values: tuple[str, ...]
    hedged: tuple[bool, ...]
    violations: tuple[str, ...]
    failed: bool
    unfinished: int

    @property
    def right(self) -> tuple[bool, ...]:
        """Whether each value is the true one."""
        truth = self.asked.truth
        return tuple(value == truth[id] for id, value in zip(self.asked.asked, self.values, strict=True))


def read_answers(rules: RuleSet, dialogue: RuleDialogue, row: Mapping[str, Any]) -> HeldDialogue:
    """Return a conversation with the answers of its row."""
    answers = tuple(map(str, row["answers"]))
    found = [extract(rules.node(id), text) for id, text in zip(dialogue.asked, answers, strict=True)]
    values = tuple(extraction.value for extraction in found)
    broken = rules.violations(dict(zip(dialogue.asked, values, strict=True)))
    finishes = row.get("finishes", ())
    return HeldDialogue(
        asked=dialogue,
        answers=answers,
        values=values,
        hedged=tuple(extraction.hedged for extraction in found),
        violations=tuple(broken),
        failed="error" in row,
        unfinished=sum(finish == "length" for finish in finishes),
    )


def question_scores(rules: RuleSet, held: Sequence[HeldDialogue]) -> dict[str, ItemScores]:
    """Return the scores with one value per question, [n]; NaN where a score does not apply."""
    turns = [
        (id, value, dialogue.asked.truth[id], hedged)
        for dialogue in held
        for id, value, hedged in zip(dialogue.asked.asked, dialogue.values, dialogue.hedged, strict=True)
    ]
    abstains = {node.id: node.abstain for node in rules.nodes}

    def over(score: Callable[[str, str, str, bool], float]) -> ItemScores:
        return ItemScores.of([score(*turn) for turn in turns])

    def right(id: str, value: str, true: str, hedged: bool) -> float:
        return float(value == true)

    return {
        "A_Q": over(right),
        "A_D": over(lambda id, value, true, hedged: float(value == true) if id == rules.primary.id else NAN),
        "no match": over(lambda id, value, true, hedged: float(value == NO_MATCH)),
        "conflict": over(lambda id, value, true, hedged: float(value == CONFLICT)),
        "hedged": over(lambda id, value, true, hedged: float(hedged)),
        "abstention precision": over(lambda *turn: right(*turn) if turn[1] == abstains[turn[0]] else NAN),
        "abstention recall": over(lambda *turn: right(*turn) if turn[2] == abstains[turn[0]] else NAN),
    }


def conversation_scores(held: Sequence[HeldDialogue]) -> dict[str, ItemScores]:
    """Return the scores with one value per conversation, [m]."""
    return {
        "A_C": ItemScores.of([float(all(dialogue.right)) for dialogue in held]),
        "contradictory": ItemScores.of([float(bool(dialogue.violations)) for dialogue in held]),
    }


class DialogueScores:
    """Scores of a list of conversations with shared resamples."""

    def __init__(self, rules: RuleSet, held: Sequence[HeldDialogue], *, num_resamples: int, seed: int) -> None:
        self.rules = rules
        self.held = held
        turns = [dialogue.asked.group for dialogue in held for _ in dialogue.asked.asked]
        self.turn_draws = Draws(turns, num_resamples=num_resamples, seed=seed)
        groups = [dialogue.asked.group for dialogue in held]
        self.draws = Draws(groups, num_resamples=num_resamples, seed=seed)
        self.questions = question_scores(rules, held)
        self.conversations = conversation_scores(held)

    def scores(self, other: DialogueScores | None = None, *, name: str = "blank") -> dict[str, dict[str, Any]]:
        """Return every score; with `other` (conversations of another run), also its scores and differences."""
        found: dict[str, dict[str, Any]] = {}
        for draws, mine, theirs in (
            (self.turn_draws, self.questions, None if other is None else other.questions),
            (self.draws, self.conversations, None if other is None else other.conversations),
        ):
            for key, score in mine.items():
                found[key] = {"answered": draws.estimate(score).to_json()}
                if theirs is not None:
                    found[key][name] = draws.estimate(theirs[key]).to_json()
                    found[key]["difference"] = draws.difference(score, theirs[key]).to_json()
        return {key: found[key] for key in ("A_Q", "A_C", "A_D", *(k for k in found if k[:2] != "A_"))}

    def contradictions(self) -> dict[str, Any]:
        """Return the broken constraints of a conversation, their mean number, and how often each was broken."""
        numbers = np.array([len(dialogue.violations) for dialogue in self.held], dtype=np.float64)
        stats = np.stack([numbers, np.ones_like(numbers)], axis=1)
        by_constraint = Counter(id for dialogue in self.held for id in dialogue.violations)
        return {
            "per_conversation": self.draws.estimate_sums(stats, _ratio).to_json(),
            "by_constraint": dict(by_constraint.most_common()),
        }

    def nodes(self) -> dict[str, dict[str, Any]]:
        """Return accuracy and macro-F1, in percent, of every asked node."""
        place, turns = 0, defaultdict(list)
        for dialogue in self.held:
            for id, value in zip(dialogue.asked.asked, dialogue.values, strict=True):
                turns[id].append((place, dialogue.asked.truth[id], value))
                place += 1
        found = {}
        for node in self.rules.nodes:
            if turns[node.id]:
                right = np.full(place, NAN)
                for index, true, value in turns[node.id]:
                    right[index] = true == value
                f1 = self.turn_draws.estimate_sums(_f1_stats(place, node.values, turns[node.id]), _macro_f1).to_json()
                counts = Counter(value for _, _, value in turns[node.id])
                found[node.id] = {
                    "accuracy": self.turn_draws.estimate(ItemScores.of(right)).to_json(),
                    "macro_f1": f1 | {"num_items": len(turns[node.id])},
                    "values": dict(counts.most_common()),
                }
        return found


def _ratio(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        return np.asarray(sums[..., 0] / sums[..., 1])


def _f1_stats(num_items: int, values: Sequence[str], turns: Iterable[tuple[int, str, str]]) -> NDArray[np.float64]:
    """Return hits, predictions and occurrences of every value by item, [n, 3 K]."""
    place = {value: index for index, value in enumerate(values)}
    stats = np.zeros((num_items, 3 * len(values)))
    for index, true, value in turns:
        stats[index, 3 * place[true] + 2] = 1
        if value in place:
            stats[index, 3 * place[value] + 1] = 1
            stats[index, 3 * place[value]] = value == true
    return stats


def _macro_f1(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean F1, in percent, over the values that occur; a value that is never answered counts 0."""
    counts = sums.reshape(*sums.shape[:-1], -1, 3)
    hits, said, true = counts[..., 0], counts[..., 1], counts[..., 2]
    with np.errstate(invalid="ignore"):
        f1 = np.where(true > 0, 2 * hits / (said + true), 0.0)
        return np.asarray(100 * f1.sum(axis=-1) / (true > 0).sum(axis=-1))


def order_invariance(held: Sequence[HeldDialogue], *, num_resamples: int, seed: int) -> dict[str, Any] | None:
    """Return the share of nodes with one value in all orders of a case; None with fewer than two orders.

    Only questions without a statement of a clinician count.
    """
    values: dict[tuple[str, str], list[tuple[tuple[str, ...], str]]] = defaultdict(list)
    groups: dict[tuple[str, str], str] = {}
    for dialogue, id, value, context in _turns(held):
        if context == "none":
            key = (dialogue.asked.case, id)
            values[key].append((dialogue.asked.asked, value))
            groups[key] = dialogue.asked.group
    several = {key: found for key, found in values.items() if len({order for order, _ in found}) > 1}
    if not several:
        return None
    same = [float(len({value for _, value in found}) == 1) for found in several.values()]
    draws = Draws([groups[key] for key in several], num_resamples=num_resamples, seed=seed)
    return draws.estimate(ItemScores.of(same)).to_json()


def flips(held: Sequence[HeldDialogue], *, num_resamples: int, seed: int) -> dict[str, dict[str, Any]]:
    """Return, for each kind of wrong statement, the share of correct answers that it makes wrong.

    An answer is right without statement if that of the first conversation about the case without one is.
    """
    before: dict[tuple[str, str], bool] = {}
    for dialogue, id, value, context in _turns(held):
        if context == "none" and not dialogue.asked.hint:
            before.setdefault((dialogue.asked.case, id), value == dialogue.asked.truth[id])
    turned: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for dialogue, id, value, context in _turns(held):
        if context in ("hint_wrong", "disagree") and before.get((dialogue.asked.case, id)):
            turned[context].append((dialogue.asked.group, float(value != dialogue.asked.truth[id])))
    found = {}
    for context, items in turned.items():
        draws = Draws([group for group, _ in items], num_resamples=num_resamples, seed=seed)
        found[context] = draws.estimate(ItemScores.of([flipped for _, flipped in items])).to_json()
    return found


def _turns(held: Iterable[HeldDialogue]) -> Iterable[tuple[HeldDialogue, str, str, str]]:
    """Yield conversation, node, value and context of every turn of the conversations that did not fail."""
    for dialogue in held:
        if not dialogue.failed:
            for id, value, context in zip(dialogue.asked.asked, dialogue.values, dialogue.asked.contexts, strict=True):
                yield dialogue, id, value, context
