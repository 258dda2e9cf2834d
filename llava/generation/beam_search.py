"""Beam search for one prompt, step by step as transformers' `generate` does it, and the repetition penalty.

logits [K, V] --log-softmax, penalty--> + score of each beam --best 2K--> ended: kept by score / length
                                                                      +--> the best K others go on
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.data.encode import Encoded
from llava.generation.protocol import Completion
from llava.generation.runners import Runner
from llava.generation.stopping import AnswerText


@dataclass(frozen=True, slots=True)
class Beam:
    """A sequence on its way.

    Attributes:
        token_ids: its tokens, without the prompt.
        score: sum of their (penalised) log-probabilities.
        logprobs: of each token, not penalised.
    """

    token_ids: tuple[int, ...] = ()
    score: float = 0.0
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """A finished sequence; `value` is its score divided by its length."""

    beam: Beam
    value: float
    has_stopped: bool


class BeamSearch:
    """The beams of one prompt."""

    def __init__(
        self,
        num_beams: int,
        *,
        limit: int,
        has_ended: Callable[[Sequence[int]], bool],
        num_end_tokens: int = 1,
        repetition_penalty: float = 1.0,
        num_counted: int = 0,
    ) -> None:
        """Start with one empty beam.

        Args:
            num_beams: K.
            limit: most tokens of an answer.
            has_ended: whether the last of these tokens ends an answer.
            num_end_tokens: tokens that may end it; so many more candidates are looked at for each beam.
            repetition_penalty: see `penalized`.
            num_counted: tokens that the division by the length counts besides the answer's. transformers before 4.36
                counted the prompt, and not the token that ends an answer: give the prompt's length there.
        """
        self.num_beams = num_beams
        self.limit = limit
        self.has_ended = has_ended
        self.num_candidates = max(2, 1 + num_end_tokens) * num_beams
        self.repetition_penalty = repetition_penalty
        self.num_counted = num_counted
        self.running = [Beam()]
        self.ended: list[Ended] = []
        self.is_over = False

    def step(self, logits: Tensor) -> list[int]:
        """Take the next token of every beam.

        Args:
            logits: [B, V] of the running beams: one at first, K from then on.

        Returns:
            For each beam that now runs, the number of the beam that it continues; its newest token is the last of
            `running[i].token_ids`.
        """
        log_probs = logits.float().log_softmax(dim=-1)
        scores = penalized(log_probs, [beam.token_ids for beam in self.running], self.repetition_penalty)
        totals = (scores + scores.new_tensor([beam.score for beam in self.running])[:, None]).flatten()
        best = totals.topk(min(self.num_candidates, len(totals)))
        going: list[tuple[int, Beam]] = []
        could_improve = self._could_improve()
        for rank, (total, index) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            parent, token = divmod(index, logits.shape[1])
            old = self.running[parent]
            logprobs = (*old.logprobs, float(log_probs[parent, token]))
            beam = Beam((*old.token_ids, token), total, logprobs)
            stops = self.has_ended(beam.token_ids)
            if not stops and len(beam.token_ids) < self.limit:
                going.append((parent, beam))
            elif rank < self.num_beams and could_improve:
                self.ended.append(Ended(beam, total / self._length(beam, stops), stops))
        self.ended = sorted(self.ended, key=lambda ended: -ended.value)[: self.num_beams]
        going = going[: self.num_beams]
        self.running = [beam for _, beam in going]
        self.is_over = not going or not self._could_improve()
        return [parent for parent, _ in going]

    def _length(self, beam: Beam, stops: bool) -> int:
        """What a score is divided by."""
        return len(beam.token_ids) + (self.num_counted - stops if self.num_counted else 0)

    def _could_improve(self) -> bool:
        """Whether the best running beam, as long as it is now, is better than the worst of K finished ones."""
        if len(self.ended) < self.num_beams:
            return True
        beam = self.running[0]
        return beam.score / max(self._length(beam, stops=False), 1) > self.ended[-1].value


def penalized(scores: Tensor, token_ids: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Make tokens that a sequence has already used less likely.

    Args:
        scores: [B, V] logits or log-probabilities.
        token_ids: of each sequence, the tokens of its answer so far.
        penalty: divides positive scores and multiplies negative ones; 1 changes nothing.
    """
    if penalty == 1.0 or not any(token_ids):
        return scores
    changed = scores.clone()
    for row, used in enumerate(token_ids):
        places = torch.tensor(sorted(set(used)), dtype=torch.long, device=scores.device)
        values = scores[row, places]
        changed[row, places] = torch.where(values < 0, values * penalty, values / penalty)
    return changed


def run_beams(search: BeamSearch, runner: Runner, prompt: Encoded, images: Mapping[str, Tensor]) -> None:
    """Search until it is over.

    Args:
        search: a fresh search.
        runner: without running sequences; it has room for all beams.
        prompt: what is answered.
        images: pictures by key, as the processor makes them.
    """
    row, num_running = runner.prefill([prompt] * search.num_beams, images), search.num_beams
    runner.join(row, range(num_running))
    parents = search.step(row.logits[:1])
    while not search.is_over:
        runner.rearrange(parents)
        while num_running > len(search.running):  # many may end at once
            num_running -= 1
            runner.leave(num_running)
        parents = search.step(runner.decode([beam.token_ids[-1] for beam in search.running]))


def answer_of(ended: Ended, text: AnswerText, *, logprobs: bool) -> Completion:
    """A finished beam as an answer."""
    ids = ended.beam.token_ids
    known = ended.beam.logprobs if logprobs else None
    return Completion(text.final(ids), ids, "stop" if ended.has_stopped else "length", None, known)
