"""Answers of a worker: parsed request to limits, queue, engine and events of both protocols.

AnswerJob --text limits, images (in a thread)--> Prompt --Admission: wait for a place--> engine.submit --> events
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from llava.errors import ConfigError, DataError, LlavaError, MemoryLimitError, MissingDependency, PromptTooLongError
from llava.generation.prompt_encoder import CHARACTERS_PER_TOKEN
from llava.generation.protocol import Prompt, Sampling
from llava.serve.admission import Admission, Place, timed_out
from llava.serve.failures import RequestError, internal_error
from llava.serve.gate import RequestRecord
from llava.serve.image_inputs import ImageLimits, read_images, refused_image
from llava.serve.messages import ImageInput, SamplingFields
from llava.serve.wake_ups import WakeUps

logger = logging.getLogger(__name__)


FREE_SECONDS = 0.5
"""Interval in which a request whose client is slow to read is checked for its end, which frees its place."""


class SubmittingEngine(Protocol):
    """Engine that answers in a thread of its own; see `llava.generation.engine.LocalEngine`."""

    def submit(
        self, prompt: Prompt, sampling: Sampling, *, key: str = "", notify: Callable[[], None] | None = None
    ) -> Any:
        """Queue a prompt and return its handle at once."""
        ...


@dataclass(frozen=True, slots=True)
class ServedModel:
    """Facts of a model that clients may see, and what its tokenizer reserves.

    Attributes:
        name: name under which it is served.
        context: largest number of tokens of a prompt with its answer.
        template: name of its conversation template.
        weights: hash of its weight files; None where they are not in one folder.
        placement: where its prompts have images: `front`, or `as_written`.
        precision: precision of the weights of its text layers, `int8` with `--weights int8`.
        special_tokens: texts of special tokens, which requests must not contain.
        created: when it was loaded, in seconds since 1970.
    """

    name: str
    context: int
    template: str
    weights: str | None = None
    special_tokens: frozenset[str] = frozenset()
    placement: str = "front"
    precision: str = "float32"
    created: int = field(default_factory=lambda: int(time.time()))

    def as_json(self) -> dict[str, Any]:
        """Return the entry of GET /v1/models."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "llava",
            "max_model_len": self.context,
            "template": self.template,
            "image_placement": self.placement,
            "weights": self.weights,
            "precision": self.precision,
        }


@dataclass(frozen=True, slots=True)
class AnswerJob:
    """Request for answers, independent of its protocol.

    Attributes:
        prompt_of: returns the prompt from the bytes of the images.
        images: images as sent.
        sampling: sampling parameters.
        texts: texts of the client with the names of their fields.
        is_raw: whether the text may contain special tokens, and images may be bare base64 (old protocol).
        top_logprobs: number of alternatives of each token.
    """

    prompt_of: Callable[[tuple[bytes, ...]], Prompt]
    images: tuple[ImageInput, ...]
    sampling: SamplingFields
    texts: tuple[tuple[str, str], ...]
    is_raw: bool = False
    top_logprobs: int = 0


