"""Next token of each request, with the log-probabilities that it asks for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from llava.generation.beam_search import penalize_repeats
from llava.generation.request import Request
from llava.generation.sampling import choose_tokens, likeliest_of, logprobs_of


def chosen_tokens(requests: Sequence[Request], logits: Tensor, *, never: Sequence[int]) -> list[int]:
    """Choose each request's next token and record its log-probability, without appending the token.

    Args:
        requests: B unfinished requests.
        logits: [B, V].
        never: ids that are not chosen.
    """
    draws = [request.draw for request in requests]
    token_ids = choose_tokens(_penalized(requests, logits), draws, never=never)
    plain = [row for row, request in enumerate(requests) if request.sampling.logprobs and not request.is_dialogue]
    drawn = [row for row, request in enumerate(requests) if request.is_dialogue and not _is_penalized(request)]
    for rows, temperatures in ((plain, None), (drawn, [draws[row].temperature or 1.0 for row in drawn])):
        if rows:
            found = logprobs_of(logits, token_ids, rows, temperatures=temperatures, never=never)
            for row, logprob in zip(rows, found, strict=True):
                requests[row].logprobs.append(logprob)
    ranked = [row for row in plain if requests[row].sampling.top_logprobs]
    if ranked:
        nums = [requests[row].sampling.top_logprobs for row in ranked]
        for row, alternatives in zip(ranked, likeliest_of(logits, ranked, nums), strict=True):
            requests[row].top_logprobs.append(alternatives)
    return token_ids


def _penalized(requests: Sequence[Request], logits: Tensor) -> Tensor:
    """Return the logits with each request's repetition penalty."""
    rows = [row for row, request in enumerate(requests) if _is_penalized(request)]
    if not rows:
        return logits
    changed = logits.clone()
    for row in rows:
        penalty = requests[row].sampling.repetition_penalty
        changed[row : row + 1] = penalize_repeats(logits[row : row + 1], [requests[row].token_ids], penalty)
    return changed


def _is_penalized(request: Request) -> bool:
    return request.sampling.repetition_penalty != 1.0
