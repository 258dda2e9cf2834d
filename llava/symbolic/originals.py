"""Rewards of Dr-LLaVA as sums, in three published forms (arXiv 2405.19567)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from llava.errors import ConfigError
from llava.symbolic.settings import RewardSettings
from llava.symbolic.structure import RuleSet

RUN_FACTORS = {4: 3.0, 3: 2.0, 2: 1.5}
"""Factor by the length of the longest run of answers that a valid path has too; longer runs count as 4."""

DISEASE_RIGHT, DISEASE_WRONG, LAB, AGREES, AGREES_WEIGHT = 2.0, -1.0, 1.0, 5.0, 1.5
"""Terms of the reward for acute coronary syndromes."""


@dataclass(frozen=True, slots=True)
class ScoredAnswers:
    """Conversation with its values and credits, by turn; a void turn has the value `__no_match__`."""

    asked: Sequence[str]
    values: Sequence[str]
    true: Sequence[str]
    credit: Sequence[float]


Sum = Callable[[RuleSet, RewardSettings, ScoredAnswers], tuple[float, list[float]]]
"""Function that returns the consistency and the shares by turn."""


def released_sum(rules: RuleSet, settings: RewardSettings, scored: ScoredAnswers) -> tuple[float, list[float]]:
    """Return credits, and 1 for every turn that is compatible with the one before it."""
    masks = rules.path_masks
    turns = list(zip(scored.asked, scored.values, strict=True))
    fits = [bool(masks.get(first, 0) & masks.get(second, 0)) for first, second in pairwise(turns)]
    weight = settings.consistency.weight
    shares = [c + weight * fit for c, fit in zip(scored.credit, [False, *fits], strict=True)]
    return (sum(fits) / len(fits) if fits else 0.0), shares


def chain_mean(rules: RuleSet, settings: RewardSettings, scored: ScoredAnswers) -> tuple[float, list[float]]:
    """Return the mean credit times the share of the conversation that is true or on a valid path."""
    if list(scored.values) == list(scored.true):
        factor = 5.0
    elif rules.agreement(scored.asked, scored.values) == len(scored.asked):
        factor = 4.0
    else:
        factor = RUN_FACTORS.get(min(_longest_run(rules, scored.asked, scored.values), 4), 1.0)
    return factor / 5, [factor * c / len(scored.credit) for c in scored.credit]


def _longest_run(rules: RuleSet, asked: Sequence[str], values: Sequence[str]) -> int:
    """Return the most neighboring answers, in the order of the nodes, that one valid path has."""
    order = {node.id: index for index, node in enumerate(rules.nodes)}
    turns = sorted(zip(asked, values, strict=True), key=lambda turn: order[turn[0]])
    longest = 0
    for begin in range(len(turns)):
        left = -1
        for end in range(begin, len(turns)):
            left &= rules.path_masks.get(turns[end], 0)
            if not left:
                break
            longest = max(longest, end - begin + 1)
    return longest


def acs_sum(rules: RuleSet, settings: RewardSettings, scored: ScoredAnswers) -> tuple[float, list[float]]:
    """Return credits with terms for diagnosis, laboratory test, and agreement of first node and diagnosis.

    The diagnosis is the primary node, the test the one before it; what is positive follows from the valid paths.

    Raises:
        ConfigError: the primary node has no values stemi and nstemi with one path each.
    """
    ids = [node.id for node in rules.nodes]
    diagnosis, first = rules.primary.id, ids[0]
    names = {value.lower(): value for value in rules.primary.values}
    paths = {path[diagnosis].lower(): path for path in rules.paths}
    place = ids.index(diagnosis)
    if not {"stemi", "nstemi"} <= paths.keys() or place < 2:
        raise ConfigError("preset drllava-acs requires a primary node with values stemi and nstemi after two others")
    lab, stemi, nstemi = ids[place - 1], names["stemi"], names["nstemi"]
    answer = dict(zip(scored.asked, scored.values, strict=True))
    truth = dict(zip(scored.asked, scored.true, strict=True))
    shares = list(scored.credit)
    diseased = truth.get(diagnosis) in (stemi, nstemi) if diagnosis in truth else _positive(truth, lab, paths)
    if diagnosis in truth and diseased:
        right = answer[diagnosis] == truth[diagnosis]
        shares[list(scored.asked).index(diagnosis)] += DISEASE_RIGHT if right else DISEASE_WRONG
    if lab in answer and answer[lab] == paths["stemi"][lab]:
        shares[list(scored.asked).index(lab)] += LAB if diseased else -LAB
    agrees = (answer.get(diagnosis), answer.get(first)) in (
        (stemi, paths["stemi"][first]),
        (nstemi, paths["nstemi"][first]),
    )
    shares[-1] += AGREES_WEIGHT * AGREES * agrees
    return float(agrees), shares


def _positive(truth: dict[str, str], lab: str, paths: dict[str, dict[str, str]]) -> bool:
    """Return whether the truth is a disease, if the diagnosis is not asked: whether the test is positive."""
    return truth.get(lab) == paths["stemi"][lab]


SUMS: dict[str, Sum] = {"sum": released_sum, "chain": chain_mean, "acs": acs_sum}
"""Sum by formula."""


def limits_of_sum(settings: RewardSettings, num_turns: int) -> tuple[float, float]:
    """Return the lowest and the highest raw reward of a conversation."""
    low, high = min(settings.no_match, settings.wrong), settings.correct
    if settings.formula == "sum":
        return low * num_turns, high * num_turns + settings.consistency.weight * (num_turns - 1)
    if settings.formula == "chain":
        runs = [(1, 1.0), *((run, factor) for run, factor in RUN_FACTORS.items() if run < num_turns)]
        return low * max(1.0, *(factor * (num_turns - run) / num_turns for run, factor in runs)), 5.0 * high
    return low * num_turns - LAB, high * num_turns + DISEASE_RIGHT + LAB + AGREES_WEIGHT * AGREES
