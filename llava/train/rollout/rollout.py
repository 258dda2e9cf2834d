"""One rollout: cases -> dialogues -> reward -> advantages -> rows.

Every rank asks its share of the prompts. What is known of the dialogues is then exchanged, so that all ranks compute
the same advantages and the first one writes the records; sequences stay where they were sampled.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch.distributed as dist

from llava.constants import IGNORE_INDEX
from llava.data.encode import Encoded
from llava.errors import GenerationError, LlavaError
from llava.generation.protocol import Dialogue, Sampling, Script
from llava.train.objectives.policy import LENGTH
from llava.train.rollout.advantages import KlControl, add_advantages
from llava.train.rollout.cases import AskedCase, RolloutCase, interview, seed_of
from llava.train.rollout.episodes import RolloutEpisode, Scoring, groups_of, has_spread
from llava.train.rollout.scoring import RolloutScorer
from llava.train.rollout_args import RolloutSpec

T = TypeVar("T")

Converse = Callable[[Sequence[Script], Sampling], "list[list[Dialogue]]"]
"""`converse` of an engine, in the precision of the run."""

FindImage = Callable[[str], Any]
"""Function that returns the file of an image name."""


@dataclass(slots=True)
class Rollout:
    """Dialogues of one step, ready to be learned from.

    Attributes:
        step: number of the rollout, from 1.
        episodes: episodes of all ranks, in the order of prompts and samples.
        own: sequences of this rank by `(group, sample)`, with the columns of their action tokens.
        num_groups: number of prompts, with those that replaced others.
        seconds: time of sampling and of scoring on this rank.
    """

    step: int
    episodes: list[RolloutEpisode] = field(default_factory=list)
    own: dict[tuple[int, int], Encoded] = field(default_factory=dict)
    num_groups: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"rollout": 0.0, "scoring": 0.0})


@dataclass(frozen=True, slots=True)
class Roller:
    """Makes rollouts; see the module.

    Attributes:
        spec: the algorithm and its sizes.
        scoring: the reward.
        scorer: log-probabilities and values.
        converse: samples dialogues.
        find_image: file of an image.
        seed: seed of the run.
        rank: rank of this process.
        world_size: number of processes.
    """

    spec: RolloutSpec
    scoring: Scoring
    scorer: RolloutScorer
    converse: Converse
    find_image: FindImage
    seed: int
    rank: int = 0
    world_size: int = 1

    def rollout(self, step: int, next_case: Callable[[], RolloutCase], control: KlControl) -> Rollout:
        """Return the rollout of a step.

        Args:
            step: number of the rollout, from 1.
            next_case: returns the next case in the order of the run, the same on every rank.
            control: strength of the KL penalty, which is adapted to this rollout.
        """
        found = Rollout(step)
        self._add(found, [next_case() for _ in range(self.spec.prompts)])
        left = self.spec.more_prompts
        while left and (num := min(left, self._missing(found))):
            left -= num
            self._add(found, [next_case() for _ in range(num)])
        started = time.perf_counter()
        coef = control.coef
        if self.spec.algorithm == "ppo" and self.spec.whiten_over == "per_gpu":
            own = [episode for episode in found.episodes if episode.group % self.world_size == self.rank]
            add_advantages(own, self.spec, kl_coef=coef)
            found.episodes = _sorted(self._gathered(own))
        else:
            add_advantages(found.episodes, self.spec, kl_coef=coef)
        control.update(found.episodes)
        by_place = {(episode.group, episode.sample): episode for episode in found.episodes}
        found.own = {place: with_columns(encoded, by_place[place]) for place, encoded in found.own.items()}
        found.seconds["scoring"] += time.perf_counter() - started
        return found

    def _missing(self, found: Rollout) -> int:
        """Return how many groups with spread the rollout lacks."""
        return self.spec.prompts - sum(map(has_spread, groups_of(found.episodes)))

    def _add(self, found: Rollout, cases: Sequence[RolloutCase]) -> None:
        """Sample the dialogues of some more prompts and exchange their episodes."""
        first, spec = found.num_groups, self.spec
        found.num_groups += len(cases)
        mine = [(first + i, case) for i, case in enumerate(cases) if (first + i) % self.world_size == self.rank]
        started = time.perf_counter()
        asked = [
            interview(case, self.scoring.rules, seed=seed_of(self.seed, found.step, group, case.id), styles=spec.styles)
            for group, case in mine
        ]
        samples = self.converse([self._script(item) for item in asked], self._sampling()) if asked else []
        found.seconds["rollout"] += time.perf_counter() - started
        started = time.perf_counter()
        sequences, episodes = [], []
        for (group, _), item, dialogues in zip(mine, asked, samples, strict=True):
            made = [self._episode(group, number, item, dialogue) for number, dialogue in enumerate(dialogues)]
            episodes += _shuffled(made, item.seed) if spec.shuffled_rewards else made
            sequences += [dialogue.encoded for dialogue in dialogues]
        self._score(episodes, sequences)
        pairs = zip(episodes, sequences, strict=True)
        found.own |= {(episode.group, episode.sample): encoded for episode, encoded in pairs}
        found.episodes = _sorted([*found.episodes, *self._gathered(episodes)])
        found.seconds["scoring"] += time.perf_counter() - started

    def _script(self, asked: AskedCase) -> Script:
        return Script(
            conversation=asked.opening,
            follow_ups=asked.questions[1:],
            images=(self.find_image(asked.case.image),),
            seed=asked.seed,
        )

    def _sampling(self) -> Sampling:
        spec = self.spec
        return Sampling(
            max_new_tokens=spec.response_len, temperature=spec.temperature, n=spec.group_size, logprobs=True
        )

    def _episode(self, group: int, sample: int, asked: AskedCase, dialogue: Dialogue) -> RolloutEpisode:
        """Return the rewarded episode of a dialogue.

        Raises:
            GenerationError: a turn was not answered.
        """
        if dialogue.error is not None:
            raise GenerationError(f"{asked.case.origin}: {dialogue.error}")
        found, score, shares = self.scoring.reward(asked, dialogue.texts, dialogue.finishes)
        return RolloutEpisode(
            group=group,
            sample=sample,
            case=asked.case.id,
            image=asked.case.image,
            style=asked.style,
            seed=asked.seed,
            asked=asked.asked,
            truth=tuple(asked.case.truth[node] for node in asked.asked),
            answers=tuple(dialogue.texts),
            finishes=tuple(dialogue.finishes),
            reward=found,
            score=score,
            shares=shares,
            turns=action_turns(dialogue.encoded),
            engine=[float(number) for turn in dialogue.logprobs for number in turn],
        )

    def _score(self, episodes: Sequence[RolloutEpisode], sequences: Sequence[Encoded]) -> None:
        """Add the log-probabilities and values that the update needs."""
        scorer, spec = self.scorer, self.spec
        if spec.engine is not None:
            for episode in episodes:
                episode.old = episode.engine
        elif spec.updates > 1 or spec.algorithm != "grpo":
            for episode, numbers in zip(episodes, scorer.logprobs(sequences), strict=True):
                episode.old = numbers
        for episode, numbers in zip(episodes, scorer.reference_logprobs(sequences), strict=True):
            episode.reference = numbers
        for episode, numbers in zip(episodes, scorer.values(sequences), strict=True):
            episode.values = numbers

    def _gathered(self, items: list[T]) -> list[T]:
        """Return the items of all ranks."""
        if self.world_size == 1:
            return items
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]


def _sorted(episodes: list[RolloutEpisode]) -> list[RolloutEpisode]:
    """Return episodes in the order of prompts and samples, on whichever rank they were sampled."""
    return sorted(episodes, key=lambda episode: (episode.group, episode.sample))


def _shuffled(group: list[RolloutEpisode], seed: int) -> list[RolloutEpisode]:
    """Return the episodes of a group with the rewards of one another, as a control that can teach nothing."""
    order = random.Random(seed_of(seed, "shuffled")).sample(range(len(group)), len(group))
    pairs = [(group[place].score, group[place].shares) for place in order]
    for episode, (score, shares) in zip(group, pairs, strict=True):
        episode.score, episode.shares = score, shares
    return group


def action_turns(encoded: Encoded) -> list[int]:
    """Return the turn of each action token of a dialogue, numbered from 0 over its answers.

    Raises:
        LlavaError: the dialogue has no action token.
    """
    places = [turn for label, turn in zip(encoded.labels, encoded.turns, strict=True) if label != IGNORE_INDEX]
    if not places:
        raise LlavaError("a sampled dialogue has no action token; this is a bug in the engine")
    order = {turn: index for index, turn in enumerate(dict.fromkeys(places))}
    return [order[turn] for turn in places]


def with_columns(encoded: Encoded, episode: RolloutEpisode) -> Encoded:
    """Return a sequence whose action tokens carry the numbers of its episode."""
    named = {
        "advantage": episode.advantages,
        "engine": episode.engine,
        "old": episode.old,
        "reference": episode.reference,
        "value": episode.values,
        "return": episode.returns,
    }
    places = [place for place, label in enumerate(encoded.labels) if label != IGNORE_INDEX]
    columns = {name: _spread(numbers, places, len(encoded.labels)) for name, numbers in named.items() if numbers}
    return replace(encoded, columns=columns, numbers={LENGTH: float(episode.length)})


def _spread(numbers: Sequence[float], places: Sequence[int], length: int) -> tuple[float, ...]:
    found = [0.0] * length
    for place, number in zip(places, numbers, strict=True):
        found[place] = number
    return tuple(found)
