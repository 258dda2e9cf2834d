"""Choice of the next token of each sequence: greedy, or sampled with its own random generator.

Every request draws one number per token from its own random stream, so an answer depends on its seed alone, not on
the rest of the batch.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

from llava.generation.protocol import Sampling


class TokenDraw:
    """Sampling parameters and random stream of one sequence."""

    __slots__ = ("generator", "temperature", "top_k", "top_p")

    def __init__(self, sampling: Sampling, sample_index: int = 0) -> None:
        """Open the random stream of sample number `sample_index` of a request."""
        self.temperature = sampling.temperature
        self.top_p = sampling.top_p
        self.top_k = sampling.top_k
        self.generator = None if self.is_greedy else _generator(sampling.seed, sample_index)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0.0

    @property
    def truncates(self) -> bool:
        """Whether unlikely tokens are never drawn."""
        return self.top_p < 1.0 or self.top_k > 0

    def number(self) -> float:
        """Return the next number in [0, 1)."""
        return float(torch.rand((), generator=self.generator, dtype=torch.float64))


def _generator(seed: int | None, sample_index: int) -> torch.Generator:
    """Return the generator of one sample; adjacent values give unrelated streams."""
    root = secrets.randbits(63) if seed is None else seed
    digest = hashlib.sha256(f"{root}/{sample_index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def choose_tokens(logits: Tensor, draws: Sequence[TokenDraw]) -> list[int]:
    """Return the next token of each sequence.

    Args:
        logits: [B, V].
        draws: one for each row.
    """
    if all(draw.is_greedy for draw in draws):
        return _as_ids(_likeliest(logits))
    ways = (_greedy, _sample, _sample_truncated)
    rows_by_way: list[list[int]] = [[] for _ in ways]
    for row, draw in enumerate(draws):
        rows_by_way[0 if draw.is_greedy else 2 if draw.truncates else 1].append(row)
    ids = [0] * len(draws)
    # The way of a row depends on its own settings only, so that other rows do not change its answer.
    for way, rows in zip(ways, rows_by_way, strict=True):
        if rows:
            chosen = way(logits[torch.tensor(rows, device=logits.device)], [draws[row] for row in rows])
            for row, token in zip(rows, _as_ids(chosen), strict=True):
                ids[row] = token
    return ids


def _as_ids(tokens: Tensor) -> list[int]:
    ids: list[int] = tokens.tolist()
    return ids


def _column(values: Sequence[float], logits: Tensor) -> Tensor:
    return torch.tensor(values, dtype=logits.dtype, device=logits.device)[:, None]


def _likeliest(logits: Tensor) -> Tensor:
    """Return the index [B] of the largest logit of each row, the first of equal ones."""
    # On the CPU, numpy is ten times faster than torch.
    if logits.device.type == "cpu" and logits.dtype == torch.float32 and not logits.requires_grad:
        return torch.from_numpy(logits.numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


def _greedy(logits: Tensor, draws: Sequence[TokenDraw]) -> Tensor:
    return _likeliest(logits)


def _probabilities(logits: Tensor, draws: Sequence[TokenDraw]) -> Tensor:
    scores = logits.float()
    return torch.softmax(scores / _column([draw.temperature for draw in draws], scores), dim=-1)


def _sample(logits: Tensor, draws: Sequence[TokenDraw]) -> Tensor:
    return _invert(_probabilities(logits, draws), draws)[:, 0]


def _sample_truncated(logits: Tensor, draws: Sequence[TokenDraw]) -> Tensor:
    probabilities, order = _probabilities(logits, draws).sort(dim=-1, descending=True, stable=True)
    return order.gather(1, _invert(_truncated(probabilities, draws), draws))[:, 0]


def _truncated(probabilities: Tensor, draws: Sequence[TokenDraw]) -> Tensor:
    """Zero all of each sorted row [B, V] but the likeliest `top_k`, then the fewest that reach `top_p`."""
    vocabulary = probabilities.shape[1]
    ranks = torch.arange(vocabulary, device=probabilities.device)[None]
    limits = _column([draw.top_k or vocabulary for draw in draws], probabilities)
    kept = torch.where(ranks < limits, probabilities, 0.0)
    # The share is taken of what top_k keeps, as in the usual chain of filters.
    before = kept.cumsum(dim=-1) - kept
    wanted = _column([draw.top_p for draw in draws], probabilities) * kept.sum(dim=-1, keepdim=True)
    is_whole = _column([float(draw.top_p >= 1.0) for draw in draws], probabilities) > 0
    return torch.where((before < wanted) | is_whole, kept, 0.0)


def _invert(probabilities: Tensor, draws: Sequence[TokenDraw]) -> Tensor:
    """Return the index [B, 1] where each row's cumulative share passes its next random number."""
    numbers = torch.tensor([draw.number() for draw in draws], dtype=torch.float64, device=probabilities.device)
    cumulative = probabilities.double().cumsum(dim=-1)
    index = torch.searchsorted(cumulative, numbers[:, None] * cumulative[:, -1:], right=True)
    # Rounding may pass the last token that has any probability.
    last = (probabilities > 0).int().cumsum(dim=-1).argmax(dim=-1, keepdim=True)
    return torch.minimum(index, last)


def logprobs_of(logits: Tensor, token_ids: Sequence[int]) -> list[float]:
    """Return the log-probability of one token of each row of logits [B, V], at temperature 1."""
    scores = logits.float()
    chosen = scores.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0]
    values: list[float] = (chosen - scores.logsumexp(dim=-1)).tolist()
    return values
