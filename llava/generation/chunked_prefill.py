"""Scheduler that prefills prompts in pieces between decoding steps, on top of cached prefixes.

    waiting --match--> job: known beginning + embeddings of the rest --at most `chunk` tokens a step--> ready
                       images of the rest pass the tower once           prompt and, later, answer --> PrefixCache

A prompt that shares its unknown beginning with one that is being read waits for it, so an image is computed once.
On a CPU, a step beside running answers computes layers of the tower or reads a piece, and takes not much longer than a
decoding step (`pace`). While far more prompts are new than answers run, they are all read first: a step takes about as
long for few answers as for many.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Hashable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor

from llava.data.encode import Encoded
from llava.generation.extension import PartsExtension
from llava.generation.failures import no_memory, refusal
from llava.generation.pace import Pace
from llava.generation.prefix_cache import (
    Identity,
    KeyValues,
    Match,
    PrefixCache,
    identities_of,
    joined,
    num_common,
    parts_between,
)
from llava.generation.request import Ready, Request
from llava.generation.runners import KnownRow, SlotRunner
from llava.generation.scheduler import Scheduler
from llava.generation.slot_memory import last_image, most_tokens, stem_length

LOOKAHEAD = 64
"""Maximum number of prompts that may overtake one that waits for a running prefill of its prefix."""

MIN_CHUNK = 16
"""Tokens per piece when memory is short."""

MANY = 4
"""Ratio of new prompts to running answers above which all prompts are prefilled first."""

LONGEST_PAUSE = 0.5
"""Seconds after which running answers get their next token even in that case."""

MIN_SHARED = 16
"""Number of uncached tokens (or one image) that two prompts must share for one to wait for the other."""


@dataclass(slots=True, eq=False)
class PrefillJob:
    """Prompt being prefilled for all its samples.

    Attributes:
        members: its requests.
        encoded: the prompt, with the answer so far if it is read again.
        identities: what its tokens are.
        tree: name of its tree in the cache.
        match: its known beginning.
        parts: keys and values of the tokens that are known or read.
        embedding: computes the embeddings, a layer of the tower at a time.
        num_read: tokens that are known or read.
        embeds: [1, T, d] embeddings of the tokens after the known ones; None while they are computed.
    """

    members: list[Request]
    encoded: Encoded
    identities: tuple[Identity, ...]
    tree: str
    match: Match
    parts: list[KeyValues]
    embedding: Generator[None, None, Tensor]
    num_read: int
    embeds: Tensor | None = None

    @property
    def num_left(self) -> int:
        """Tokens to read."""
        return len(self.identities) - self.num_read

    def embed(self, seconds: float = math.inf) -> None:
        """Compute the embeddings, or layers of the tower for about this time, at least one."""
        start = time.perf_counter()
        try:
            next(self.embedding)
            while time.perf_counter() - start < seconds:
                next(self.embedding)
        except StopIteration as end:
            self.embeds = end.value

    def piece(self, num: int) -> tuple[PartsExtension, Tensor]:
        """Return the next tokens to read and their embeddings."""
        assert self.embeds is not None, "an embedded prompt is read"
        first = self.num_read - self.match.length
        return PartsExtension(self.parts, self.num_read, num), self.embeds[:, first : first + num]

    def copy(self, start: int, stop: int) -> KeyValues:
        """Return a copy of the keys and values of some tokens."""
        return joined(parts_between(self.parts, start, stop))

    def row(self) -> KnownRow:
        """Return the prompt as a row whose members join slots."""
        assert self.members[0].stem is not None
        return KnownRow(*self.members[0].stem, self.parts)


def stem_of(tree: str, identities: tuple[Identity, ...], length: int) -> tuple[Hashable, int]:
    """Return name and length of a stem, which is stored once for all sequences that begin with it."""
    return (tree, identities[:length]), length


class ChunkedScheduler(Scheduler):
    """Scheduler with a prefix cache, for a `SlotRunner` whose sequences do not change each other."""

    runner: SlotRunner

    def __init__(self, runner: SlotRunner, *args: Any, cache: PrefixCache, chunk: int, **options: Any) -> None:
        """Create an empty scheduler.

        Args:
            runner: runs the model.
            args: see `Scheduler`.
            cache: what is known of earlier prompts and answers.
            chunk: largest number of tokens that are read between two decoding steps.
            options: see `Scheduler`.
        """
        super().__init__(runner, *args, **options)
        self.cache = cache
        self.chunk = chunk
        self.jobs: list[PrefillJob] = []
        self.pace = Pace()
        self._has_embedded = False
        self._has_read = False
        self._is_paced = False
        self._reads_all = False
        self._paused: float | None = None

    @property
    def has_work(self) -> bool:
        """Whether there is work for a step."""
        return bool(self.jobs) or super().has_work

    @property
    def prefix_cache_bytes(self) -> int:
        """Bytes of kept keys and values."""
        return self.cache.num_bytes

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of the keys and values of sequences that are read or running."""
        num_read = sum(job.num_read - job.match.length for job in self.jobs)
        return super().kv_cache_bytes + num_read * self.runner.token_bytes

    def held(self) -> list[Request]:
        """Return the requests that are read, ready or running."""
        return [*super().held(), *(request for job in self.jobs for request in job.members)]

    def fail_all(self, reason: str, cause: Exception) -> None:
        """End every request with an error and forget all keys and values, which may be incomplete."""
        members = self._stop_jobs()
        self.cache.clear()
        super().fail_all(reason, cause)
        for request in members:
            self._fail(request, reason, cause)

    def _read_prompts(self) -> None:
        """Start to prefill waiting prompts, and prefill the next piece of those in progress."""
        self._has_read = False
        self._choose_pace()
        self._start_jobs()
        embedded = [job for job in self.jobs if job.embeds is not None] if self._embed_images() else []
        if not embedded:
            return
        if self.max_kv_bytes is not None:
            self.runner.cache.limit(self.max_kv_bytes - self._unjoined_bytes())
        pieces, room = [], self.pace.num_tokens(self.chunk) if self._is_paced else self.chunk
        for job in embedded:
            if room:
                pieces.append((job, *job.piece(min(room, job.num_left))))
                room -= pieces[-1][1].length
        start = time.perf_counter()
        try:
            extensions, embeds = [one for _, one, _ in pieces], [one for *_, one in pieces]
            ending = [row for row, (job, one, _) in enumerate(pieces) if job.num_left == one.length]
            logits = self.runner.read(extensions, embeds, ending)
        except Exception as error:
            self._put_back(self._stop_jobs(), error)
            return
        self._has_read = True
        self.pace.note_piece(sum(extension.length for _, extension, _ in pieces), time.perf_counter() - start)
        for job, extension, _ in pieces:
            job.parts.append(extension.states())
            job.num_read += extension.length
        for place, row in enumerate(ending):
            self._finish(pieces[row][0], logits[place : place + 1])

    def _embed_images(self) -> bool:
        """Pass images through the tower; return whether prompts may be read in this step."""
        pending = [job for job in self.jobs if job.embeds is None]
        # Beside running answers, a step is for the tower or for reading, and both make progress.
        if self._is_paced and self._has_embedded and len(pending) < len(self.jobs):
            self._has_embedded = False
            return True
        self._has_embedded = self._is_paced and bool(pending)
        for job in pending[:1] if self._is_paced else pending:
            try:
                job.embed(self.pace.seconds if self._is_paced else math.inf)
            except Exception as error:
                self.jobs.remove(job)
                self.cache.release(job.match)
                self._put_back(job.members, error)
                return False
        return not self._has_embedded

    def _choose_pace(self) -> None:
        """Record whether running answers would wait too long for the whole next piece, and whether any wait."""
        # Prefilling a prompt yields one token.
        num_streams = sum(len(request.token_ids) > 1 for request in self.running)
        num_new = len(self.waiting) + len(self.jobs)
        is_on_cpu = self.runner.model.device.type == "cpu"  # a GPU prefills a piece in the time of a decoding step
        self._reads_all = is_on_cpu and num_new > 0 and (self._reads_all or num_new > MANY * num_streams)
        self._is_paced = is_on_cpu and num_streams > 0 and not self._reads_all

    def _decode(self) -> None:
        if self._is_postponed():
            return
        start, is_running = time.perf_counter(), bool(self.running)
        super()._decode()
        if is_running:
            self.pace.note_step(time.perf_counter() - start)

    def _is_postponed(self) -> bool:
        """Return whether more prompts are prefilled before the next decoding step."""
        now = time.perf_counter()
        self._paused = now if self._paused is None else self._paused
        has_more = self._reads_all and self._has_read and bool(self.jobs or self.waiting)
        if has_more and now - self._paused < LONGEST_PAUSE:
            return True
        self._paused = None
        return False

    def _start_jobs(self) -> None:
        self.is_full = self.is_full and bool(self.running)
        if self.is_full:
            return
        for request in list(islice(self.waiting, LOOKAHEAD)):
            if len(self.held()) >= self.max_slots or any(job.members[0].is_suspect for job in self.jobs):
                return
            if sum(job.num_left for job in self.jobs) >= self.chunk:
                return
            if request.is_over or request not in self.waiting:  # it failed, or was started with another sample
                continue
            if request.is_suspect and self.jobs:
                return
            try:
                self._reading(request)
            except Exception as error:
                self.waiting.remove(request)
                self._fail(request, refusal(error), error)
                continue
            encoded = request.extended()
            identities = identities_of(encoded)
            request.stem = stem_of(request.tree, identities, stem_length(encoded))
            match = self.cache.match(request.tree, encoded, identities)
            if self._is_read_soon(request.tree, encoded, identities, match.length):
                self.cache.release(match)
            elif not self._has_memory_for(request) or self._waits_for_tower(encoded, match.length):
                self.cache.release(match)
                return
            else:
                self._start(self._samples(request, identities), encoded, identities, match)

    def _waits_for_tower(self, encoded: Encoded, known: int) -> bool:
        """Return whether a prompt's new images must wait for those of another prompt in the tower."""
        is_busy = any(job.embeds is None for job in self.jobs)
        return self._is_paced and is_busy and known < last_image(encoded)

    def _is_read_soon(self, tree: str, encoded: Encoded, identities: Sequence[Identity], known: int) -> bool:
        """Return whether a running job prefills tokens that this prompt begins with too."""
        if not self.cache.max_bytes:
            return False
        images = [stop for start, stop in encoded.image_spans if start >= known]
        wanted = min([known + MIN_SHARED, *images])
        return any(job.tree == tree and num_common(job.identities, identities) >= wanted for job in self.jobs)

    def _samples(self, request: Request, identities: tuple[Identity, ...]) -> list[Request]:
        """Take a request and those that sample its prompt from the queue, as many as fit together."""
        encoded, members = request.extended(), [request]
        alone, shared = request.stem, stem_of(request.tree, identities, len(identities))
        for other in self.waiting:
            if other is request or other.source is not request.source or request.is_suspect:
                continue
            self._reading(other)
            if other.extended() is not encoded:
                continue
            request.stem = other.stem = shared
            if not self._fits([*members, other]):
                break  # the rest starts later, on the cached prompt
            members.append(other)
        for member in members:
            member.stem = shared if len(members) > 1 else alone
            self.waiting.remove(member)
        return members

    def _start(self, members: list[Request], encoded: Encoded, identities: tuple[Identity, ...], match: Match) -> None:
        try:
            reading = self._reading(members[0])
            new = [number for number, (start, _) in enumerate(encoded.image_spans) if start >= match.length]
            pixels = self._pixels(members[0], reading, {}) if new else {}
            embedding = self.runner.embed(encoded, match.length, new, pixels)
            job = PrefillJob(
                members, encoded, identities, members[0].tree, match, list(match.parts), embedding, match.length
            )
            if not new:
                job.embed()
        except Exception as error:
            self.cache.release(match)
            self._put_back(members, error)
            return
        for request in members:
            request.pending = ()
            request.num_cached = match.length
        self.jobs.append(job)

    def _finish(self, job: PrefillJob, logits: Tensor) -> None:
        """Keep a prompt that was read and take the first token of each of its answers."""
        self.jobs.remove(job)
        self.cache.insert(job.tree, job.encoded, job.identities, job.copy)
        self.cache.release(job.match)
        row = job.row()
        finished = self._take(job.members, logits.expand(len(job.members), -1))
        for request, is_over in zip(job.members, finished, strict=True):
            if not is_over:
                self.ready.append(Ready(request, row, 0))

    def _drop(self, number: int) -> None:
        request = self.running[number]
        if self.cache.max_bytes and (request.completion is None or request.completion.error is None):
            encoded = request.extended()
            known = identities_of(encoded)[: self.runner.cache.num_tokens(number)]
            self.cache.insert(request.tree, encoded, known, lambda *ends: self.runner.cache.copy(number, *ends))
        super()._drop(number)

    def _forget_cancelled(self) -> None:
        super()._forget_cancelled()
        for job in list(self.jobs):
            job.members = [request for request in job.members if not request.is_cancelled]
            if not job.members:
                self.jobs.remove(job)
                self.cache.release(job.match)

    def _kv_bytes(self, requests: Sequence[Request]) -> int:
        return most_tokens(requests) * self.runner.token_bytes

    def _unjoined_bytes(self) -> int:
        return self.runner.token_bytes * sum(len(job.identities) - job.match.length for job in self.jobs)

    def _read_less(self, num_members: int, error: BaseException) -> None:
        """Reduce the piece size, then wait for running answers, then fail one."""
        if self.chunk > MIN_CHUNK:
            self.chunk //= 2
        elif self.running:
            self.is_full = True
        else:
            self._fail(self.waiting.popleft(), no_memory(error))

    def _shrink(self) -> bool:
        self.cache.clear()
        self.waiting.extendleft(reversed(self._stop_jobs()))
        return super()._shrink()

    def _stop_jobs(self) -> list[Request]:
        """Discard all prefill jobs and return their requests."""
        jobs, self.jobs = self.jobs, []
        for job in jobs:
            self.cache.release(job.match)
        return [request for job in jobs for request in job.members]
