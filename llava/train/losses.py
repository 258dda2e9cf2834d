"""Loss terms as pure functions of tensors; their names state what is summed.

M targets, E edges (pairs of a sequence and a target), V vocabulary size, G groups
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.errors import ConfigError
from llava.utils.lookup import lookup


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Return log-probabilities [M] of target ids [M] under logits [M, V], in float64 or float32."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return -F.cross_entropy(wide, targets, reduction="none")


def without_token(logits: Tensor, token: int | None) -> Tensor:
    """Return logits [M, V] in which a token has probability 0; None changes nothing."""
    if token is None:
        return logits
    return logits.index_fill(-1, torch.tensor(token, device=logits.device), float("-inf"))


def edge_sum(values: Tensor, edge_target: Tensor, edge_weight: Tensor) -> Tensor:
    """Return the weighted sum of target values over edges.

    Args:
        values: [M] values of the distinct targets.
        edge_target: [E] index of each edge's target; a shared target has several edges.
        edge_weight: [E] weights.

    Returns:
        A scalar; 0 (with an autograd graph) without edges.
    """
    return (values * edge_weight.new_zeros(len(values)).index_add(0, edge_target, edge_weight)).sum()


def edge_sums(values: Tensor, edge_target: Tensor, edge_weight: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Return the sum of `edge_sum` and the sum of the weights for each group of edges.

    Args:
        values: [M] values of the targets.
        edge_target: [E] index of each edge's target.
        edge_weight: [E] weights.
        groups: [E] index of each edge's group.
        num_groups: G, the number of groups.

    Returns:
        [2, G]: weighted sums and sums of weights.
    """
    weighted = torch.stack([values[edge_target] * edge_weight, edge_weight])
    return weighted.new_zeros(2, num_groups).index_add(1, groups, weighted)


# Reinforcement learning: B dialogues, T tokens (or turns, where a docstring says so), N prompts, G samples of a prompt.


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Return generalized advantages and returns (1506.02438) over action tokens; other tokens are skipped.

    Args:
        rewards: [B, T] rewards.
        values: [B, T] values; beyond the last action token the value is 0.
        mask: [B, T] true for action tokens.
        gamma: discount of a token.
        lam: decay of the estimator.

    Returns:
        Advantages and returns, each [B, T]; 0 at other tokens.
    """
    actions = mask.bool()
    advantages = torch.zeros_like(values)
    next_value, next_advantage = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        here = actions[:, t]
        advantage = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * next_advantage
        next_value = torch.where(here, values[:, t], next_value)
        next_advantage = torch.where(here, advantage, next_advantage)
        advantages[:, t] = advantage
    zeros = torch.zeros_like(values)
    return torch.where(actions, advantages, zeros), torch.where(actions, advantages + values, zeros)


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Return masked values with population std 1 and mean 0 (or, unshifted, their own); 0 elsewhere."""
    kept = mask.bool()
    mean = x[kept].mean()
    scaled = (x - mean) / (x[kept].std(unbiased=False) + 1e-8)
    return torch.where(kept, scaled if shift_mean else scaled + mean, torch.zeros_like(x))


def shaped_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """Return rewards per token [B, T]: `-kl_coef * kl` at action tokens, plus the score [B] at the last."""
    actions = mask.bool()
    places = torch.arange(kl.shape[1], device=kl.device)
    last = torch.where(actions, places, -1).amax(dim=1, keepdim=True) == places
    rewards = torch.where(actions, -kl_coef * kl, torch.zeros_like(kl))
    return rewards + torch.where(last, scores[:, None].to(kl.dtype), torch.zeros_like(kl))


def kl_estimate(logprobs: Tensor, reference: Tensor, kind: str) -> Tensor:
    """Return the estimate of the KL divergence from a reference per token, `k1` or `k3`, not clamped.

    Raises:
        ConfigError: `kind` is unknown.
    """
    difference = reference - logprobs
    estimates = {"k1": lambda: -difference, "k3": lambda: torch.expm1(difference) - difference}
    return lookup(estimates, kind, "KL estimate")()


def group_advantages(rewards: Tensor, *, scale: str = "group") -> Tensor:
    """Return rewards [N, G] minus their group mean.

    They are divided by the sample deviation + 1e-4 unless `scale` is `none`.

    2402.03300 and, without scale, 2503.20783.

    Raises:
        ConfigError: a group has fewer than 2 samples, or `scale` is unknown.
    """
    _require_groups(rewards.shape[1])
    centered = rewards - rewards.mean(dim=1, keepdim=True)
    scales = {"group": lambda: rewards.std(dim=1, keepdim=True) + 1e-4, "none": lambda: torch.ones_like(rewards)}
    return centered / lookup(scales, scale, "scale of advantages")()


def leave_one_out_advantages(rewards: Tensor) -> Tensor:
    """Return rewards [N, G] minus the mean of the other samples of their group (2402.14740).

    Raises:
        ConfigError: a group has fewer than 2 samples.
    """
    size = rewards.shape[1]
    _require_groups(size)
    return rewards - (rewards.sum(dim=1, keepdim=True) - rewards) / (size - 1)


def turn_advantages(rewards: Tensor, *, gamma: float = 1.0, scale: str = "group") -> Tensor:
    """Return group advantages [G, T] of the discounted rewards from each of T turns on.

    `scale` works as for a group.

    Raises:
        ConfigError: the group has fewer than 2 samples.
    """
    to_go = rewards.clone()
    for turn in range(rewards.shape[1] - 2, -1, -1):
        to_go[:, turn] += gamma * to_go[:, turn + 1]
    return group_advantages(to_go.T, scale=scale).T


def _require_groups(size: int) -> None:
    if size < 2:
        raise ConfigError(f"a group of {size} sample has no advantages; draw at least 2 samples of a prompt")


def clipped_policy_losses(
    logprobs: Tensor, old: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """Return elementwise policy losses with ratios clipped to [1 - clip_low, 1 + clip_high] (1707.06347)."""
    ratio = torch.exp(logprobs - old)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def clipped_value_losses(values: Tensor, old: Tensor, returns: Tensor, *, clip: float) -> Tensor:
    """Return half the larger squared error of values and clipped values, elementwise."""
    clipped = torch.minimum(torch.maximum(values, old - clip), old + clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def edge_weights(edge_sequence: Tensor, how: str, *, max_length: int | None = None) -> tuple[Tensor, int]:
    """Return the weights of edges and the number that their weighted sum is divided by.

    Args:
        edge_sequence: [E] index of each edge's sequence.
        how: `token` (mean over edges), `sequence` (mean over sequences of their means) or `constant` (each sum over
            `max_length`, then the mean over sequences).
        max_length: tokens of the longest answer, for `constant`.

    Returns:
        Weights [E] and the denominator.

    Raises:
        ConfigError: `how` is unknown, or `constant` has no positive length.
    """
    ones = torch.ones(len(edge_sequence), device=edge_sequence.device)
    counts = torch.bincount(edge_sequence)
    num_sequences = int((counts > 0).sum())
    if how == "constant" and not (max_length and max_length > 0):
        raise ConfigError(f"weights by a constant length need a max_length above 0, got {max_length}")
    choices = {
        "token": lambda: (ones, len(edge_sequence)),
        "sequence": lambda: (ones / counts[edge_sequence], num_sequences),
        "constant": lambda: (ones / (max_length or 1), num_sequences),
    }
    return lookup(choices, how, "aggregation")()
