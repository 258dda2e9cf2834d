"""Continuous batching: prompts are prefilled together and hold a slot until their answer ends.

    waiting --prefill (one flat row)--> ready --join (a free slot)--> running --decode ... --> done

A row may hold more prompts than free slots, so the questions about one image are prefilled together; its keys and
values stay in the row, shared parts once, until its last prompt has a slot.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX
from llava.data.encode import Encoded
from llava.errors import LlavaError
from llava.generation.beam_search import penalize_repeats
from llava.generation.prompt_encoder import EncodedPrompt, PromptReader
from llava.generation.protocol import Completion, Finish, Prompt, Sampling
from llava.generation.runners import Runner
from llava.generation.sampling import TokenDraw, choose_tokens, logprobs_of
from llava.generation.stopping import AnswerText

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class PromptSource:
    """Prompt that is encoded when needed, once for all its samples, and released when one of them ends."""

    prompt: Prompt
    reading: EncodedPrompt | None = None


@dataclass(slots=True, eq=False)
class Request:
    """Unfinished answer to a prompt."""

    source: PromptSource
    sampling: Sampling
    draw: TokenDraw
    text: AnswerText
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    encoded: Encoded | None = None
    limit: int = 0
    completion: Completion | None = None
    is_cancelled: bool = False

    @property
    def is_over(self) -> bool:
        """Whether it is completed or cancelled."""
        return self.completion is not None or self.is_cancelled

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and the answer so far."""
        assert self.encoded is not None
        return len(self.encoded.input_ids) + len(self.token_ids)

    def append(self, token_id: int) -> bool:
        """Append the next token; return whether it was the last one."""
        self.token_ids.append(token_id)
        if self.text.has_ended(self.token_ids):
            self._finish("stop")
        elif len(self.token_ids) >= self.limit:
            self._finish("length")
        return self.completion is not None

    def fail(self, reason: str) -> None:
        """Finish with an error."""
        self.source.reading = None
        self.completion = Completion("", tuple(self.token_ids), "error", error=reason)

    def _finish(self, finish: Finish) -> None:
        self.source.reading = None
        logprobs = tuple(self.logprobs) if self.sampling.logprobs else None
        self.completion = Completion(self.text.final(self.token_ids), tuple(self.token_ids), finish, None, logprobs)

    def extended(self) -> Encoded:
        """Return the prompt with the tokens generated so far, for another prefill."""
        assert self.encoded is not None
        if not self.token_ids:
            return self.encoded
        num, ids = len(self.token_ids), tuple(self.token_ids)
        return replace(
            self.encoded,
            input_ids=self.encoded.input_ids + ids,
            labels=self.encoded.labels + (IGNORE_INDEX,) * num,
            turns=self.encoded.turns + (-1,) * num,
        )


@dataclass(slots=True, eq=False)
class Ready:
    """Prefilled request that waits for a slot: sequence `member` of `row`."""

    request: Request
    row: Any
    member: int


