"""Dialogues with a server, one request for each answer; the ids that it returned are its history.

    script --request--> ids of the prompt, n answers --each: ids so far, next question--> request --> ... --> Dialogue

Our servers take the ids of earlier answers and continue their random numbers. Others get the texts; a server that reads
them as other tokens than it wrote ends the dialogue with an error.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from llava.constants import IGNORE_INDEX
from llava.data.encode import Encoded, follow_up
from llava.errors import ConfigError, GenerationError, LlavaError
from llava.generation.episode import check_dialogue
from llava.generation.held import FollowUp, with_answer, with_question
from llava.generation.prompt_encoder import PromptReader
from llava.generation.protocol import (
    UNLIMITED,
    Completion,
    Dialogue,
    Finish,
    History,
    Prompt,
    Sampling,
    Script,
    num_distinct,
    repeated,
)
from llava.generation.remote_facts import ServerFacts
from llava.generation.remote_habits import ServerHabits
from llava.generation.remote_request import derived_seed, prompt_ids_of
from llava.generation.remote_server import RemoteServer, Reply, RequestFailure, Session, together
from llava.generation.stopping import StopRule
from llava.processing import LlavaMedProcessor
from llava.samples import Turn

Result = TypeVar("Result")

OTHER_TOKENS = (
    "the server reads the prompt as other tokens than the processor of --model; serve the same checkpoint, with the "
    "same template"
)


class AskingEngine(Protocol):
    """Engine that asks a server; see `llava.generation.remote.RemoteEngine`."""

    facts: ServerFacts
    habits: ServerHabits
    server: RemoteServer
    processor: LlavaMedProcessor | None

    def run(self, ask: Callable[[Session], Coroutine[Any, Any, Result]]) -> Result:
        """Run requests in an event loop."""
        ...

    async def completions(
        self, session: Session, prompt: Prompt, sampling: Sampling, more: Mapping[str, Any] | None = None
    ) -> tuple[Reply, list[Completion]]:
        """Return the body of an answer, and its completions."""
        ...


@dataclass(slots=True)
class _Held:
    """Dialogue number `sample` of a script, as far as it was held."""

    script: Script
    sample: int
    encoded: Encoded | None = None
    turns: tuple[Turn, ...] = ()
    answers: list[tuple[int, ...]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    finishes: list[Finish] = field(default_factory=list)
    logprobs: list[tuple[float, ...]] = field(default_factory=list)
    error: str | None = None

    def add(self, asked: Encoded, completion: Completion) -> None:
        """Append an answer to the tokens `asked` that the model read before it."""
        self.encoded = with_answer(asked, completion.token_ids)
        self.answers.append(completion.token_ids)
        self.texts.append(completion.text)
        self.finishes.append(completion.finish)
        self.logprobs.append(completion.logprobs or ())
        self.turns = (*self.turns, Turn("gpt", completion.text))

    def prompt(self) -> Prompt:
        """Return the prompt of the next answer."""
        conversation = replace(self.script.conversation, turns=(*self.script.conversation.turns, *self.turns))
        return Prompt(conversation, self.script.images, history=History(tuple(self.answers), self.sample))

    def dialogue(self) -> Dialogue:
        """Return what was said; answers that are missing have finish `error`."""
        missing = 1 + len(self.script.follow_ups) - len(self.texts)
        finishes: list[Finish] = [*self.finishes, *["error"] * missing]  # type: ignore[list-item]
        return Dialogue(
            self.encoded or Encoded((), (), ()),
            (*self.texts, *[""] * missing),
            tuple(finishes),
            (*self.logprobs, *[()] * missing),
            self.error,
        )


def hold_dialogues(engine: AskingEngine, scripts: Sequence[Script], each: Sequence[Sampling]) -> list[list[Dialogue]]:
    """Hold the dialogues of scripts; see `protocol.Engine.converse`.

    Raises:
        ConfigError: the server cannot hold them, or the sampling does not suit dialogues.
    """
    holders = [_Holder(engine, script, own) for script, own in zip(scripts, each, strict=True)]

    async def hold(session: Session) -> list[list[Dialogue]]:
        return await together(holder.hold(session) for holder in holders)

    return engine.run(hold)


class _Holder:
    """Holder of the dialogues of one script."""

    def __init__(self, engine: AskingEngine, script: Script, sampling: Sampling) -> None:
        """Read the script with the processor of the engine, if it has one.

        Raises:
            ConfigError: see `hold_dialogues`.
        """
        check_dialogue(sampling)
        self.engine = engine
        self.is_ours = engine.facts.is_ours
        self.script = script
        sampling = sampling if script.seed is None else replace(sampling, seed=script.seed)
        is_whole = sampling.temperature == 0.0 or (sampling.top_p == 1.0 and sampling.top_k == 0)
        is_whole = is_whole and sampling.repetition_penalty == 1.0
        # A local engine always reports them; other servers' values are those of another distribution.
        self.sampling = replace(sampling, logprobs=True) if self.is_ours and is_whole else sampling
        if not self.is_ours and sampling.logprobs and sampling.temperature not in (0.0, 1.0):
            raise ConfigError(
                f"{engine.server.url} gives log-probabilities at temperature 1, but dialogues need those that are "
                f"sampled from, at temperature {sampling.temperature:g}; use temperature 1, or a server of this package"
            )
        processor = engine.processor
        self.follow_ups: list[FollowUp] | None = None
        if processor is not None:
            self.follow_ups = [follow_up(question, processor) for question in script.follow_ups]
            self.ends = StopRule.of(processor, sampling).token_ids

    async def hold(self, session: Session) -> list[Dialogue]:
        """Return the dialogues of the script."""
        num = num_distinct(self.sampling)
        held = [_Held(self.script, sample) for sample in range(num)]
        try:
            await self._open(session, held)
        except ConfigError:
            raise
        except LlavaError as error:
            for one in held:
                one.error = str(error)
            return repeated([one.dialogue() for one in held], self.sampling.n)
        await together(self._continue(session, one) for one in held)
        return repeated([one.dialogue() for one in held], self.sampling.n)

    async def _open(self, session: Session, held: Sequence[_Held]) -> None:
        """Ask for the first answers."""
        opening = self._local_opening()
        num = len(held)
        whole = num == 1 or (not self.engine.habits.refuses("n") and num <= MAX_TOGETHER)
        asked: list[tuple[Reply, Completion]] = []
        if whole:
            reply, answers = await self._request(session, held[0], num)
            asked = [(reply, answer) for answer in answers[:num]]
        if len(asked) < num:
            if not self.is_ours:
                self.engine.habits.note("n")
            for one in held[len(asked) :]:
                reply, answers = await self._request(session, one, 1)
                asked.append((reply, answers[0]))
        for one, (reply, answer) in zip(held, asked, strict=True):
            ids = self._checked_ids(reply, answer)
            if opening is not None and opening.input_ids != ids:
                raise GenerationError(OTHER_TOKENS)
            one.add(opening or _opened(ids, len(self.script.conversation.turns)), answer)

    async def _continue(self, session: Session, held: _Held) -> None:
        """Ask the questions that follow, until one fails."""
        for number, question in enumerate(self.script.follow_ups):
            held.turns = (*held.turns, Turn("human", question))
            try:
                reply, [answer, *_] = await self._request(session, held, 1)
                held.add(self._asked(held, number, self._checked_ids(reply, answer)), answer)
            except ConfigError:
                raise
            except LlavaError as error:
                if isinstance(error, RequestFailure) and error.is_about_model:
                    raise ConfigError(str(error)) from None
                held.error = str(error)
                return

    async def _request(self, session: Session, held: _Held, num: int) -> tuple[Reply, list[Completion]]:
        """Return the body of the next answers of a dialogue, and the answers."""
        sampling = replace(self.sampling, n=num)
        more = {"dialogue": {"sample": held.sample}} if self.is_ours else {}
        if not self.is_ours and (held.sample or held.answers):
            seed = derived_seed(sampling.seed, held.sample, len(held.answers))
            sampling = replace(sampling, seed=seed)
        reply, answers = await self.engine.completions(session, held.prompt(), sampling, more)
        failed = next((answer for answer in answers if answer.finish == "error"), None)
        if failed is not None:
            raise GenerationError(str(failed.error))
        return reply, answers

    def _checked_ids(self, reply: Reply, answer: Completion) -> tuple[int, ...]:
        """Return the ids of the prompt of an answer.

        Raises:
            ConfigError: the server gives none, or none of the answer.
        """
        ids = prompt_ids_of(reply)
        if not ids or not answer.token_ids:
            raise ConfigError(
                f"{self.engine.server.url} gives no token ids (return_token_ids), which dialogues keep as their "
                "history; use a server that gives them, such as one of this package or vLLM"
            )
        return ids

    def _local_opening(self) -> Encoded | None:
        processor = self.engine.processor
        if processor is None:
            return None
        reader = PromptReader(processor, max_tokens=self.engine.facts.context or UNLIMITED)
        return reader.read(Prompt(self.script.conversation, self.script.images)).encoded

    def _asked(self, held: _Held, number: int, ids: tuple[int, ...]) -> Encoded:
        """Return the dialogue with the next question, which the server read as `ids`.

        Raises:
            LlavaError: it read other tokens.
        """
        known = held.encoded
        assert known is not None
        length = len(known.input_ids)
        if self.follow_ups is not None:
            expected = with_question(known, self.follow_ups[number], ends=self.ends)
            if expected.input_ids != ids:
                raise GenerationError(OTHER_TOKENS)
            return expected
        if ids[:length] != known.input_ids or len(ids) == length:
            raise GenerationError(
                "the server read the answers so far as other tokens than it wrote, so this dialogue ends; use a server "
                "of this package"
            )
        rest = len(ids) - length
        turn = known.turns[-1]
        return replace(
            known,
            input_ids=ids,
            labels=known.labels + (IGNORE_INDEX,) * rest,
            turns=(*known.turns, *(turn + 1,) * (rest - 1), turn + 2),
        )


MAX_TOGETHER = 16
"""Largest number of first answers in one request."""


def _opened(ids: tuple[int, ...], num_turns: int) -> Encoded:
    """Return the tokens of a first prompt; without a processor, all but the last count to the question."""
    return Encoded(ids, (IGNORE_INDEX,) * len(ids), (*(num_turns - 1,) * (len(ids) - 1), num_turns))
