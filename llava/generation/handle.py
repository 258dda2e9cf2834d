"""Handle of a submitted prompt: events of its answers since the client's last call.

owner of the model --tells that an answer changed--> Handle --take, iterate--> events, one per answer that changed

Nothing is queued: a handle remembers how far its client has read, and an event covers everything since then. A slow
client therefore gets fewer and larger pieces, holds no memory beyond the answers, and costs the model's thread nothing;
text is decoded in the thread of the client.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from llava.generation.protocol import Alternatives, Completion, Finish
from llava.generation.request import Request
from llava.generation.stopping import AnswerText


@dataclass(frozen=True, slots=True)
class Counts:
    """Numbers of prompt and answer tokens of a submitted prompt.

    Attributes:
        prompt: tokens of the prompt, images included; 0 before it was read.
        cached: those of them that were not computed for this prompt, but kept from others.
        generated: tokens of all its answers so far, end tokens included.
    """

    prompt: int = 0
    cached: int = 0
    generated: int = 0


@dataclass(frozen=True, slots=True)
class Event:
    """Event: progress of one answer since the previous event.

    Attributes:
        index: number of the answer, 0 to `Sampling.n` - 1.
        text: new text; the pieces of an answer joined are its text.
        answer: text of the answer so far; each begins with the one before.
        token_ids: new tokens, an end token included.
        logprobs: their log-probabilities, if `Sampling.logprobs` is set.
        top_logprobs: the likeliest tokens at their places, if `Sampling.top_logprobs` is not 0.
        finish: how the answer ended, in its last event; else None.
        error: reason of finish `error`.
        cause: exception behind it, if any: `DataError` for a prompt that cannot be read, `PromptTooLongError` for one
            that does not fit the context.
        counts: tokens of the whole prompt so far.
        completion: the whole answer, in its last event.
    """

    index: int
    text: str
    answer: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top_logprobs: tuple[Alternatives, ...]
    finish: Finish | None
    error: str | None
    cause: Exception | None
    counts: Counts
    completion: Completion | None


@dataclass(slots=True)
class _Shown:
    """Part of one answer that the client has received."""

    num_tokens: int = 0
    text: str = ""
    is_over: bool = False
    growing: AnswerText | None = None


class Handle:
    """Answers to one submitted prompt; any thread may use it.

    >>> from llava.generation.engine import LocalEngine
    >>> from llava.generation.protocol import Sampling
    >>> engine = LocalEngine(model, processor)
    >>> handle = engine.submit(prompt, Sampling(max_new_tokens=8))
    >>> [[answer]] = engine.generate([prompt], Sampling(max_new_tokens=8))
    >>> "".join(event.text for event in handle).strip() == answer.text
    True
    """

    def __init__(
        self,
        num_answers: int,
        cancel: Callable[[Handle], None],
        notify: Callable[[], None] | None = None,
    ) -> None:
        """Create the handle of a prompt that is not read yet; see `Driver.submit`."""
        self.num_answers = num_answers
        self.is_cancelled = False
        self.failure: Completion | None = None
        self.cause: Exception | None = None
        self.requests: list[Request] = []
        self._cancel = cancel
        self._notify = notify
        self._shown = [_Shown() for _ in range(num_answers)]
        self._changed: set[int] = set()
        self._news = threading.Condition()
        self._taking = threading.Lock()

    @property
    def is_over(self) -> bool:
        """Whether every answer has ended, or the prompt was canceled."""
        if self.is_cancelled or self.failure is not None:
            return True
        return bool(self.requests) and all(request.is_over for request in self.requests)

    @property
    def counts(self) -> Counts:
        """Tokens so far."""
        if not self.requests or self.requests[0].encoded is None:
            return Counts()
        first = self.requests[0]
        assert first.encoded is not None
        generated = sum(len(self._request(index).token_ids) for index in range(self.num_answers))
        return Counts(len(first.encoded.input_ids), first.num_cached, generated)

    def take(self) -> list[Event]:
        """Return the events since the last call, at most one per answer, without waiting."""
        # Two locks: the owner of the model never waits for a client that decodes text.
        with self._taking:
            with self._news:
                changed, self._changed = sorted(self._changed), set()
            if self.is_cancelled:
                return []
            return [event for index in changed if (event := self._event(index)) is not None]

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for an event; return False after `timeout` seconds without one."""
        with self._news:
            return self._news.wait_for(lambda: bool(self._changed) or self.is_cancelled, timeout)

    def __iter__(self) -> Iterator[Event]:
        """Yield events as they occur, until every answer has ended or the prompt is canceled."""
        while not all(shown.is_over for shown in self._shown):
            self.wait()
            if self.is_cancelled:
                return
            yield from self.take()

    def cancel(self) -> None:
        """Drop the prompt: its answers end without another event and their slots are free at the next step."""
        with self._news:
            if self.is_cancelled:
                return
            self.is_cancelled = True
            self._news.notify_all()
        self._cancel(self)

    def completions(self) -> list[Completion]:
        """Wait for the end and return all answers; those of a canceled prompt are errors."""
        with self._news:
            self._news.wait_for(lambda: self.is_over)
        return [self._completion(index) or CANCELLED for index in range(self.num_answers)]

    def started(self, requests: Sequence[Request]) -> None:
        """Attach the requests of a prompt that was read: one for each answer, or one for all."""
        with self._news:
            self.requests = list(requests)

    def failed(self, reason: str, cause: Exception | None = None) -> None:
        """End all answers with an error."""
        with self._news:
            self.failure, self.cause = Completion("", (), "error", error=reason), cause
        self._tell(range(self.num_answers))

    def heard(self, request: Request) -> None:
        """Record that a request received a token or ended; called by the owner of the model."""
        if len(self.requests) == self.num_answers:
            self._tell([self.requests.index(request)])
        else:
            self._tell(range(self.num_answers))

    def _tell(self, answers: Sequence[int]) -> None:
        with self._news:
            had_news = bool(self._changed)
            self._changed.update(answers)
            self._news.notify_all()
        if self._notify is not None and not had_news:
            self._notify()

    def _request(self, index: int) -> Request:
        # Greedy answers are equal, so one request stands for all of them.
        return self.requests[index if len(self.requests) == self.num_answers else 0]

    def _completion(self, index: int) -> Completion | None:
        return self.failure or (self._request(index).completion if self.requests else None)

    def _event(self, index: int) -> Event | None:
        shown = self._shown[index]
        if shown.is_over:
            return None
        # Read the completion first, so that the tokens read next include all of its own.
        completion = self._completion(index)
        request = self._request(index) if self.requests else None
        token_ids = tuple(request.token_ids) if request is not None else ()
        answer = self._answer(shown, completion, request, token_ids)
        new = slice(shown.num_tokens, len(token_ids))
        logprobs = tuple(request.logprobs[new]) if request is not None and request.sampling.logprobs else ()
        piece = answer[len(shown.text) :]
        shown.num_tokens, shown.text, shown.is_over = len(token_ids), answer, completion is not None
        return Event(
            index=index,
            text=piece,
            answer=answer,
            token_ids=token_ids[new],
            logprobs=logprobs,
            top_logprobs=() if request is None else tuple(request.top_logprobs[new]),
            finish=None if completion is None else completion.finish,
            error=None if completion is None else completion.error,
            cause=self.cause if request is None else request.cause,
            counts=self.counts,
            completion=completion,
        )

    def _answer(
        self, shown: _Shown, completion: Completion | None, request: Request | None, token_ids: Sequence[int]
    ) -> str:
        """Return the text so far, which begins with the part that the client has received."""
        if completion is not None:
            return completion.text if completion.error is None else shown.text
        assert request is not None
        if shown.growing is None:
            shown.growing = AnswerText(request.text.rule, request.text.decode)
        text = shown.growing.so_far(token_ids) if token_ids else ""
        return text if text.startswith(shown.text) else shown.text


CANCELLED = Completion("", (), "error", error="the request was canceled")
"""Answer to a prompt that was canceled."""