class Scheduler:
    """Scheduler that moves requests through a runner; `step` takes one or two forward passes."""

    def __init__(self, runner: Runner, reader: PromptReader, *, max_slots: int, max_prefill_tokens: int) -> None:
        """Run at most `max_slots` sequences; prefill at most `max_prefill_tokens` tokens at a time."""
        self.runner = runner
        self.reader = reader
        self.max_slots = max_slots
        self.max_prefill_tokens = max_prefill_tokens
        self.has_shrunk = False
        self.is_full = False
        self.waiting: deque[Request] = deque()
        self.ready: deque[Ready] = deque()
        self.running: list[Request] = []

    def add(self, requests: Iterable[Request]) -> None:
        """Queue requests; those with the same image should be adjacent."""
        self.waiting.extend(requests)

    def cancel(self, request: Request) -> None:
        """Remove a request and free its slot."""
        request.is_cancelled = True
        if request in self.running:
            self._drop(self.running.index(request))

    def step(self) -> None:
        """Prefill waiting requests if slots are free, start them, and decode one token of each sequence."""
        self._forget_cancelled()
        if self._has_room():
            self._read()
        try:
            self._join()
            self._decode()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if not self._shrink():
                self._give_up_running(error)

    def _has_room(self) -> bool:
        if not self.running:
            self.is_full = False
        elif not self.runner.is_continuous or self.is_full:
            return False
        return not self.ready and len(self.running) < self.max_slots

    def _read(self) -> None:
        """Prefill the next row and take the first token of each of its answers."""
        members, images = self._next_row()
        if not members:
            return
        try:
            row = self.runner.prefill([request.extended() for request in members], images)
        except BaseException as error:
            self.waiting.extendleft(reversed(members))
            if not is_out_of_memory(error):
                raise
            if not self._shrink():
                self._read_less(len(members), error)
            return
        finished = self._take(members, row.logits)
        for member, request in enumerate(members):
            if not finished[member]:
                self.ready.append(Ready(request, row, member))

    def _next_row(self) -> tuple[list[Request], dict[str, Tensor]]:
        """Return the requests to prefill next and their pixels; fail those that cannot be encoded."""
        members: list[Request] = []
        images: dict[str, Tensor] = {}
        shown: set[tuple[str, ...]] = set()
        num_tokens = 0
        most = None if self.runner.is_continuous else self.max_slots
        while self.waiting and (most is None or len(members) < most):
            request = self.waiting[0]
            try:
                reading = self._reading(request)
                pixels = {image.key: self.reader.pixels(image) for image in reading.images if image.key not in images}
            except LlavaError as error:
                self.waiting.popleft().fail(str(error))
                continue
            keys = reading.encoded.images
            # Estimate of what it adds to the row: of images that the row holds already, only the text after them.
            cost = request.num_tokens
            if keys in shown:
                cost -= reading.encoded.image_spans[-1][1]
            if members and num_tokens + cost > self.max_prefill_tokens:
                break
            members.append(self.waiting.popleft())
            images.update(pixels)
            shown.update([keys] if keys else [])
            num_tokens += cost
        return members, images

    def _reading(self, request: Request) -> EncodedPrompt:
        source = request.source
        if source.reading is None:
            source.reading = self.reader.read(source.prompt)
        if request.encoded is None:
            request.encoded = source.reading.encoded
            room = self.reader.max_tokens - len(request.encoded.input_ids)
            request.limit = min(request.sampling.max_new_tokens, room)
        return source.reading

    def _join(self) -> None:
        """Move prefilled sequences to free slots."""
        while self.ready and len(self.running) < self.max_slots:
            row = self.ready[0].row
            free = self.max_slots - len(self.running)
            joining = [ready for ready in list(self.ready)[:free] if ready.row is row]
            for _ in joining:
                self.ready.popleft()
            # Adjacent slots of similar length need less padding.
            joining.sort(key=lambda ready: ready.request.num_tokens)
            try:
                self.runner.join(row, [ready.member for ready in joining])
            except BaseException:
                self.ready.extendleft(reversed(joining))
                raise
            self.running.extend(ready.request for ready in joining)
            if not self.runner.is_continuous:
                return

    def _decode(self) -> None:
        if not self.running:
            return
        logits = self.runner.decode([request.token_ids[-1] for request in self.running])
        finished = self._take(self.running, logits)
        for number in reversed(range(len(finished))):
            if finished[number]:
                self._drop(number)

    def _take(self, requests: list[Request], logits: Tensor) -> list[bool]:
        """Append the next token of each request; return which of them are finished."""
        token_ids = choose_tokens(self._penalized(requests, logits), [request.draw for request in requests])
        if any(request.sampling.logprobs for request in requests):
            for request, logprob in zip(requests, logprobs_of(logits, token_ids), strict=True):
                request.logprobs.append(logprob)
        return [request.append(token_id) for request, token_id in zip(requests, token_ids, strict=True)]

    def _penalized(self, requests: list[Request], logits: Tensor) -> Tensor:
        """Return the logits with each request's repetition penalty."""
        rows = [row for row, request in enumerate(requests) if request.sampling.repetition_penalty != 1.0]
        if not rows:
            return logits
        changed = logits.clone()
        for row in rows:
            penalty = requests[row].sampling.repetition_penalty
            changed[row : row + 1] = penalize_repeats(logits[row : row + 1], [requests[row].token_ids], penalty)
        return changed

    def _drop(self, number: int) -> None:
        self.runner.leave(number)
        self.running[number] = self.running[-1]
        self.running.pop()

    def _forget_cancelled(self) -> None:
        if any(request.is_cancelled for request in self.waiting):
            self.waiting = deque(request for request in self.waiting if not request.is_cancelled)
        if any(ready.request.is_cancelled for ready in self.ready):
            self.ready = deque(ready for ready in self.ready if not ready.request.is_cancelled)

    def _shrink(self) -> bool:
        """Halve the slots after running out of memory; return False if that was done before."""
        if self.has_shrunk:
            return False
        self.has_shrunk = True
        self.max_slots = max(1, self.max_slots // 2)
        self.max_prefill_tokens = max(1, self.max_prefill_tokens // 2)
        logger.warning("out of memory: continuing with at most %d sequences at a time", self.max_slots)
        again = [ready.request for ready in self.ready]
        self.ready.clear()
        while len(self.running) > self.max_slots:
            again.insert(0, self.running[-1])
            self._drop(len(self.running) - 1)
        self.waiting.extendleft(reversed(again))
        self.runner.shrink(self.max_slots)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return True

    def _read_less(self, num_members: int, error: BaseException) -> None:
        """Reduce a prefill that ran out of memory: fewer prompts, then wait for running ones, then fail one."""
        if num_members > 1:
            self.max_prefill_tokens = max(1, self.max_prefill_tokens // 2)
        elif self.running:
            self.is_full = True
        else:
            self.waiting.popleft().fail(_no_memory(error))

    def _give_up_running(self, error: BaseException) -> None:
        for request in (*(ready.request for ready in self.ready), *self.running):
            request.fail(_no_memory(error))
        self.ready.clear()
        while self.running:
            self._drop(len(self.running) - 1)


def _no_memory(error: BaseException) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"out of memory ({reason}); use fewer slots, a shorter prompt or a smaller max_new_tokens"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text
