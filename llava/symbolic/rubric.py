"""Symbolic reward of one conversation: correctness, consistency, length and form, turn by turn.

    answers --extract--> values --truth--> c, --valid paths--> a, --texts--> l, f --> raw --> total in [-1, 1]

T turns; a void turn counts as one that names no value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, pairwise
from statistics import fmean

from llava.errors import ConfigError, DataError
from llava.symbolic.extract import extract
from llava.symbolic.originals import SUMS, ScoredAnswers, limits_of_sum
from llava.symbolic.settings import PRESETS, RewardSettings
from llava.symbolic.structure import NO_MATCH, SENTINELS, RuleNode, RuleSet
from llava.utils.lookup import lookup

Priors = Mapping[str, Mapping[str, float]]
"""Counts of the true values in a training table, by node and value."""

LEAST_BALANCE, MOST_BALANCE = 0.5, 4.0
"""Limits of the factor by which a rare or frequent true value is balanced."""


@dataclass(frozen=True, slots=True)
class Reward:
    """Reward of one conversation.

    Attributes:
        total: reward scaled by the limits of its settings, -1 to 1 without balance.
        raw: reward before it is scaled.
        turns: share of each turn; they add up to `raw`.
        values: extracted values, by turn.
        hedged: whether a value is stated as uncertain, by turn.
        violations: ids of the constraints that the values break.
        components: by name, a number per turn (`correctness`, `length`, `format`, `void`) or of the conversation
            (`consistency`, `bonus`).
        unit: what 1 of `total` is in `raw` and `turns`.
    """

    total: float
    raw: float
    turns: tuple[float, ...]
    values: tuple[str, ...]
    hedged: tuple[bool, ...]
    violations: tuple[str, ...]
    components: dict[str, float | tuple[float, ...]]
    unit: float = 1.0


def reward(
    rules: RuleSet,
    *,
    truth: Mapping[str, str],
    asked: Sequence[str],
    answers: Sequence[str],
    references: Sequence[str] | None = None,
    finished: Sequence[bool] | None = None,
    preset: str | None = None,
    priors: Priors | None = None,
) -> Reward:
    """Return the reward of one conversation.

    >>> from llava.symbolic.rules import load_rules
    >>> rules = load_rules("bone-marrow-aspirate")
    >>> truth = {"proliferation": "blast"}
    >>> right, wrong = (
    ...     reward(rules, truth=truth, asked=["proliferation"], answers=[answer])
    ...     for answer in ("Blasts proliferate.", "No proliferation is seen.")
    ... )
    >>> right.total > wrong.total
    True

    Args:
        rules: rule set.
        truth: true value of every asked node.
        asked: T nodes in the asked order.
        answers: T answers.
        references: T reference answers, for the length; None counts no length.
        finished: whether each answer has an end token; None for all.
        preset: name of the settings; None for those of the rule file.
        priors: counts of the true values, which switch balance on.

    Raises:
        ConfigError: the preset is unknown, or does not fit the rule set.
        DataError: lengths differ, or a node or value is unknown.
    """
    settings = rules.reward if preset is None else lookup(PRESETS, preset, "preset")
    references = answers if references is None else references
    finished = [True] * len(answers) if finished is None else finished
    nodes = _nodes(rules, truth, asked)
    _check_turns(len(asked), answers=answers, references=references, finished=finished)
    found = [extract(node, text) for node, text in zip(nodes, answers, strict=True)]
    values = [extraction.value for extraction in found]
    true = [truth[node] for node in asked]
    lengths = [_length(settings, text, other) for text, other in zip(answers, references, strict=True)]
    void = [_is_void(settings, *turn) for turn in zip(answers, finished, lengths, strict=True)]
    counted = [NO_MATCH if gone else value for gone, value in zip(void, values, strict=True)]
    plain = [_credit(settings, node, value, y) for node, value, y in zip(nodes, counted, true, strict=True)]
    balanced = [
        c * _balance(priors, node.id, y) if settings.balance and priors and c > 0 else c
        for node, c, y in zip(nodes, plain, true, strict=True)
    ]
    forms = [_form(settings, text, done) for text, done in zip(answers, finished, strict=True)]
    penalties = [length for length, _ in lengths]
    scored = ScoredAnswers(asked, counted, true, plain)
    turns = [balanced, penalties, forms]
    consistency, bonus, shares, (low, high) = _shares(rules, settings, scored, turns)
    raw = sum(shares)
    return Reward(
        total=2 * (raw - low) / (high - low) - 1,
        unit=(high - low) / 2,
        raw=raw,
        turns=tuple(shares),
        values=tuple(values),
        hedged=tuple(extraction.hedged for extraction in found),
        violations=_violations(rules, tuple(asked), tuple(values)),
        components={
            "correctness": tuple(balanced),
            "length": tuple(penalties),
            "format": tuple(forms),
            "void": tuple(map(float, void)),
            "consistency": consistency,
            "bonus": bonus,
        },
    )


def _is_void(settings: RewardSettings, text: str, done: bool, length: tuple[float, float]) -> bool:
    """Return whether an answer counts as no match: unfinished, empty, or at the cap of the length penalty."""
    penalty, cap = length
    return settings.void and (not done or not text.strip() or (cap > 0 and penalty >= cap))


def _shares(
    rules: RuleSet, settings: RewardSettings, scored: ScoredAnswers, turns: Sequence[Sequence[float]]
) -> tuple[float, float, list[float], tuple[float, float]]:
    """Return consistency, bonus, each turn's share of the raw reward, and the raw reward's bounds.

    Args:
        rules: rule set.
        settings: the formula and its weights.
        scored: the answers and their plain credits.
        turns: balanced credits, length penalties and format penalties, [T] each.
    """
    if settings.formula == "mean":
        consistency, bonus = _bonus(rules, settings, scored, turns[0])
        shares = [(c - p + f) / len(turns[0]) for c, p, f in zip(*turns, strict=True)]
        shares[-1] += bonus
        return consistency, bonus, shares, _limits(settings)
    consistency, shares = SUMS[settings.formula](rules, settings, scored)
    plain = scored.credit
    bonus = sum(shares) - (sum(plain) if settings.formula != "chain" else fmean(plain))
    return consistency, bonus, shares, limits_of_sum(settings, len(plain))


@lru_cache(maxsize=4096)
def _violations(rules: RuleSet, asked: tuple[str, ...], values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(rules.violations(dict(zip(asked, values, strict=True))))


def _nodes(rules: RuleSet, truth: Mapping[str, str], asked: Sequence[str]) -> list[RuleNode]:
    """Return the asked nodes, whose true values are known."""
    if not asked:
        raise DataError("no node is asked; expected at least one")
    nodes = []
    for id in asked:
        try:
            node = rules.node(id)
        except ConfigError as error:
            raise DataError(str(error)) from None
        if truth.get(id) not in node.values:
            known = ", ".join(node.values)
            raise DataError(f"truth of node {id}: unknown value {truth.get(id)!r}; known: {known}")
        nodes.append(node)
    return nodes


def _check_turns(num_turns: int, **by_turn: Sequence[object]) -> None:
    """Check that every argument has one entry per turn, and that texts are texts."""
    for name, values in by_turn.items():
        if isinstance(values, str) or len(values) != num_turns:
            raise DataError(f"{name}: expected {num_turns}, one per asked node, got {len(values)}")
        if name != "finished" and not all(isinstance(text, str) for text in values):
            raise DataError(f"{name}: expected texts")


def _credit(settings: RewardSettings, node: RuleNode, value: str, true: str) -> float:
    """Return the credit of one value."""
    if value == true:
        return settings.correct
    if settings.partial and (value, true) in node.credit:
        return node.credit[value, true]
    if value in SENTINELS:
        return settings.no_match
    return settings.abstain_wrong if value == node.abstain else settings.wrong


def _balance(priors: Priors, node: str, true: str) -> float:
    """Return the factor of a true value: its inverse frequency among the values that occur, within limits."""
    counts = {value: count for value, count in priors.get(node, {}).items() if count > 0}
    if not counts:
        return 1.0
    if true not in counts:
        return MOST_BALANCE
    factor = sum(counts.values()) / (len(counts) * counts[true])
    return min(max(factor, LEAST_BALANCE), MOST_BALANCE)


def _length(settings: RewardSettings, text: str, reference: str) -> tuple[float, float]:
    """Return the penalty for a difference of lengths, and its largest value."""
    rule = settings.length
    excess = max(0.0, abs(len(text) - len(reference)) - rule.tolerance) / rule.scale
    return rule.weight * min(rule.cap, excess), rule.weight * rule.cap


def _form(settings: RewardSettings, text: str, finished: bool) -> float:
    """Return the sum of the penalties of form, each at most once."""
    rule = settings.format
    total = 0.0 if finished else rule.missing_eos
    total += 0.0 if text.strip() else rule.empty
    words = text.lower().split() if rule.repeat else []
    # An n-gram that occurs m times needs its first word m times.
    if len(words) - len(set(words)) >= rule.repeat_max:
        grams = Counter(zip(*(words[i:] for i in range(rule.repeat_n)), strict=False))
        total += rule.repeat if max(grams.values(), default=0) > rule.repeat_max else 0.0
    return total


def _bonus(
    rules: RuleSet, settings: RewardSettings, scored: ScoredAnswers, balanced: Sequence[float]
) -> tuple[float, float]:
    """Return the consistency and the bonus for it."""
    rule = settings.consistency
    a = consistency(rules, rule.mode, scored.asked, scored.values)
    gate = 1.0
    if rule.gate == "multiply":
        gate = max(0.0, min(fmean(balanced), fmean(scored.credit)))
    elif rule.gate == "primary":
        turns = zip(scored.asked, scored.values, scored.true, strict=True)
        right = [value == true for node, value, true in turns if node == rules.primary.id]
        gate = float(bool(right) and all(right))
    return a, rule.weight * a * gate


def consistency(rules: RuleSet, mode: str, asked: Sequence[str], values: Sequence[str]) -> float:
    """Return how well the values of a conversation fit one another, 0 to 1."""
    turns = list(zip(asked, values, strict=True))
    if mode == "global":
        return rules.agreement(asked, values) / len(turns)
    if len(turns) == 1:
        return float(mode == "pairwise" and bool(rules.path_masks.get(turns[0], 0)))
    pairs = list(pairwise(turns) if mode == "adjacent" else combinations(turns, 2))
    return sum(compatible(rules, first, second) for first, second in pairs) / len(pairs)


def compatible(rules: RuleSet, first: tuple[str, str], second: tuple[str, str]) -> bool:
    """Return whether a valid path has both values; pairs of node and value."""
    masks = rules.path_masks
    return bool(masks.get(first, 0) & masks.get(second, 0))


def _limits(settings: RewardSettings) -> tuple[float, float]:
    """Return the lowest and the highest raw reward without balance."""
    low = min(settings.no_match, settings.wrong, settings.abstain_wrong) - settings.length.weight * settings.length.cap
    low += settings.format.missing_eos + settings.format.empty + settings.format.repeat
    return low, settings.correct + settings.consistency.weight


def check_priors(rules: RuleSet, priors: object) -> dict[str, dict[str, float]]:
    """Return priors as read from JSON.

    Raises:
        DataError: a node, value or count is invalid.
    """
    if not isinstance(priors, Mapping):
        raise DataError("priors: expected an object {node: {value: count}}")
    checked: dict[str, dict[str, float]] = {}
    for id, counts in priors.items():
        if id not in rules.by_id or not isinstance(counts, Mapping):
            raise DataError(f"priors: {str(id)[:80]!r} is not a node with counts; known: {', '.join(rules.by_id)}")
        for value, count in counts.items():
            number = isinstance(count, (int, float)) and not isinstance(count, bool) and 0 <= count < 1e15
            if value not in rules.by_id[id].values or not number:
                raise DataError(
                    f"priors of node {id}: {str(value)[:80]!r}: {str(count)[:80]} is not a count of a value"
                )
        checked[id] = {value: float(count) for value, count in counts.items()}
    return checked


def count_values(rules: RuleSet, assignments: Sequence[Mapping[str, str]]) -> dict[str, dict[str, int]]:
    """Return the priors of a table by node: value counts over the rows in which the node is asked."""
    counts: dict[str, Counter[str]] = {node.id: Counter() for node in rules.nodes}
    for row in assignments:
        for id in rules.asked(row):
            counts[id][row[id]] += 1
    return {node.id: {value: counts[node.id][value] for value in node.values} for node in rules.nodes}
