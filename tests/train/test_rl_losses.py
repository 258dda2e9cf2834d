"""Terms of reinforcement learning against loops in numpy, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from llava.errors import ConfigError
from llava.train import losses

RNG = np.random.default_rng(0)


def doubles(*shape: int) -> Tensor:
    return torch.from_numpy(RNG.normal(size=shape))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.5)])
def test_gae_skips_user_tokens(gamma: float, lam: float) -> None:
    rewards, values = doubles(4, 9), doubles(4, 9)
    mask = torch.from_numpy(RNG.random((4, 9)) < 0.6)
    mask[3] = False
    values[~mask] = float("nan")
    advantages, returns = losses.gae(rewards, values, mask, gamma=gamma, lam=lam)
    expected = np.zeros((4, 9))
    for row in range(4):
        places = [t for t in range(9) if mask[row, t]]
        following, last = 0.0, 0.0
        for t in reversed(places):
            value = values[row, t].item()
            last = rewards[row, t].item() + gamma * following - value + gamma * lam * last
            expected[row, t], following = last, value
    assert advantages.dtype == torch.float64
    np.testing.assert_allclose(advantages.numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(returns.numpy(), np.where(mask, expected + np.nan_to_num(values.numpy()), 0), atol=1e-12)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten(shift_mean: bool) -> None:
    x, mask = doubles(3, 5), torch.from_numpy(RNG.random((3, 5)) < 0.7)
    kept = x.numpy()[mask.numpy()]
    expected = (x.numpy() - kept.mean()) / (kept.std() + 1e-8) + (0 if shift_mean else kept.mean())
    found = losses.whiten(x, mask, shift_mean=shift_mean)
    np.testing.assert_allclose(found.numpy(), np.where(mask, expected, 0), atol=1e-12)


def test_the_score_is_at_the_last_action_token() -> None:
    kl = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0]])
    found = losses.shaped_rewards(torch.tensor([5.0, 7.0], dtype=torch.float64), kl, mask, kl_coef=0.1)
    np.testing.assert_allclose(found.numpy(), [[0, -0.2, 4.7, 0], [0, 0, 0, 0]])


def test_kl_estimates() -> None:
    ours, reference = doubles(6), doubles(6)
    d = (reference - ours).numpy()
    np.testing.assert_allclose(losses.kl_estimate(ours, reference, "k1").numpy(), -d)
    np.testing.assert_allclose(losses.kl_estimate(ours, reference, "k3").numpy(), np.exp(d) - 1 - d)
    assert losses.kl_estimate(ours, reference, "k1").min() < 0
    with pytest.raises(ConfigError, match="k1, k3"):
        losses.kl_estimate(ours, reference, "k2")


def test_group_advantages() -> None:
    rewards = doubles(3, 4)
    r = rewards.numpy()
    centered = r - r.mean(1, keepdims=True)
    found = losses.group_advantages(rewards)
    np.testing.assert_allclose(found.numpy(), centered / (r.std(1, ddof=1, keepdims=True) + 1e-4))
    np.testing.assert_allclose(losses.group_advantages(rewards, scale="none").numpy(), centered)
    assert found.sum(1).abs().max() < 1e-12


def test_leave_one_out_advantages() -> None:
    rewards = doubles(3, 4)
    expected = [[row[i] - np.delete(row, i).mean() for i in range(4)] for row in rewards.numpy()]
    found = losses.leave_one_out_advantages(rewards)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    assert found.sum(1).abs().max() < 1e-12


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_turn_advantages(gamma: float) -> None:
    rewards = doubles(4, 3)
    to_go = np.array(
        [[sum(gamma ** (u - t) * row[u] for u in range(t, 3)) for t in range(3)] for row in rewards.numpy()]
    )
    expected = (to_go - to_go.mean(0)) / (to_go.std(0, ddof=1) + 1e-4)
    np.testing.assert_allclose(losses.turn_advantages(rewards, gamma=gamma).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("function", [losses.group_advantages, losses.leave_one_out_advantages])
def test_one_sample_is_no_group(function: object) -> None:
    with pytest.raises(ConfigError, match="at least 2 samples"):
        function(torch.zeros(3, 1))  # type: ignore[operator]


def test_clipped_policy_losses() -> None:
    new, old, advantages = doubles(50), doubles(50), doubles(50)
    found = losses.clipped_policy_losses(new, old, advantages, clip_low=0.2, clip_high=0.28)
    ratio = np.exp((new - old).numpy())
    expected = -np.minimum(ratio * advantages.numpy(), np.clip(ratio, 0.8, 1.28) * advantages.numpy())
    np.testing.assert_allclose(found.numpy(), expected)


def test_clipped_value_losses() -> None:
    values, old, returns = doubles(50), doubles(50), doubles(50)
    found = losses.clipped_value_losses(values, old, returns, clip=0.2)
    near = np.clip(values.numpy(), old.numpy() - 0.2, old.numpy() + 0.2)
    expected = 0.5 * np.maximum((values - returns).numpy() ** 2, (near - returns.numpy()) ** 2)
    np.testing.assert_allclose(found.numpy(), expected)


@pytest.mark.parametrize(
    ("how", "weights", "count"),
    [("token", [1, 1, 1, 1], 4), ("sequence", [1 / 3, 1 / 3, 1, 1 / 3], 2), ("constant", [0.1] * 4, 2)],
)
def test_edge_weights(how: str, weights: list[float], count: int) -> None:
    found, num_items = losses.edge_weights(torch.tensor([2, 2, 7, 2]), how, max_length=10)
    assert found.tolist() == pytest.approx(weights) and num_items == count


def test_a_constant_needs_its_length() -> None:
    with pytest.raises(ConfigError, match="max_length"):
        losses.edge_weights(torch.tensor([0]), "constant")
