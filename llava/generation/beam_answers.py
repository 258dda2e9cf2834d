"""A beam search on a runner: the prompt is read once, its beams share what it holds."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from llava.data.encode import Encoded
from llava.generation.beam_search import BeamSearch, Ended
from llava.generation.protocol import Completion
from llava.generation.runners import Runner
from llava.generation.stopping import AnswerText


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