class AnswerService:
    """Front of an engine: limits, queue, time limit."""

    def __init__(
        self,
        engine: SubmittingEngine,
        model: ServedModel,
        *,
        admission: Admission,
        images: ImageLimits,
        request_seconds: float = 600.0,
        logs_content: bool = False,
    ) -> None:
        """Serve `model` with an engine.

        Args:
            engine: the engine.
            model: facts of its model.
            admission: queue in front of the engine.
            images: limits of images.
            request_seconds: largest time of a request, waiting included.
            logs_content: whether texts of requests and answers are logged.
        """
        self.engine = engine
        self.model = model
        self.admission = admission
        self.images = images
        self.request_seconds = request_seconds
        self.logs_content = logs_content
        self._reserved = special_pattern(model.special_tokens)
        self._readers = asyncio.Semaphore(2)
        self._wake_ups = WakeUps()

    def status(self) -> dict[str, Any]:
        """Return the status that controllers ask for."""
        return {"model_names": [self.model.name], "speed": 1, "queue_length": self.admission.num_requests}

    def check_model(self, name: str) -> None:
        """Raise `RequestError` for a model that is not served here."""
        if name != self.model.name:
            raise RequestError("model_not_found", "this server has no such model; see GET /v1/models", param="model")

    async def events(
        self, job: AnswerJob, record: RequestRecord, *, beat: float
    ) -> AsyncGenerator[Answering | None, None]:
        """Yield the events of the answers, and None after each `beat` seconds without a token.

        Raises:
            RequestError: the request is refused, fails, or takes too long.
        """
        deadline = record.deadline = time.monotonic() + self.request_seconds
        key = record.key
        with self.admission.reading():
            reading = asyncio.ensure_future(self._prompt(job, record))
            del job  # the texts of its images may be large, and are not kept until the answer ends
            try:
                async for _ in _beats(reading, deadline=deadline, beat=beat):
                    yield None
            finally:
                reading.cancel()
        prompt, sampling = reading.result()
        limit = None if key is None else key.max_running
        with self.admission.place(record.key_id, sampling.n, max_running=limit) as place:
            async for _ in self.admission.waits(place, deadline=deadline, beat=beat):
                yield None
            answers = self._answers(prompt, sampling, record, place, deadline=deadline, beat=beat)
            async with aclosing(answers):
                async for news in answers:
                    yield news

    async def _answers(
        self, prompt: Prompt, sampling: Sampling, record: RequestRecord, place: Place, *, deadline: float, beat: float
    ) -> AsyncGenerator[Answering | None, None]:
        news, loop = asyncio.Event(), asyncio.get_running_loop()

        def notify() -> None:
            self._wake_ups.set(loop, news)

        handle = self._submit(prompt, sampling, record.key_id, notify)
        timer: asyncio.TimerHandle | None = None

        def free_if_over() -> None:
            nonlocal timer
            timer = None if handle.is_over else loop.call_later(FREE_SECONDS, free_if_over)
            if timer is None:
                self.admission.leave(place)

        free_if_over()
        try:
            num_left = sampling.n
            while num_left:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise timed_out()
                if not news.is_set():  # what is there already is sent, also when the server ends
                    try:
                        async with self.admission.limited(min(beat, left)):
                            await news.wait()
                    except TimeoutError:
                        yield None
                        continue
                news.clear()
                for event in handle.take():
                    if event.error is not None:
                        raise failure_of(event, record.request_id)
                    counts = event.counts
                    record.note_tokens(counts.prompt, counts.cached, counts.generated)
                    num_left -= event.finish is not None
                    if self.logs_content and event.finish is not None:
                        logger.info("answer %s %d: %s", record.request_id, event.index, event.answer)
                    yield Answering(event, handle)
        finally:
            handle.cancel()
            if timer is not None:
                timer.cancel()

    def _submit(self, prompt: Prompt, sampling: Sampling, key: str, notify: Callable[[], None]) -> Any:
        try:
            return self.engine.submit(prompt, sampling, key=key, notify=notify)
        except ConfigError as error:
            raise RequestError("invalid_value", str(error)) from error
        except LlavaError as error:
            raise RequestError("draining", str(error), retry_after=1) from error

    async def _prompt(self, job: AnswerJob, record: RequestRecord) -> tuple[Prompt, Sampling]:
        """Return prompt and sampling parameters; images are read in a thread, few requests at a time."""
        if self.admission.is_draining:
            self.admission.enter("-", 1)  # raises
        sampling = self._sampling(job)
        self._check_texts(job)
        if self.logs_content:
            for param, text in job.texts:
                logger.info("request %s %s: %s", record.request_id, param, text)
        record.num_images = len(job.images)
        if not job.images:
            return job.prompt_of(()), sampling
        async with self.admission.limited(), self._readers:
            contents = await asyncio.to_thread(read_images, job.images, self.images, is_bare=job.is_raw)
        record.num_image_bytes = sum(map(len, contents))
        return job.prompt_of(contents), sampling

    def _sampling(self, job: AnswerJob) -> Sampling:
        fields = job.sampling
        # In the old protocol the answer just ends at the context.
        if not job.is_raw and fields.max_new_tokens is not None and fields.max_new_tokens > self.model.context:
            raise RequestError(
                "invalid_value",
                f"{fields.limit_param} is {fields.max_new_tokens}; "
                f"the context of the model has {self.model.context} tokens",
                param=fields.limit_param,
            )
        return replace(fields.sampling(), top_logprobs=job.top_logprobs)

    def _check_texts(self, job: AnswerJob) -> None:
        limit = CHARACTERS_PER_TOKEN * self.model.context
        num_characters = sum(len(text) for _, text in job.texts)
        if num_characters > limit:
            raise RequestError(
                "context_length_exceeded",
                f"{num_characters} characters of text; a context of {self.model.context} tokens holds at most {limit}",
                param="messages" if not job.is_raw else "prompt",
            )
        for param, text in () if job.is_raw else job.texts:
            if self._reserved.search(text):
                reason = f"{param} contains <image> or a special token of the tokenizer; images are parts of their own"
                raise RequestError("invalid_content", reason, param=param)


async def _beats(work: asyncio.Future[Any], *, deadline: float, beat: float) -> AsyncGenerator[None, None]:
    """Yield every `beat` seconds until `work` is done.

    Raises:
        RequestError: the deadline has passed.
    """
    while not work.done():
        left = deadline - time.monotonic()
        if left <= 0:
            raise timed_out()
        await asyncio.wait({work}, timeout=min(beat, left))
        if not work.done():
            yield


@dataclass(frozen=True, slots=True)
class Answering:
    """Event of one answer (`llava.generation.handle.Event`), and the handle of its prompt."""

    event: Any
    handle: Any

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        """Tokens of the prompt, images included."""
        ids: tuple[int, ...] = self.handle.requests[0].encoded.input_ids
        return ids


def special_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that finds any of these texts."""
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True) if token) or r"(?!)")


def failure_of(event: Any, request_id: str) -> RequestError:
    """Return the error of a request whose answer failed."""
    cause = event.cause
    if isinstance(cause, PromptTooLongError | MemoryLimitError):
        return RequestError("context_length_exceeded", str(cause), param="messages")
    if isinstance(cause, MissingDependency) or (isinstance(cause, DataError) and str(cause).startswith("image")):
        return refused_image(cause)
    if isinstance(cause, DataError):
        return RequestError("invalid_content", str(cause), param="messages")
    if isinstance(cause, ConfigError):
        return RequestError("invalid_value", str(cause))
    logger.error("request %s failed: %s", request_id, "the engine" if cause is None else type(cause).__name__)
    return internal_error(request_id)
