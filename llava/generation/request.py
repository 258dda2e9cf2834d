"""Unfinished answers in the scheduler: tokens so far, text, limits, and listeners."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from llava.constants import IGNORE_INDEX
from llava.data.encode import Encoded
from llava.generation.prompt_encoder import EncodedPrompt
from llava.generation.protocol import Alternatives, Completion, Finish, Prompt, Sampling
from llava.generation.sampling import TokenDraw
from llava.generation.stopping import AnswerText


@dataclass(slots=True)
class PromptSource:
    """Prompt that is encoded once for all its samples when needed, and released when the last one ends.

    Attributes:
        prompt: the prompt.
        reading: its tokens and images, once read.
        pixels: model input of its images by key, if they were decoded in advance.
        num_users: unfinished samples of the prompt.
    """

    prompt: Prompt
    reading: EncodedPrompt | None = None
    pixels: Mapping[str, Tensor] | None = None
    num_users: int = 1

    def release(self) -> None:
        """Forget what was read when the last sample is over."""
        self.num_users -= 1
        if self.num_users <= 0:
            self.reading = self.pixels = None


@dataclass(slots=True, eq=False)
class Request:
    """Unfinished answer to a prompt.

    Attributes:
        token_ids: the answer so far; grows at its end only, and after `logprobs`, so other threads may read it.
        limit: largest number of tokens of the answer.
        num_cached: tokens of the prompt whose keys and values were kept from other requests.
        cause: exception behind a completion with finish `error`.
        tree: name of the tree of the prefix cache that it uses.
        pending: ids that a dialogue has still to read: its last token and the next question.
        is_dialogue: whether `logprobs` are those of the distribution that is sampled from, for every token; none with
            a repetition penalty.
        stem: name and length of the first tokens of its prompt, stored once for all sequences that share them.
        is_suspect: whether a prefill with this request failed; it is then tried alone.
        listener: called by the owner of the model, after each step that changed the request.
    """

    source: PromptSource
    sampling: Sampling
    draw: TokenDraw
    text: AnswerText
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[Alternatives] = field(default_factory=list)
    encoded: Encoded | None = None
    limit: int = 0
    num_cached: int = 0
    completion: Completion | None = None
    cause: Exception | None = None
    is_cancelled: bool = False
    tree: str = ""
    pending: tuple[int, ...] = ()
    is_dialogue: bool = False
    is_suspect: bool = False
    stem: tuple[Hashable, int] | None = None
    listener: Callable[[Request], None] | None = None

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

    def fail(self, reason: str, cause: Exception | None = None) -> None:
        """Finish with an error."""
        self.source.release()
        self.cause = cause
        self.completion = Completion("", tuple(self.token_ids), "error", error=reason)

    def cancel(self) -> None:
        """Mark the request as unwanted."""
        if not self.is_over:
            self.is_cancelled = True
            self.source.release()

    def _finish(self, finish: Finish) -> None:
        self.source.release()
        logprobs = tuple(self.logprobs) if self.sampling.logprobs else None
        top = tuple(self.top_logprobs) if self.sampling.top_logprobs else None
        text = self.text.final(self.token_ids)
        self.completion = Completion(text, tuple(self.token_ids), finish, None, logprobs, top)

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
