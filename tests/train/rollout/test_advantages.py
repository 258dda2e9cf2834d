"""Advantages of episodes: by group and turn, against TRL's formulas, and PPO against loops."""

from __future__ import annotations

import random

import numpy as np
import pytest

from llava.train.rollout.advantages import KlControl, add_advantages, dialogue_kl
from llava.train.rollout.episodes import RolloutEpisode, constant_nodes, metrics_of
from tests.support.rollouts import episode, spec


def episodes(num_groups: int = 3, size: int = 4, *, seed: int = 0) -> list[RolloutEpisode]:
    draw = random.Random(seed)
    return [episode(group, sample, draw) for group in range(num_groups) for sample in range(size)]


def table(found: list[RolloutEpisode], size: int = 4) -> np.ndarray:
    return np.array([e.score for e in found]).reshape(-1, size)


@pytest.mark.parametrize("scale", ["group", "none"])
def test_one_advantage_of_a_dialogue_equals_trl(scale: str) -> None:
    found = episodes()
    add_advantages(found, spec("grpo", credit="dialogue", scale=scale), kl_coef=0.0)
    rewards = table(found)
    centered = rewards - rewards.mean(1, keepdims=True)
    expected = centered / (rewards.std(1, ddof=1, keepdims=True) + 1e-4) if scale == "group" else centered
    for e, advantage in zip(found, expected.ravel(), strict=True):
        np.testing.assert_allclose(e.advantages, [advantage] * len(e.turns), atol=1e-5)


def test_rloo_subtracts_the_kl_and_equals_trl() -> None:
    found = episodes()
    add_advantages(found, spec("rloo"), kl_coef=0.3)
    kl = np.array([np.sum(np.array(e.old) - np.array(e.reference)) for e in found]).reshape(3, 4)
    rewards = table(found) - 0.3 * kl
    expected = rewards - (rewards.sum(1, keepdims=True) - rewards) / 3
    for e, advantage in zip(found, expected.ravel(), strict=True):
        np.testing.assert_allclose(e.advantages, [advantage] * len(e.turns), atol=1e-5)
    assert dialogue_kl(found[0]) == pytest.approx(kl[0, 0])
    sums = [sum(e.advantages[0] for e in found[4 * g : 4 * g + 4]) for g in range(3)]
    np.testing.assert_allclose(sums, 0, atol=1e-9)


def test_turns_have_advantages_of_their_return_to_go() -> None:
    found = episodes()
    add_advantages(found, spec("grpo", gamma=0.5), kl_coef=0.0)
    for group in range(3):
        members = found[4 * group : 4 * group + 4]
        turns = np.array([e.reward.turns for e in members])
        assert [e.shares for e in members] == [tuple(row) for row in turns.tolist()]
        to_go = np.stack([turns[:, 0] + 0.5 * turns[:, 1], turns[:, 1]], axis=1)
        expected = (to_go - to_go.mean(0)) / (to_go.std(0, ddof=1) + 1e-4)
        for e, row in zip(members, expected, strict=True):
            np.testing.assert_allclose(e.advantages, [row[turn] for turn in e.turns], atol=1e-9)


def test_groups_without_spread_are_dropped() -> None:
    draw = random.Random(1)
    found = [episode(0, i, draw, score=0.25 + 1e-10 * i) for i in range(4)] + [episode(1, i, draw) for i in range(4)]
    add_advantages(found, spec("grpo"), kl_coef=0.0)
    assert [e.dropped for e in found] == [True] * 4 + [False] * 4
    assert metrics_of(found)["equal_groups"] == (4.0, 8.0)


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_ppo_equals_loops(whiten_rewards: bool, published: bool) -> None:
    found = episodes(num_groups=5, size=1)
    add_advantages(
        found, spec("ppo", gamma=0.9, lam=0.8, whiten_rewards=whiten_rewards, published=published), kl_coef=0.2
    )
    longest = max(len(e.turns) for e in found)
    rewards, mask = np.zeros((5, longest)), np.zeros((5, longest), bool)
    values = np.zeros((5, longest))
    for row, e in enumerate(found):
        num = len(e.turns)
        mask[row, :num] = True
        kl = np.array(e.old) - np.array(e.reference)
        rewards[row, :num] = -0.2 * (np.maximum(kl, 0) if published else kl)
        rewards[row, longest - 1 if published else num - 1] += e.score
        values[row, :num] = e.values
    if published:
        mask[:] = True
    if whiten_rewards:
        mean, std = rewards[mask].mean(), rewards[mask].std()
        rewards = np.where(mask, (rewards - mean) / (std + 1e-8) + mean, 0)
    advantages = np.zeros_like(rewards)
    for row in range(5):
        places, following, last = np.flatnonzero(mask[row]), 0.0, 0.0
        for t in places[::-1]:
            last = rewards[row, t] + 0.9 * following - values[row, t] + 0.9 * 0.8 * last
            advantages[row, t], following = last, values[row, t]
    returns = advantages + values
    whitened = (advantages - advantages[mask].mean()) / (advantages[mask].std() + 1e-8)
    for row, e in enumerate(found):
        np.testing.assert_allclose(e.advantages, whitened[row, : len(e.turns)], atol=1e-9)
        np.testing.assert_allclose(e.returns, returns[row, : len(e.turns)], atol=1e-9)
        assert not e.dropped and e.length == longest


def test_kl_control_moves_towards_its_target() -> None:
    found = episodes()
    fixed, adaptive = KlControl(0.1), KlControl(0.1, target=1e-3, horizon=100)
    mean = sum(map(dialogue_kl, found)) / len(found)
    for control in (fixed, adaptive):
        control.update(found)
    error = min(max(mean / 1e-3 - 1, -0.2), 0.2)
    assert fixed.coef == 0.1 and adaptive.coef == pytest.approx(0.1 * (1 + error * 12 / 100)) != 0.1


def test_nodes_whose_answers_never_differ_are_named() -> None:
    assert constant_nodes(episodes()) == {"x": "a", "y": "b"}


def test_metrics_of_a_rollout() -> None:
    found = episodes(num_groups=1, size=2)
    metrics = {name: total / count for name, (total, count) in metrics_of(found).items()}
    assert (metrics["A_Q"], metrics["A_C"], metrics["hedged"], metrics["unfinished"]) == (0.5, 0.0, 0.5, 0.5)
    assert metrics["reward/consistency"] == 0.5 and metrics["reward"] == pytest.approx(
        np.mean([e.score for e in found])
    )


def test_the_line_of_an_episode() -> None:
    e = episodes()[0]
    add_advantages([*episodes()[1:4], e], spec("grpo"), kl_coef=0.0)
    line = e.record(7)
    assert (line["step"], line["group"], line["sample"], line["case"], line["values"]) == (7, 0, 0, "c", ["a", "b"])
    sums = [sum(x for x, turn in zip(e.engine, e.turns, strict=True) if turn == t) for t in (0, 1)]
    assert line["logprobs"] == pytest.approx(sums) and len(line["advantages"]) == 2
