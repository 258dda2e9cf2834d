"""Continuous batching: prompts are prefilled together and hold a slot until their answer ends.

    waiting --prefill (one flat row)--> ready --join (a free slot)--> running --decode ... --> done

A row may hold more prompts than free slots, so the questions about one image are prefilled together; its keys and
values stay in the row, shared parts once, until its last prompt has a slot.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from llava.errors import MemoryLimitError
from llava.generation.failures import beyond_limit, is_lost, is_out_of_memory, named, no_memory, refusal
from llava.generation.prompt_encoder import EncodedPrompt, PromptReader
from llava.generation.request import Ready, Request
from llava.generation.runners import Runner
from llava.generation.slot_memory import answer_limit
from llava.generation.token_choice import chosen_tokens
from llava.model.rope import SharedContext

logger = logging.getLogger(__name__)


class Scheduler:
    """Scheduler that moves requests through a runner; a step is `read` and `decode`."""

    def __init__(
        self,
        runner: Runner,
        reader: PromptReader,
        *,
        max_slots: int,
        max_prefill_tokens: int,
        context: SharedContext | None = None,
        never: Sequence[int] = (),
        max_kv_bytes: int | None = None,
    ) -> None:
        """Create an empty scheduler.

        Args:
            runner: runs the model.
            reader: encodes prompts.
            max_slots: largest number of running sequences.
            max_prefill_tokens: largest number of tokens prefilled at a time.
            context: length up to which sequences may run together; a request that may exceed it runs alone.
            never: ids that are never chosen: the image placeholder, which is no token of a text.
            max_kv_bytes: bytes of keys and values that running sequences may need at their longest; None: no limit.
        """
        self.runner = runner
        self.reader = reader
        self.max_slots = max_slots
        self.max_prefill_tokens = max_prefill_tokens
        self.context = context
        self.never = tuple(never)
        self.max_kv_bytes = max_kv_bytes
        self.has_shrunk = False
        self.is_full = False
        self.waiting: deque[Request] = deque()
        self.ready: deque[Ready] = deque()
        self.running: list[Request] = []
        self.changed: list[Request] = []

    @property
    def has_work(self) -> bool:
        """Whether there is work for a step."""
        return bool(self.waiting or self.ready or self.running)

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of the keys and values of sequences that are read or running."""
        return self.runner.num_bytes

    @property
    def prefix_cache_bytes(self) -> int:
        """Bytes of kept keys and values."""
        return 0

    def held(self) -> list[Request]:
        """Return the requests that are ready or running."""
        return [*self.running, *(ready.request for ready in self.ready)]

    def release_idle(self) -> None:
        """Release the memory of slots if none is in use."""
        if not self.has_work:
            self.runner.reset()

    def add(self, requests: Iterable[Request]) -> None:
        """Queue requests; those with the same image should be adjacent."""
        self.waiting.extend(requests)

    def cancel(self, request: Request) -> None:
        """Remove a request and free its slot."""
        request.cancel()
        if request in self.running:
            self._drop(self.running.index(request))

    def fail_all(self, reason: str, cause: Exception) -> None:
        """End every request with an error and forget all keys and values, which may be incomplete."""
        held = [*self.running, *(ready.request for ready in self.ready), *self.waiting]
        self.running, self.ready, self.waiting = [], deque(), deque()
        self.runner.reset()
        for request in held:
            self._fail(request, reason, cause)

    def read(self) -> None:
        """Run the first half of a step: prefill waiting requests into free slots, choose their first tokens.

        A request that cannot be read or prefilled ends with an error; the others do not notice. `changed` lists the
        requests that got a token or ended; the caller of a step reads and clears it.

        Raises:
            Exception: the model failed in a way that concerns all requests; see `fail_all`.
        """
        self._forget_cancelled()
        self._read_prompts()

    def decode(self) -> None:
        """Take the second half of a step: start what was read, and decode one token of each sequence.

        Raises:
            Exception: as for `read`.
        """
        try:
            self._join()
            self._decode()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if not self._shrink():
                self._give_up_running(error)

    def _read_prompts(self) -> None:
        if self._has_room():
            self._read_row()

    def _has_memory_for(self, request: Request, members: Sequence[Request] = ()) -> bool:
        """Return whether an encoded waiting request fits beside the running ones; fail it if it never can."""
        if self.max_kv_bytes is None:
            return True
        if self._fits([*members, request]):
            return True
        if not (members or self.held()):
            reason = beyond_limit(self._kv_bytes([request]), self.max_kv_bytes)
            self.waiting.remove(request)
            self._fail(request, reason, MemoryLimitError(reason))
        return False

    def _fits(self, requests: Sequence[Request]) -> bool:
        """Return whether encoded requests fit beside those that are held."""
        if self.max_kv_bytes is None:
            return True
        return self._kv_bytes([*self.held(), *requests]) + self._unjoined_bytes() <= self.max_kv_bytes

    def _unjoined_bytes(self) -> int:
        """Return the bytes of prompts that are read and have no slot yet."""
        return 0

    def _kv_bytes(self, requests: Sequence[Request]) -> int:
        """Return the bytes of keys and values that requests need at their longest."""
        return self.runner.bytes_for([(request.encoded, request.limit) for request in requests if request.encoded])

    def _has_room(self) -> bool:
        if not self.running:
            self.is_full = False
        elif not self.runner.is_continuous or self.is_full:
            return False
        return not self.ready and len(self.running) < self.max_slots and not any(map(self._is_alone, self.running))

    def _is_alone(self, request: Request) -> bool:
        """Return whether an encoded request may grow so long that it changes others that run with it."""
        if self.context is None:
            return False
        assert request.encoded is not None
        return len(request.encoded.input_ids) + request.limit > self.context.length

    def _read_row(self) -> None:
        """Prefill the next row and take the first token of each of its answers."""
        members, images = self._next_row()
        if not members:
            return
        try:
            row = self.runner.prefill([request.extended() for request in members], images)
        except Exception as error:
            self._put_back(members, error)
            return
        except BaseException:
            self.waiting.extendleft(reversed(members))
            raise
        for request in members:
            request.pending = ()  # the question that a dialogue had not prefilled yet is now part of its prompt
        finished = self._take(members, row.logits)
        for member, request in enumerate(members):
            if not finished[member]:
                self.ready.append(Ready(request, row, member))

    def _put_back(self, members: list[Request], error: Exception) -> None:
        """Queue the requests of a failed prefill again: with less memory, or one at a time."""
        if is_lost(error):
            self.waiting.extendleft(reversed(members))
            raise error
        if not is_out_of_memory(error) and len(members) == 1:
            logger.error("the model failed on a prompt", exc_info=error)
            self._fail(members[0], f"the model failed on this prompt: {named(error)}", error)
            return
        self.waiting.extendleft(reversed(members))
        if not is_out_of_memory(error):
            for request in members:
                request.is_suspect = True
        elif not self._shrink():
            self._read_less(len(members), error)

    def _fail(self, request: Request, reason: str, cause: Exception | None = None) -> None:
        request.fail(reason, cause)
        self.changed.append(request)

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
                if members and request.is_suspect:
                    break
                if (members or self.running) and self._is_alone(request):
                    break
                if not self._has_memory_for(request, members):
                    if request.completion is None:
                        break
                    continue
                pixels = self._pixels(request, reading, images)
            except Exception as error:
                self._fail(self.waiting.popleft(), refusal(error), error)
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
            if request.is_suspect or self._is_alone(request):
                break
        return members, images

    def _pixels(self, request: Request, reading: EncodedPrompt, known: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if request.source.pixels is not None:
            return request.source.pixels
        return {image.key: self.reader.pixels(image) for image in reading.images if image.key not in known}

    def _reading(self, request: Request) -> EncodedPrompt:
        source = request.source
        if source.reading is None:
            source.reading = self.reader.read(source.prompt)
        if request.encoded is None:
            request.encoded = source.reading.encoded
            room = self.reader.max_tokens - len(request.encoded.input_ids)
            request.limit = answer_limit(request, room, self._kv_bytes, self.max_kv_bytes)
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
        self._extend()
        if not self.running:
            return
        if self._has_switched(self.running[0]):
            self.waiting.appendleft(self.running[0])
            self._drop(0)
            return
        logits = self.runner.decode([request.token_ids[-1] for request in self.running])
        finished = self._take(self.running, logits)
        for number in reversed(range(len(finished))):
            if finished[number]:
                self._drop(number)

    def _extend(self) -> None:
        """Prefill the next question of running dialogues and take the first token of each answer."""
        while numbers := [number for number, request in enumerate(self.running) if request.pending]:
            if not self.runner.is_continuous or any(self._is_alone(self.running[number]) for number in numbers):
                self._read_again(numbers)
                continue
            members = [self.running[number] for number in numbers]
            logits = self.runner.extend(numbers, [request.pending for request in members])
            for request in members:
                request.pending = ()
            finished = self._take(members, logits)
            for number, is_over in reversed(list(zip(numbers, finished, strict=True))):
                if is_over:
                    self._drop(number)

    def _read_again(self, numbers: Sequence[int]) -> None:
        """Queue running requests for another prefill."""
        for number in reversed(numbers):
            request = self.running[number]
            request.pending = ()
            self.waiting.appendleft(request)
            self._drop(number)

    def _has_switched(self, request: Request) -> bool:
        """Return whether the next token needs other keys than the cached ones.

        Such a request is prefilled again.
        """
        context = self.context
        return context is not None and context.switches and request.num_tokens == context.length + 1

    def _take(self, requests: list[Request], logits: Tensor) -> list[bool]:
        """Append the next token of each request; return which of them are finished."""
        token_ids = chosen_tokens(requests, logits, never=self.never)
        self.changed.extend(requests)
        return [self._append(request, token_id) for request, token_id in zip(requests, token_ids, strict=True)]

    def _append(self, request: Request, token_id: int) -> bool:
        """Append a token; return whether the request is over."""
        try:
            return request.append(token_id)
        except Exception as error:  # its text cannot be decoded
            request.fail(refusal(error), error)
            return True

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
            self._fail(self.waiting.popleft(), no_memory(error))

    def _give_up_running(self, error: BaseException) -> None:
        for request in (*(ready.request for ready in self.ready), *self.running):
            self._fail(request, no_memory(error))
        self.ready.clear()
        while self.running:
            self._drop(len(self.running) - 1)
