"""Advantages of the episodes of a rollout, on each of their action tokens.

grpo  return to go of each turn, against those of the group
rloo  total minus the KL penalty of the dialogue, against the mean of the others
ppo   score and KL penalty per token, generalized advantages of a value model, whitened
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava.train import losses
from llava.train.rollout.episodes import RolloutEpisode, groups_of, has_spread
from llava.train.rollout_args import RolloutSpec


def add_advantages(episodes: Sequence[RolloutEpisode], spec: RolloutSpec, *, kl_coef: float) -> None:
    """Set the advantages of all episodes of a rollout, and mark those of groups without spread as dropped.

    Args:
        episodes: episodes of all ranks, or of this one where statistics are its own.
        spec: the algorithm.
        kl_coef: strength of the KL penalty, which may have been adapted.
    """
    if spec.algorithm == "ppo":
        _generalized(episodes, spec, kl_coef)
        return
    for group in groups_of(episodes):
        dropped = not has_spread(group)
        by_turn = _group_advantages(group, spec, kl_coef)
        for episode, row in zip(group, by_turn.tolist(), strict=True):
            episode.dropped = dropped
            episode.advantages = [row[turn] for turn in episode.turns]


def _group_advantages(group: Sequence[RolloutEpisode], spec: RolloutSpec, kl_coef: float) -> Tensor:
    """Return the advantages [G, T] of the turns of one group, float64."""
    num_turns = len(group[0].asked)
    scores = torch.tensor([episode.score for episode in group], dtype=torch.float64)
    if spec.algorithm == "rloo":
        scores = scores - kl_coef * torch.tensor([dialogue_kl(episode) for episode in group], dtype=torch.float64)
        return losses.leave_one_out_advantages(scores[None])[0][:, None].expand(-1, num_turns)
    if spec.credit == "dialogue":
        return losses.group_advantages(scores[None], scale=spec.scale)[0][:, None].expand(-1, num_turns)
    turns = torch.tensor([episode.shares for episode in group], dtype=torch.float64)
    return losses.turn_advantages(turns, gamma=spec.gamma, scale=spec.scale)


def dialogue_kl(episode: RolloutEpisode) -> float:
    """Return the estimate of the KL divergence of a dialogue from the reference, 0 without one."""
    if not episode.reference:
        return 0.0
    return sum(old - reference for old, reference in zip(episode.old, episode.reference, strict=True))


def _padded(rows: Sequence[Sequence[float]], length: int) -> Tensor:
    """Return numbers of action tokens as [B, length] float64, filled with zeros."""
    found = pad_sequence([torch.tensor(row, dtype=torch.float64) for row in rows], batch_first=True)
    return torch.nn.functional.pad(found, (0, length - found.shape[1]))


def _generalized(episodes: Sequence[RolloutEpisode], spec: RolloutSpec, kl_coef: float) -> None:
    """Set advantages and returns by the values; with the published form, padding is part of every mean."""
    longest = max(len(episode.turns) for episode in episodes)
    mask = _padded([[1.0] * len(episode.turns) for episode in episodes], longest).bool()
    values = _padded([episode.values for episode in episodes], longest)
    old = _padded([episode.old for episode in episodes], longest)
    has_reference = bool(episodes[0].reference)
    reference = _padded([episode.reference for episode in episodes], longest) if has_reference else old
    kl = losses.kl_estimate(old, reference, "k1")
    if spec.published:
        kl, mask = kl.clamp(min=0.0), torch.ones_like(mask)
    scores = torch.tensor([episode.score for episode in episodes], dtype=torch.float64)
    rewards = losses.shaped_rewards(scores, kl, mask, kl_coef=kl_coef)
    if spec.whiten_rewards:
        rewards = losses.whiten(rewards, mask, shift_mean=False)
    advantages, returns = losses.gae(rewards, values, mask, gamma=spec.gamma, lam=spec.lam)
    advantages = losses.whiten(advantages, mask)
    for row, episode in enumerate(episodes):
        num = len(episode.turns)
        episode.advantages, episode.returns = advantages[row, :num].tolist(), returns[row, :num].tolist()
        episode.length = longest


class KlControl:
    """Strength of the KL penalty, fixed or adapted to a target (1909.08593).

    Args:
        coef: strength at the start.
        target: KL of a dialogue; 0 for a fixed strength.
        horizon: dialogues in which the strength adapts.
    """

    def __init__(self, coef: float, *, target: float = 0.0, horizon: int = 10000) -> None:
        self.coef = coef
        self.target = target
        self.horizon = horizon

    def update(self, episodes: Sequence[RolloutEpisode]) -> None:
        """Adapt the strength to the KL of a rollout: by at most a fifth of `dialogues / horizon`."""
        if not self.target or not episodes:
            return
        mean = sum(map(dialogue_kl, episodes)) / len(episodes)
        error = min(max(mean / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * len(episodes) / self.horizon
