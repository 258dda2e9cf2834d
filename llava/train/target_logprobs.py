"""Log-probabilities of targets, computed in the memory of logits that are not used afterwards.

    logits [M, V] --some rows at a time--> log-probabilities [M], entropies [M]
    gradient [M]  --some rows at a time--> gradient [M, V], in the memory of the logits

The logits of a preference or policy step are its largest tensor. `F.cross_entropy` would hold four of that size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CPU_VALUES, DEVICE_VALUES = 1 << 19, 1 << 26
"""Logits computed at a time: 2 MiB of float32 stay in the cache of a CPU, and a device needs more to be busy."""


def consumed_logprobs(
    logits: Tensor, targets: Tensor, *, without: int | None = None, temperature: float = 1.0
) -> Tensor:
    """Return the log-probabilities [M] of target ids [M]: float64 of float64, else float32.

    The backward pass writes the gradient over the logits, so it runs once, and the caller must not use them afterwards.

    Args:
        logits: [M, V].
        targets: [M] ids.
        without: id of a token that has probability 0, or None.
        temperature: divisor of the logits.
    """
    logprobs: Tensor = _ConsumedLogprobs.apply(logits, targets, without, temperature, False)[0]  # type: ignore[no-untyped-call]
    return logprobs


def consumed_logprobs_and_entropies(
    logits: Tensor, targets: Tensor, *, without: int | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return what `consumed_logprobs` returns, and the distributions' entropies [M] without a gradient."""
    logprobs, entropies = _ConsumedLogprobs.apply(logits, targets, without, temperature, True)  # type: ignore[no-untyped-call]
    return logprobs, entropies


class _ConsumedLogprobs(torch.autograd.Function):
    """Function of both; its graph holds the logits and one normalizer for each row."""

    @staticmethod
    def forward(  # noqa: PLR0917  # torch passes values by position
        ctx: Any, logits: Tensor, targets: Tensor, without: int | None, temperature: float, measures_entropies: bool
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(logits.dtype, torch.float32)
        normalizers = torch.empty(len(logits), dtype=wide, device=logits.device)
        picked = torch.empty_like(normalizers)
        entropies = torch.empty_like(normalizers if measures_entropies else normalizers[:0])
        for rows in _chunks(logits):
            values = _values(logits[rows], wide, without, temperature)
            picked[rows] = values.gather(1, targets[rows, None])[:, 0]
            if measures_entropies:
                normalizers[rows], entropies[rows] = _normalizers_and_entropies(values)
            else:
                torch.logsumexp(values, dim=-1, out=normalizers[rows])
        # Not with `save_for_backward`: the backward pass changes the logits, which autograd would report as an error.
        ctx.logits, ctx.without, ctx.temperature = logits.detach(), without, temperature
        ctx.save_for_backward(targets, normalizers)
        ctx.mark_non_differentiable(entropies)
        return picked - normalizers, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        if ctx.logits is None:
            raise RuntimeError("the logits of this loss were consumed by an earlier backward pass; compute it again")
        logits, ctx.logits = ctx.logits, None
        targets, normalizers = ctx.saved_tensors
        gradient = gradient / ctx.temperature
        for rows in _chunks(logits):
            part = logits[rows]
            values = _values(part, normalizers.dtype, ctx.without, ctx.temperature)
            values.sub_(normalizers[rows, None]).exp_().mul_(-gradient[rows, None])
            values.scatter_add_(1, targets[rows, None], gradient[rows, None])
            if values is not part:
                part.copy_(values)
        return logits, None, None, None, None


def _chunks(logits: Tensor) -> Iterator[slice]:
    """Yield slices of rows that together hold about `CPU_VALUES` or `DEVICE_VALUES` logits."""
    num_values = CPU_VALUES if logits.device.type == "cpu" else DEVICE_VALUES
    size = max(num_values // max(logits.shape[-1], 1), 1)
    for start in range(0, len(logits), size):
        yield slice(start, start + size)


def _values(logits: Tensor, dtype: torch.dtype, without: int | None, temperature: float) -> Tensor:
    """Return rows converted and divided, with zero-probability tokens allowed; a copy if anything changes."""
    values = logits.to(dtype)
    if temperature != 1.0:
        values = values / temperature
    if without is None:
        return values
    return values.index_fill(-1, torch.tensor(without, device=logits.device), float("-inf"))


def _normalizers_and_entropies(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return logsumexp and entropy of each row, from one pass of exponentials."""
    largest = values.amax(dim=-1)
    scores = values - largest[:, None]
    shares = scores.exp()
    total = shares.sum(dim=-1)
    # A token of probability 0 adds nothing; its infinite score would make the product NaN.
    mean = torch.linalg.vecdot(shares, scores.clamp_(min=torch.finfo(scores.dtype).min)) / total
    return largest + total.log(), total.log() - mean
