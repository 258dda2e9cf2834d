"""Episodes: sampled dialogues with rewards, equal on all ranks, and their lines in `rollouts.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava.symbolic.rubric import Priors, Reward, reward
from llava.symbolic.structure import RuleSet
from llava.train.rollout.cases import AskedCase
from llava.train.rollout_args import RolloutSpec

NO_SPREAD = 1e-8
"""Largest difference of the rewards of a group that are treated as equal."""


@dataclass(slots=True)
class RolloutEpisode:
    """One dialogue of a rollout, with A action tokens in T turns.

    Attributes:
        group: number of its prompt in the rollout.
        sample: number of the dialogue among those of its prompt.
        case: id of the case.
        image: name of the image.
        style: order of the questions.
        seed: seed of the answers of its group.
        asked: asked nodes.
        truth: true values of the asked nodes.
        answers: texts of the answers.
        finishes: `stop` or `length`, by turn.
        reward: symbolic reward.
        score: reward that is learned: its total, with the penalty for unfinished answers.
        shares: share of each turn in the reward that is learned.
        turns: [A] turn of each action token, from 0.
        engine: [A] log-probabilities of the engine.
        old: [A] log-probabilities of the policy, where they are computed before the update.
        reference: [A] log-probabilities under the reference, or empty.
        values: [A] values, or empty.
        advantages: [A] advantages.
        returns: [A] returns of a value model, or empty.
        length: tokens of the longest dialogue, where padding counts.
        dropped: whether its group has no spread, so that it is not learned from.
    """

    group: int
    sample: int
    case: str
    image: str
    style: str
    seed: int
    asked: tuple[str, ...]
    truth: tuple[str, ...]
    answers: tuple[str, ...]
    finishes: tuple[str, ...]
    reward: Reward
    score: float
    shares: tuple[float, ...]
    turns: list[int]
    engine: list[float]
    old: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)
    length: int = 0
    dropped: bool = False

    def record(self, step: int) -> dict[str, Any]:
        """Return its line in `rollouts.jsonl`; holds no time, so that a repeated rollout writes the same line."""
        found = self.reward
        return {
            "step": step,
            "case": self.case,
            "image": self.image,
            "group": self.group,
            "sample": self.sample,
            "seed": self.seed,
            "style": self.style,
            "asked": list(self.asked),
            "truth": dict(zip(self.asked, self.truth, strict=True)),
            "answers": list(self.answers),
            "values": list(found.values),
            "hedged": list(found.hedged),
            "violations": list(found.violations),
            "finishes": list(self.finishes),
            "logprobs": self._by_turn(self.engine, mean=False),
            "raw": found.raw,
            "total": found.total,
            "score": self.score,
            "turns": list(found.turns),
            "components": found.components,
            "advantages": self._by_turn(self.advantages, mean=True),
            "dropped": self.dropped,
        }

    def _by_turn(self, numbers: Sequence[float], *, mean: bool) -> list[float]:
        """Return the sums or means of the action tokens of each turn."""
        found = []
        for turn in range(len(self.asked)):
            own = [number for number, place in zip(numbers, self.turns, strict=True) if place == turn]
            found.append(sum(own) / max(1, len(own)) if mean else sum(own))
        return found


@dataclass(frozen=True, slots=True)
class Scoring:
    """The reward of a run: rules, settings and the counts that balance rare values."""

    rules: RuleSet
    spec: RolloutSpec
    priors: Priors | None

    def reward(
        self, asked: AskedCase, answers: Sequence[str], finishes: Sequence[str]
    ) -> tuple[Reward, float, tuple[float, ...]]:
        """Return the symbolic reward of a dialogue, the score that is learned, and its turns' shares."""
        finished = [finish == "stop" for finish in finishes]
        found = reward(
            self.rules,
            truth=asked.case.truth,
            asked=asked.asked,
            answers=answers,
            references=asked.references,
            finished=finished,
            preset=self.spec.preset,
            priors=self.priors,
        )
        # The original asks for an end token anywhere in the dialogue; here every answer must have one.
        has_stopped = any(finished) if self.spec.published else all(finished)
        penalty = None if has_stopped else self.spec.no_stop_penalty
        return found, *learned(found, penalty, adds=self.spec.adds_penalty)


