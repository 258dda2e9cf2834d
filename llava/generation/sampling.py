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

from llava.generation.protocol import Alternatives, Sampling

LEAST_TEMPERATURE = 1e-6


class TokenDraw:
    """Sampling parameters and random stream of one sequence."""

    __slots__ = ("generator", "temperature", "top_k", "top_p")

    def __init__(self, sampling: Sampling, sample_index: int = 0, *, num_drawn: int = 0) -> None:
        """Open the random stream of sample `sample_index` of a request, advanced by `num_drawn` tokens."""
        # Smaller ones are greedy within the precision of logits, and dividing by them may overflow.
        self.temperature = sampling.temperature if sampling.temperature >= LEAST_TEMPERATURE else 0.0
        self.top_p = sampling.top_p
        self.top_k = sampling.top_k
        self.generator = None if self.is_greedy else _generator(sampling.seed, sample_index)
        for _ in range(0 if self.is_greedy else num_drawn):
            self.number()

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


def choose_tokens(logits: Tensor, draws: Sequence[TokenDraw], *, never: Sequence[int] = ()) -> list[int]:
    """Return the next token of each sequence.

    Args:
        logits: [B, V].
        draws: one for each row.
        never: ids that are not chosen.
    """
    if all(draw.is_greedy for draw in draws):
        return _as_ids(_greedy(logits, draws, never))
    ways = (_greedy, _sample, _sample_truncated)
    rows_by_way: list[list[int]] = [[] for _ in ways]
    for row, draw in enumerate(draws):
        rows_by_way[0 if draw.is_greedy else 2 if draw.truncates else 1].append(row)
    ids = [0] * len(draws)
    # How a row is sampled depends on its own settings only, so that other rows do not change its answer.
    for way, rows in zip(ways, rows_by_way, strict=True):
        if rows:
            own = logits if len(rows) == len(draws) else logits[torch.tensor(rows, device=logits.device)]
            chosen = way(own, [draws[row] for row in rows], never)
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


def _greedy(logits: Tensor, draws: Sequence[TokenDraw], never: Sequence[int]) -> Tensor:
    chosen = _likeliest(logits)
    if never and any(token in never for token in _as_ids(chosen)):  # rare, so no copy is made for every token
        return _likeliest(without(logits, never))
    return chosen


def without(scores: Tensor, never: Sequence[int]) -> Tensor:
    """Return scores [B, V] in which some ids are impossible."""
    ids = [token for token in never if token < scores.shape[1]]
    return scores.index_fill(1, torch.tensor(ids, device=scores.device), -torch.inf) if ids else scores


def _probabilities(logits: Tensor, draws: Sequence[TokenDraw], never: Sequence[int]) -> Tensor:
    scores = without(logits.float(), never)
    return torch.softmax(_divided(scores, [draw.temperature for draw in draws]), dim=-1)


def _divided(scores: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Return scores [B, V] divided by a temperature for each row."""
    if all(temperature == 1.0 for temperature in temperatures):
        return scores  # division by 1 would copy all of them
    return scores / _column(temperatures, scores)


def _sample(logits: Tensor, draws: Sequence[TokenDraw], never: Sequence[int]) -> Tensor:
    return _invert(_probabilities(logits, draws, never), draws)[:, 0]


def _sample_truncated(logits: Tensor, draws: Sequence[TokenDraw], never: Sequence[int]) -> Tensor:
    probabilities, order = _sorted(_probabilities(logits, draws, never), [draw.top_k for draw in draws])
    return order.gather(1, _invert(_truncated(probabilities, draws), draws))[:, 0]


def _sorted(probabilities: Tensor, top_k: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return each row [B, V] sorted descending (ties by index) and the indices, as far as sampled."""
    num = max(top_k) if min(top_k) > 0 else probabilities.shape[1]
    if num < probabilities.shape[1]:
        # Sorting the whole vocabulary for every token would take longer than the model; `topk` leaves ties open.
        indices = probabilities.topk(num, dim=-1, sorted=False).indices.sort(dim=-1).values
        values, places = probabilities.gather(1, indices).sort(dim=-1, descending=True, stable=True)
        if not bool(((probabilities >= values[:, -1:]).sum(dim=-1) > num).any()):
            return values, indices.gather(1, places)
    found = probabilities.sort(dim=-1, descending=True, stable=True)
    return found.values, found.indices


def _truncated(probabilities: Tensor, draws: Sequence[TokenDraw]) -> Tensor:
    """Zero all of each sorted row [B, V] but the likeliest `top_k`, then the fewest that reach `top_p`."""
    vocabulary = probabilities.shape[1]
    ranks = torch.arange(vocabulary, device=probabilities.device)[None]
    limits = _column([draw.top_k or vocabulary for draw in draws], probabilities)
    kept = torch.where(ranks < limits, probabilities, 0.0)
    # The share is taken of what top_k keeps, as in the usual chain of filters.
    before = kept.cumsum(dim=-1) - kept
    # Not `sum`, whose rounding depends on the width of the row.
    wanted = _column([draw.top_p for draw in draws], probabilities) * kept.cumsum(dim=-1)[:, -1:]
    is_whole = _column([float(draw.top_p >= 1.0) for draw in draws], probabilities) > 0
    return torch.where((before < wanted) | is_whole, kept, 0.0)


def _invert(probabilities: Tensor, draws: Sequence[TokenDraw]) -> Tensor:
    """Return the index [B, 1] where each row's cumulative share passes its next random number."""
    numbers = torch.tensor([draw.number() for draw in draws], dtype=torch.float64, device=probabilities.device)
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    index = torch.searchsorted(cumulative, numbers[:, None] * cumulative[:, -1:], right=True)
    if index.max() == probabilities.shape[1]:  # rounding passed the last token that has any probability
        last = (probabilities > 0).int().cumsum(dim=-1).argmax(dim=-1, keepdim=True)
        index = torch.minimum(index, last)
    return index


def logprobs_of(
    logits: Tensor,
    token_ids: Sequence[int],
    rows: Sequence[int] | None = None,
    *,
    temperatures: Sequence[float] | None = None,
    never: Sequence[int] = (),
) -> list[float]:
    """Return the log-probability of the token of each row.

    Args:
        logits: [B, V].
        token_ids: B tokens.
        rows: rows to report; None for all.
        temperatures: one for each reported row: the distribution is then the one that is sampled from without
            truncation, with these temperatures and without the ids `never`; None for that of the model.
    """
    chosen = torch.tensor(token_ids, device=logits.device)
    if rows is not None and len(rows) < len(token_ids):
        at = torch.tensor(rows, device=logits.device)
        logits, chosen = logits[at], chosen[at]
    scores = logits.float()
    if temperatures is not None:
        scores = _divided(without(scores, never), temperatures)
    values: list[float] = (scores.gather(1, chosen[:, None])[:, 0] - scores.logsumexp(dim=-1)).tolist()
    return values


def likeliest_of(logits: Tensor, rows: Sequence[int], nums: Sequence[int]) -> list[Alternatives]:
    """Return the `nums` most likely tokens of each row of logits [B, V], most likely first."""
    scores = logits[torch.tensor(rows, device=logits.device)].float().log_softmax(dim=-1)
    best = scores.topk(min(max(nums), scores.shape[1]))
    pairs = zip(best.indices.tolist(), best.values.tolist(), nums, strict=True)
    return [tuple(zip(ids[:num], values[:num], strict=True)) for ids, values, num in pairs]
