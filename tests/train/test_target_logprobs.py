"""Log-probabilities that consume their logits: equal to `F.cross_entropy` and to torch's distributions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llava.train import target_logprobs
from llava.train.losses import without_token
from llava.train.target_logprobs import consumed_logprobs, consumed_logprobs_and_entropies

VOCABULARY = 11


@pytest.mark.parametrize("num_rows", [0, 1, 7])
@pytest.mark.parametrize("without", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_cross_entropy(
    num_rows: int, without: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_logprobs, "CPU_VALUES", 3 * VOCABULARY)  # chunks of three rows, the last shorter
    torch.manual_seed(0)
    hidden = torch.randn(num_rows, 5, dtype=dtype, requires_grad=True)
    head = torch.randn(5, VOCABULARY, dtype=dtype, requires_grad=True)
    targets = torch.tensor([0, 1, 2, 4, 5, 6, 10])[:num_rows]
    weights = torch.randn(num_rows, dtype=torch.promote_types(dtype, torch.float32))
    found = consumed_logprobs(hidden @ head, targets, without=without)
    wide = torch.promote_types(dtype, torch.float32)
    expected = -F.cross_entropy(without_token((hidden @ head).to(wide), without), targets, reduction="none")
    assert found.dtype == wide
    torch.testing.assert_close(found, expected, rtol=0, atol={torch.float64: 1e-13}.get(dtype, 2e-5))
    gradients = [torch.autograd.grad((values * weights).sum(), (hidden, head)) for values in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_second_backward_pass_is_refused() -> None:
    loss = consumed_logprobs(torch.randn(2, 4, requires_grad=True) * 1, torch.tensor([0, 1])).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="consumed by an earlier backward pass"):
        loss.backward()


def test_impossible_and_certain_tokens_are_finite() -> None:
    logits = torch.tensor([[0.0, 600.0], [600.0, 0.0]], requires_grad=True)
    found = consumed_logprobs(logits * 1, torch.tensor([0, 0]))
    found.sum().backward()
    assert found.tolist() == [-600.0, 0.0]
    assert logits.grad is not None and torch.equal(logits.grad, torch.tensor([[1.0, -1.0], [0.0, 0.0]]))


def of_distribution(
    logits: Tensor, targets: Tensor, *, without: int | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the same from `torch.distributions`, over the other tokens."""
    kept = [token for token in range(logits.shape[1]) if token != without]
    found = torch.distributions.Categorical(logits=logits[:, kept] / temperature)
    return found.log_prob(torch.tensor([kept.index(token) for token in targets.tolist()])), found.entropy()


@pytest.mark.parametrize("values", [1, 2**19], ids=["a row at a time", "at once"])
@pytest.mark.parametrize(("without", "temperature"), [(None, 1.0), (3, 1.0), (3, 0.7), (None, 2.0)])
def test_values_and_gradients(
    monkeypatch: pytest.MonkeyPatch, values: int, without: int | None, temperature: float
) -> None:
    monkeypatch.setattr(target_logprobs, "CPU_VALUES", values)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 11, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 1, 2, 4, 5, 10, 4])
    weights = torch.randn(7, generator=generator, dtype=torch.float64)
    grads = []
    settings: dict[str, Any] = {"without": without, "temperature": temperature}
    for compute in (consumed_logprobs_and_entropies, of_distribution):
        logprobs, entropies = compute(logits * 1, targets, **settings)
        (logprobs * weights).sum().backward()
        assert logits.grad is not None
        grads.append((logprobs.detach(), entropies.detach(), logits.grad))
        logits.grad = None
    for own, other in zip(*grads, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-12)


def test_half_precision_is_computed_in_float32() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    logprobs, entropies = consumed_logprobs_and_entropies(
        logits * 1, torch.tensor([1, 2, 3]), without=None, temperature=1.0
    )
    wide = of_distribution(logits.detach().float(), torch.tensor([1, 2, 3]), without=None, temperature=1.0)
    torch.testing.assert_close((logprobs.detach(), entropies), wide)
    logprobs.sum().backward()
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16


def test_a_token_that_is_never_sampled() -> None:
    logprobs, entropies = consumed_logprobs_and_entropies(
        torch.zeros(2, 4), torch.tensor([2, 0]), without=2, temperature=1.0
    )
    assert logprobs.tolist() == [-math.inf, pytest.approx(-math.log(3))]
    assert entropies.tolist() == pytest.approx([math.log(3)] * 2)


def test_nothing_to_compute() -> None:
    logits = torch.zeros(0, 4, requires_grad=True)
    logprobs, _ = consumed_logprobs_and_entropies(
        logits * 1, torch.zeros(0, dtype=torch.long), without=2, temperature=1.0
    )
    logprobs.sum().backward()
    assert logits.grad is not None and logits.grad.shape == (0, 4)