def learned(found: Reward, penalty: float | None, *, adds: bool = True) -> tuple[float, tuple[float, ...]]:
    """Return a dialogue's score and its turns' shares, which are in the units of `raw`.

    Args:
        found: the symbolic reward.
        penalty: of an unfinished dialogue, in the units of `total`; belongs to the last turn. None for no penalty.
        adds: whether the penalty is added to the reward; otherwise it replaces the reward.
    """
    if penalty is None:
        return found.total, found.turns
    *before, last = found.turns
    if adds:
        return found.total + penalty, (*before, last + penalty * found.unit)
    offset = found.raw - found.total * found.unit  # `total` is 0 where `raw` is this
    return penalty, (*(0.0 for _ in before), offset + penalty * found.unit)


def groups_of(episodes: Sequence[RolloutEpisode]) -> list[list[RolloutEpisode]]:
    """Return the episodes of each prompt, in the order of prompts and samples."""
    groups: dict[int, list[RolloutEpisode]] = {}
    for episode in sorted(episodes, key=lambda episode: (episode.group, episode.sample)):
        groups.setdefault(episode.group, []).append(episode)
    return list(groups.values())


def has_spread(group: Sequence[RolloutEpisode]) -> bool:
    """Return whether the rewards of a group differ; equal rewards give no learning signal."""
    scores = [episode.score for episode in group]
    return max(scores) - min(scores) > NO_SPREAD


def constant_nodes(episodes: Sequence[RolloutEpisode]) -> dict[str, str]:
    """Return the nodes whose answers have one value within every group, each with the commonest values."""
    seen: dict[str, dict[str, int]] = {}
    varied: set[str] = set()
    for group in groups_of(episodes):
        for place, node in enumerate(group[0].asked):
            values = {episode.reward.values[place] for episode in group}
            varied |= {node} if len(values) > 1 else set()
            for value in values:
                counts = seen.setdefault(node, {})
                counts[value] = counts.get(value, 0) + 1
    return {
        node: ", ".join(sorted(counts, key=lambda value: (-counts[value], value))[:3])
        for node, counts in seen.items()
        if node not in varied
    }


Pairs = Mapping[str, tuple[float, float]]


def metrics_of(episodes: Sequence[RolloutEpisode]) -> dict[str, tuple[float, float]]:
    """Return sum and count of each metric of some episodes."""
    found: dict[str, tuple[float, float]] = {}
    num = float(len(episodes))

    def add(name: str, values: Sequence[float]) -> None:
        found[name] = (float(sum(values)), float(len(values)))

    add("reward", [episode.reward.total for episode in episodes])
    add("score", [episode.score for episode in episodes])
    for name in COMPONENTS:
        parts = [episode.reward.components[name] for episode in episodes]
        add(f"reward/{name}", [sum(p) / len(p) if isinstance(p, tuple) else p for p in parts])
    right = [[v == y for v, y in zip(e.reward.values, e.truth, strict=True)] for e in episodes]
    flat = [float(hit) for hits in right for hit in hits]
    add("A_Q", flat)
    add("A_C", [float(all(hits)) for hits in right])
    turns = [turn for e in episodes for turn in zip(e.reward.values, e.reward.hedged, e.finishes, strict=True)]
    add("no_match", [float(value.startswith("__")) for value, _, _ in turns])
    add("hedged", [float(hedged) for _, hedged, _ in turns])
    add("unfinished", [float(finish != "stop") for _, _, finish in turns])
    add("void", [float(void) for e in episodes for void in _as_tuple(e.reward.components["void"])])
    add("contradictions", [float(bool(e.reward.violations)) for e in episodes])
    found["equal_groups"] = (float(sum(e.dropped for e in episodes)), num)
    found["answer_tokens"] = (float(sum(len(e.turns) for e in episodes)), num)
    return found


COMPONENTS = ("correctness", "consistency", "bonus", "length", "format")


def _as_tuple(value: float | tuple[float, ...]) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


METRIC_NAMES = ("reward", "score", *(f"reward/{name}" for name in COMPONENTS), "A_Q", "A_C", "no_match", "hedged",
                "unfinished", "void", "contradictions", "equal_groups", "answer_tokens")  # fmt: skip
"""Names of `metrics_of`."""
