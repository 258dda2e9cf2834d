"""Beam search for one prompt with the steps of transformers' `generate`, and the repetition penalty.

logits [K, V] --log-softmax, penalty--> + score of each beam --best 2K--> ended: kept by score / length
                                                                      +--> the best K others continue
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.data.encode import Encoded
from llava.generation.protocol import Completion
from llava.generation.runners import Runner
from llava.generation.sampling import without
from llava.generation.stopping import AnswerText


@dataclass(frozen=True, slots=True)
class Beam:
    """Unfinished sequence of a beam search.

    Attributes:
        token_ids: its tokens, without the prompt.
        score: sum of their (penalized) log-probabilities.
        logprobs: log-probability of each token, without penalty.
    """

    token_ids: tuple[int, ...] = ()
    score: float = 0.0
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """Finished sequence; `value` is its score divided by its length."""

    beam: Beam
    value: float
    has_stopped: bool


class BeamSearch:
    """State of a beam search for one prompt."""

    def __init__(
        self,
        num_beams: int,
        *,
        limit: int,
        has_ended: Callable[[Sequence[int]], bool],
        num_end_tokens: int = 1,
        repetition_penalty: float = 1.0,
        num_counted: int = 0,
        never: Sequence[int] = (),
    ) -> None:
        """Start with one empty beam.

        Args:
            num_beams: K.
            limit: largest number of tokens of an answer.
            has_ended: whether the last of these tokens ends an answer.
            num_end_tokens: number of tokens that may end it; each beam keeps this many more candidates.
            repetition_penalty: see `penalized`.
            num_counted: tokens that the division by the length counts in addition to those of the answer. To score as
                transformers before 4.36, which counted the prompt but not the token that ends an answer, pass the
                length of the prompt.
            never: ids that no beam may contain.
        """
        self.num_beams = num_beams
        self.limit = limit
        self.has_ended = has_ended
        self.num_candidates = max(2, 1 + num_end_tokens) * num_beams
        self.repetition_penalty = repetition_penalty
        self.num_counted = num_counted
        self.never = tuple(never)
        self.running = [Beam()]
        self.ended: list[Ended] = []
        self.is_over = False

    def step(self, logits: Tensor) -> list[int]:
        """Append the next token to every beam.

        Args:
            logits: [B, V] of the running beams; B is 1 at first, then K.

        Returns:
            For each running beam, the index of the beam that it continues; its newest token is the last of
            `running[i].token_ids`.
        """
        log_probs = logits.float().log_softmax(dim=-1)
        scores = penalize_repeats(log_probs, [beam.token_ids for beam in self.running], self.repetition_penalty)
        scores = without(scores, self.never)
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
        """Return the length by which a score is divided."""
        return len(beam.token_ids) + (self.num_counted - stops if self.num_counted else 0)

    def _could_improve(self) -> bool:
        """Return whether the best running beam, at its present length, beats the worst of K finished ones."""
        if len(self.ended) < self.num_beams:
            return True
        beam = self.running[0]
        return beam.score / max(self._length(beam, stops=False), 1) > self.ended[-1].value


def penalize_repeats(scores: Tensor, token_ids: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Return scores in which tokens that a sequence has already used are less likely.

    Args:
        scores: [B, V] logits or log-probabilities.
        token_ids: for each sequence, the tokens of its answer so far.
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
    """Run a beam search until it is over.

    Args:
        search: a fresh search.
        runner: a runner without running sequences and with room for all beams.
        prompt: the encoded prompt.
        images: pixels by image key, as the processor returns them.
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
    """Return a finished beam as a completion."""
    ids = ended.beam.token_ids
    known = ended.beam.logprobs if logprobs else None
    return Completion(text.final(ids), ids, "stop" if ended.has_stopped else "length", None, known)
