"""Engine that asks a server with the OpenAI protocol: one of this package, vLLM, or another.

    engine = RemoteEngine("http://localhost:8000/v1", "first")
    [[completion]] = engine.generate([prompt], Sampling(max_new_tokens=8))
    completion.text if completion.finish != "error" else completion.error

Prompt --messages_of--> request --RemoteServer: bounded, retried--> Completion; a failure is a completion, too

Importing this module does not load torch; holding dialogues does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from llava.errors import ConfigError, GenerationError, LlavaError
from llava.generation.protocol import (
    Completion,
    Dialogue,
    Prompt,
    Sampling,
    Script,
    num_distinct,
    repeated,
    sampling_of_each,
)
from llava.generation.remote_facts import ServerFacts, ServerFailure
from llava.generation.remote_habits import ServerHabits
from llava.generation.remote_request import (
    ImageForm,
    completions_of,
    cut_text,
    derived_seed,
    fields_of,
    messages_of,
    piece_of,
)
from llava.generation.remote_server import RemoteServer, Reply, RequestFailure, Session, StreamError, together

if TYPE_CHECKING:
    from llava.processing import LlavaMedProcessor

Result = TypeVar("Result")

MAX_ANSWERS = 16
"""Largest number of answers that our servers give to one request."""

MAX_CONCURRENCY = 32
"""Concurrent requests of a call; equal to the default number of concurrent sequences of our workers."""

TIMEOUT = 660.0
"""Seconds without a byte after which a request fails; our servers give up after 600."""


class RemoteEngine:
    """Engine behind a URL; see `protocol.Engine`. Threads may share it.

    Attributes:
        facts: what the server says about the model.
        habits: fields that the server refuses, and what is done instead.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        *,
        facts: ServerFacts | None = None,
        processor: LlavaMedProcessor | None = None,
        dicom_window: str | None = None,
        dicom_frame: str | None = None,
        max_concurrency: int = MAX_CONCURRENCY,
        max_retries: int = 5,
        timeout: float = TIMEOUT,
    ) -> None:
        """Ask the server for its models.

        Args:
            base_url: URL of the server, such as `http://localhost:8000/v1`. The key is read from `LLAVA_API_KEY`.
            model: name of the model; None takes the only one.
            facts: facts of the model, if they are known.
            processor: processor of the same model; dialogues then have the images and turns of their tokens, and
                tokens that differ from the server's are an error.
            dicom_window: window of DICOM files; default: that of the server, or of `DicomPolicy`.
            dicom_frame: frame of DICOM files; default: as for the window.
            max_concurrency: largest number of requests of a call at a time.
            max_retries: retries of a request after a transient failure.
            timeout: seconds without a byte after which a request fails.

        Raises:
            ConfigError: the URL is not valid, or the server does not serve the model.
            GenerationError: the server cannot be reached.
        """
        self.server = RemoteServer(base_url, max_concurrency=max_concurrency, max_retries=max_retries, timeout=timeout)
        self.facts = facts or self.server.facts(model)
        self.server.is_ours = self.facts.is_ours
        self.habits = ServerHabits(self.server.url)
        self.processor = processor
        self.images = ImageForm(self.facts.is_ours, dicom_window, dicom_frame)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling | Sequence[Sampling]) -> list[list[Completion]]:
        """Answer prompts; see `protocol.Engine`.

        Raises:
            ConfigError: `sampling` asks for a beam search.
        """
        each = sampling_of_each(prompts, sampling)
        for own in each:
            check_sampling(own)

        async def ask(session: Session) -> list[list[Completion]]:
            pairs = zip(prompts, each, strict=True)
            return await asyncio.gather(*(self._answers(session, prompt, own) for prompt, own in pairs))

        return self.run(ask)

    def converse(self, scripts: Sequence[Script], sampling: Sampling | Sequence[Sampling]) -> list[list[Dialogue]]:
        """Hold dialogues; see `protocol.Engine`.

        Raises:
            ConfigError: the server gives no token ids, or as in `protocol.Engine`.
        """
        from llava.generation.remote_dialogues import hold_dialogues  # loads torch

        return hold_dialogues(self, scripts, sampling_of_each(scripts, sampling))

    def stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[str]:
        """Yield the answer so far whenever it has grown; see `protocol.Engine`.

        Raises:
            GenerationError: the prompt cannot be answered.
            ConfigError: `sampling` asks for more than one answer or for a beam search.
        """
        check_sampling(sampling)
        if sampling.n != 1:
            raise ConfigError(f"a stream needs n=1, got n={sampling.n}; use generate")
        return self._stream(prompt, sampling)

    def score(self, conversations: Sequence[Prompt]) -> None:
        """Refuse: scores need the model in this process.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"conversations are scored by a model in this process only, not by {self.server.url}; name a checkpoint "
            "folder with --model and omit --engine"
        )

    def run(self, ask: Callable[[Session], Coroutine[Any, Any, Result]]) -> Result:
        """Run requests in an event loop of their own, and close their connections; an interrupt cancels them."""

        async def session() -> Result:
            async with self.server.session() as opened:
                return await ask(opened)

        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(session())
        with ThreadPoolExecutor(1) as pool:  # the caller's own loop runs, as in a notebook
            return pool.submit(lambda: asyncio.run(session())).result()

    async def request(self, session: Session, prompt: Prompt, fields: Mapping[str, Any]) -> Reply:
        """Return the server's answer; reading the images already counts as one of the concurrent requests.

        Raises:
            LlavaError: the prompt cannot be sent, or the request failed.
        """
        async with session.slots:
            messages = await asyncio.to_thread(messages_of, prompt, self.facts, self.images)
            while True:
                body = {**self.habits.fitted(fields), "messages": messages}
                found = await self.server.ask(session, body)
                if not isinstance(found, ServerFailure):
                    return found
                if not self.habits.learn(found, body):
                    raise RequestFailure(found)

    async def completions(
        self, session: Session, prompt: Prompt, sampling: Sampling, more: Mapping[str, Any] | None = None
    ) -> tuple[Reply, list[Completion]]:
        """Return the body of an answer, and its completions."""
        reply = await self.request(session, prompt, {**fields_of(sampling, self.facts), **(more or {})})
        cuts = sampling.stop if self.habits.refuses("stop") else ()
        return reply, completions_of(reply, sampling, is_ours=self.facts.is_ours, cuts=cuts)

    async def _answers(self, session: Session, prompt: Prompt, sampling: Sampling) -> list[Completion]:
        try:
            return repeated(await self._distinct(session, prompt, sampling), sampling.n)
        except LlavaError as error:
            return [Completion("", (), "error", error=str(error))] * sampling.n

    async def _distinct(self, session: Session, prompt: Prompt, sampling: Sampling) -> list[Completion]:
        """Return the answers to one prompt, equal ones once."""
        num = num_distinct(sampling)
        if self.facts.is_ours and num > MAX_ANSWERS:
            return await self._in_parts(session, prompt, sampling)
        found: list[Completion] = []
        if num == 1 or not self.habits.refuses("n"):
            _, found = await self.completions(session, prompt, replace(sampling, n=num))
        if len(found) >= num:
            return found[:num]
        self.habits.note("n")
        seeds = [derived_seed(sampling.seed, place) if place else sampling.seed for place in range(len(found), num)]
        alone = (self.completions(session, prompt, replace(sampling, n=1, seed=seed)) for seed in seeds)
        return found + [answers[0] for _, answers in await together(alone)]

    async def _in_parts(self, session: Session, prompt: Prompt, sampling: Sampling) -> list[Completion]:
        """Return more answers than one request may ask for; each has the random numbers of its place."""
        if sampling.logprobs:
            raise GenerationError(
                f"a server gives log-probabilities of at most {MAX_ANSWERS} answers, got n={sampling.n}"
            )
        starts = range(0, sampling.n, MAX_ANSWERS)
        parts = [(start, replace(sampling, n=min(MAX_ANSWERS, sampling.n - start))) for start in starts]
        asked = (self.completions(session, prompt, own, {"dialogue": {"sample": start}}) for start, own in parts)
        return [answer for _, answers in await together(asked) for answer in answers]

    def _stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[str]:
        try:
            messages = messages_of(prompt, self.facts, self.images)
        except LlavaError as error:
            raise GenerationError(str(error)) from error
        fields = fields_of(replace(sampling, logprobs=False, top_logprobs=0), self.facts)
        del fields["return_token_ids"]
        while True:
            body = {**self.habits.fitted(fields), "messages": messages}
            try:
                yield from self._texts(body, sampling.stop if self.habits.refuses("stop") else ())
                return
            except StreamError as error:
                if not self.habits.learn(error.found, body):
                    raise

    def _texts(self, body: Mapping[str, Any], cuts: Sequence[str]) -> Iterator[str]:
        """Yield the growing answer of a stream; a possible start of a stop string is held back."""
        text = shown = ""
        held = max(map(len, cuts), default=1) - 1
        for chunk in self.server.stream(body):
            text += piece_of(chunk)
            answer, is_cut = (text, True) if self.facts.is_ours else cut_text(text, cuts)
            answer = answer if is_cut else text[: len(text) - held].strip()
            if answer != shown:
                shown = answer
                yield shown
        last = text if self.facts.is_ours else cut_text(text, cuts)[0]
        if last != shown:
            yield last


def check_sampling(sampling: Sampling) -> None:
    """Refuse a beam search, which servers do not offer.

    Raises:
        ConfigError: `sampling` asks for one.
    """
    if sampling.num_beams != 1:
        raise ConfigError(f"servers offer no beam search: num_beams={sampling.num_beams}; expected 1 with --engine")
