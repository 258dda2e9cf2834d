"""One rollout on a made-up engine: prompts of ranks, replaced groups, columns of the tokens, penalties, statistics."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llava.constants import IGNORE_INDEX
from llava.data.encode import Encoded
from llava.errors import GenerationError
from llava.generation.protocol import Dialogue, Sampling, Script
from llava.samples import Origin
from llava.symbolic.rules import load_rules
from llava.symbolic.structure import RuleSet
from llava.train.rollout import rollout as module
from llava.train.rollout.advantages import KlControl
from llava.train.rollout.cases import RolloutCase
from llava.train.rollout.episodes import Scoring
from llava.train.rollout.rollout import Roller, Rollout, action_turns
from llava.train.rollout_args import RolloutSpec
from tests.support.rollouts import PHRASES, TOY, spec


@pytest.fixture
def rules(tmp_path: Path) -> RuleSet:
    (tmp_path / "phrases.yaml").write_text(PHRASES)
    (tmp_path / "rules.yaml").write_text(TOY)
    return load_rules(tmp_path / "rules.yaml")


class Scores:
    """Scorer whose numbers are those of the tokens."""

    def logprobs(self, sequences: list[Encoded]) -> list[list[float]]:
        return [[-float(label) / 10 for label in s.labels if label >= 0] for s in sequences]

    def reference_logprobs(self, sequences: list[Encoded]) -> list[list[float]]:
        return [[-float(label) / 20 for label in s.labels if label >= 0] for s in sequences]

    def values(self, sequences: list[Encoded]) -> list[list[float]]:
        return [[0.1 * label for label in s.labels if label >= 0] for s in sequences]


def engine(equal: int = 0, *, error: str | None = None, finish: Any = "stop") -> Callable[..., list[list[Dialogue]]]:
    """Return an engine whose first `equal` scripts have equal answers; others are drawn by their seed."""
    seen: list[Script] = []

    def converse(scripts: list[Script], sampling: Sampling) -> list[list[Dialogue]]:
        found = []
        for script in scripts:
            seen.append(script)
            draw = random.Random(script.seed)
            samples = []
            for _ in range(sampling.n):
                tokens = [5, 5] if len(seen) <= equal else [draw.randrange(3, 20) for _ in range(2)]
                texts = tuple("abc" if token % 2 else "xyz" for token in tokens)
                ids, labels = (1, tokens[0], 2, tokens[1]), (IGNORE_INDEX, tokens[0], IGNORE_INDEX, tokens[1])
                encoded = Encoded(ids, labels, (0, 1, 2, 3))
                samples.append(Dialogue(encoded, texts, (finish,) * 2, ((-0.5,), (-0.7,)), error))
            found.append(samples)
        return found

    converse.seen = seen  # type: ignore[attr-defined]
    return converse


def roll(rules: RuleSet, settings: RolloutSpec, converse: Any, *, rank: int = 0, world_size: int = 1) -> Rollout:
    rows = [{"id": str(i), "image": f"{i}.png", "label": "dl"[i % 2]} for i in range(12)]
    truths = {"d": {"shade": "dark", "kind": "cell"}, "l": {"shade": "light", "kind": "clot"}}
    cases = iter([RolloutCase(r["id"], r["image"], truths[r["label"]], Origin("f", 0), r, False) for r in rows])
    roller = Roller(
        settings, Scoring(rules, settings, None), Scores(), converse, str, seed=3, rank=rank, world_size=world_size
    )  # type: ignore[arg-type]
    return roller.rollout(1, lambda: next(cases), KlControl(settings.kl_coef))


def small(algorithm: str = "grpo", **changed: object) -> RolloutSpec:
    return spec(algorithm, **{"group_size": 4, "rollout_batch": 16, "step_batch": 16, **changed})


def test_a_rollout_has_its_prompts_and_columns(rules: RuleSet) -> None:
    found = roll(rules, small("ppo"), engine())
    assert [(e.group, e.sample) for e in found.episodes] == [(g, s) for g in range(4) for s in range(4)]
    for e in found.episodes:
        encoded = found.own[e.group, e.sample]
        assert action_turns(encoded) == e.turns == [0, 1]
        columns = {"advantage": e.advantages, "engine": e.engine, "old": e.old, "reference": e.reference,
                   "value": e.values, "return": e.returns}  # fmt: skip
        assert encoded.columns == {name: (0.0, a, 0.0, b) for name, (a, b) in columns.items()}
    assert len({e.seed for e in found.episodes}) == 4


def test_one_update_of_grpo_needs_no_earlier_log_probabilities(rules: RuleSet) -> None:
    once, twice = roll(rules, small(), engine()), roll(rules, small(passes=2), engine())
    assert not once.episodes[0].old and twice.episodes[0].old
    assert "old" not in once.own[0, 0].columns and "old" in twice.own[0, 0].columns


@pytest.mark.parametrize(("more", "num_groups", "num_kept"), [(0, 4, 2), (1, 5, 3), (8, 6, 4)])
def test_groups_without_spread_are_replaced(rules: RuleSet, more: int, num_groups: int, num_kept: int) -> None:
    found = roll(rules, small(more_prompts=more), engine(equal=2))
    kept = {e.group for e in found.episodes if not e.dropped}
    assert found.num_groups == num_groups and len(kept) == num_kept and not kept & {0, 1}


def test_ranks_share_the_prompts_and_the_advantages(rules: RuleSet, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = roll(rules, small("ppo"), engine())
    parts: dict[int, list[Any]] = {0: [], 1: []}
    for own in (0, 1):  # what each rank sends, in order
        monkeypatch.setattr(Roller, "_gathered", lambda self, items, own=own: parts[own].append(items) or items)
        roll(rules, small("ppo"), engine(), rank=own, world_size=2)
    sent = iter([a + b for a, b in zip(parts[0], parts[1], strict=True)])
    monkeypatch.setattr(Roller, "_gathered", lambda self, items: next(sent))
    found = roll(rules, small("ppo"), engine(), rank=1, world_size=2)
    assert [e.advantages for e in found.episodes] == [e.advantages for e in whole.episodes]
    assert set(found.own) == {(g, s) for g in (1, 3) for s in range(4)}


def test_statistics_of_one_process(rules: RuleSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Roller, "_gathered", lambda self, items: items)
    settings = small("ppo", whiten_over="per_gpu")
    own = roll(rules, settings, engine(), rank=0, world_size=2)
    numbers = [a for e in own.episodes for a in e.advantages]
    assert {e.group for e in own.episodes} == {0, 2} and sum(numbers) == pytest.approx(0, abs=1e-9)
    whole = {(e.group, e.sample): e.advantages for e in roll(rules, small("ppo"), engine()).episodes}
    assert any(e.advantages != whole[e.group, e.sample] for e in own.episodes)


@pytest.mark.parametrize(("changed", "score"), [
    ({}, lambda total: total),
    ({"no_stop_penalty": -2.0}, lambda total: total - 2.0),
    ({"no_stop_penalty": -2.0, "adds_penalty": False}, lambda total: -2.0),
])  # fmt: skip
def test_penalty_of_unfinished_answers(rules: RuleSet, changed: dict, score: Callable[[float], float]) -> None:
    found = roll(rules, small(**changed), engine(finish="length"))
    assert [e.score for e in found.episodes] == [score(e.reward.total) for e in found.episodes]
    for e in found.episodes:
        # Shares of dialogues with and without a penalty are compared, so they are in one scale.
        assert e.reward.unit > 0
        assert sum(e.shares) == pytest.approx(e.reward.raw + (e.score - e.reward.total) * e.reward.unit)
        assert e.shares[:-1] == ((0.0,) if "adds_penalty" in changed else e.reward.turns[:-1])


def test_a_penalty_that_replaces_the_reward_leaves_nothing_to_tell_dialogues_apart(rules: RuleSet) -> None:
    found = roll(rules, small(no_stop_penalty=-2.0, adds_penalty=False), engine(finish="length"))
    assert len({e.shares for e in found.episodes}) == 1
    assert all(e.dropped and not any(e.advantages) for e in found.episodes)


def test_shuffled_rewards_are_those_of_the_group(rules: RuleSet) -> None:
    plain, shuffled = (roll(rules, small(shuffled_rewards=value), engine()) for value in (False, True))
    assert [e.answers for e in plain.episodes] == [e.answers for e in shuffled.episodes]
    assert [e.score for e in plain.episodes] != [e.score for e in shuffled.episodes]
    for group in range(4):
        first = slice(4 * group, 4 * group + 4)
        pairs = [sorted((e.score, e.shares) for e in found.episodes[first]) for found in (plain, shuffled)]
        assert pairs[0] == pairs[1]


def test_an_answer_that_failed_stops_the_run(rules: RuleSet) -> None:
    with pytest.raises(GenerationError, match="f, row 0: no room"):
        roll(rules, small(), engine(error="no room"))


def test_scripts_have_seeds_of_their_own(rules: RuleSet) -> None:
    first, second = engine(), engine()
    roll(rules, small(), first)
    roll(rules, replace(small(), styles=("standard",)), second)
    seeds = [script.seed for script in first.seen]  # type: ignore[attr-defined]
    assert len(set(seeds)) == 4 and seeds == [script.seed for script in second.seen]  # type: ignore[attr-defined]
    assert module.seed_of(3, 1, 0, "0") != module.seed_of(3, 2, 0, "0")
