"""Interface of engines: prompts, sampling parameters and completions.

Importing this module does not load torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, TypeVar

from llava.errors import ConfigError
from llava.samples import Conversation

if TYPE_CHECKING:
    from PIL import Image

    from llava.data.encode import Encoded

ImageRef: TypeAlias = "Image.Image | str | Path | bytes"
"""Image, path of an image file, or bytes of one."""

Finish = Literal["stop", "length", "error"]


@dataclass(frozen=True, slots=True)
class History:
    """Part of a dialogue so far, held one answer at a time.

    Attributes:
        answers: token ids of the last answers of the conversation, which the model reads instead of their texts.
        sample: number of the dialogue among those that the first answer was sampled for; its random numbers continue.
    """

    answers: tuple[tuple[int, ...], ...] = ()
    sample: int = 0

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the answers."""
        return sum(map(len, self.answers))


@dataclass(frozen=True, slots=True)
class Prompt:
    """Conversation and its images in the order of their `<image>` placeholders.

    After a question the model answers; after an answer it asks the next question, if its template can ask.

    Attributes:
        rendered: text of a prompt that is used as it is, without a template and without moving images, instead of the
            conversation; it has one `<image>` per image.
        history: with it, the answer is the next one of a dialogue, as `Engine.converse` would hold it. Only submitted
            prompts may have it.
    """

    conversation: Conversation
    images: tuple[ImageRef, ...] = ()
    rendered: str | None = None
    history: History | None = None


Alternatives: TypeAlias = "tuple[tuple[int, float], ...]"
"""Likeliest tokens at one place of an answer with their natural log-probabilities, likeliest first."""


UNLIMITED = 1 << 30
"""`max_new_tokens` of a request without a limit: the answer may fill the context, or the memory for keys and values."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters; greedy decoding by default.

    >>> Sampling(max_new_tokens=64, temperature=0.7, top_p=0.9, seed=0).n
    1

    Attributes:
        max_new_tokens: length limit of an answer in tokens.
        temperature: divisor of the logits; 0 takes the likeliest token.
        top_p: share of the probability that is sampled from, in (0, 1].
        top_k: number of likeliest tokens that are sampled from; 0 for all.
        num_beams: width of a beam search; engines may refuse more than 1.
        repetition_penalty: above 1 makes tokens of the answer so far less likely: their logits are divided by it, or
            multiplied where they are negative.
        n: number of answers to each prompt; a beam search returns its best ones.
        stop: strings that end an answer, in addition to those of the model's template; they are not part of its text.
        seed: seed of sampling; the same seed gives the same answer in every batch. None draws one.
        logprobs: whether the log-probability of every token of the answer is reported.
        top_logprobs: number of likeliest tokens that are reported with it; a beam search reports none.

    Raises:
        ConfigError: a value is out of range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    num_beams: int = 1
    repetition_penalty: float = 1.0
    n: int = 1
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            raise ConfigError(f"stop must be a tuple of strings, got the string {self.stop!r}; write ({self.stop!r},)")
        limits = {
            "max_new_tokens must be at least 1": self.max_new_tokens >= 1,
            "temperature must be 0 or above": self.temperature >= 0.0,
            "top_p must be above 0 and at most 1": 0.0 < self.top_p <= 1.0,
            "top_k must be 0 (off) or above": self.top_k >= 0,
            "num_beams must be at least 1": self.num_beams >= 1,
            "repetition_penalty must be above 0": self.repetition_penalty > 0.0,
            "n must be at least 1": self.n >= 1,
            "stop must hold no empty string": all(self.stop),
            "top_logprobs must be 0 or above": self.top_logprobs >= 0,
            "logprobs must be True with top_logprobs": self.logprobs or not self.top_logprobs,
        }
        for rule, holds in limits.items():
            if not holds:
                name = rule.split()[0]
                raise ConfigError(f"{rule}, got {getattr(self, name)!r}")
        if self.num_beams > 1 and self.temperature > 0.0:
            raise ConfigError(
                f"a beam search does not sample; num_beams={self.num_beams} needs temperature 0, got {self.temperature}"
            )
        if 1 < self.num_beams < self.n:
            raise ConfigError(f"a beam search returns at most num_beams={self.num_beams} answers, got n={self.n}")


@dataclass(frozen=True, slots=True)
class Completion:
    """Answer to a prompt.

    Attributes:
        text: the answer without stop strings, role headers and surrounding white space.
        token_ids: every generated token, the end token included.
        finish: `stop` (end token or stop string), `length` (token limit) or `error`.
        error: message, with finish `error` only.
        logprobs: natural log-probability of each token at temperature 1, if `Sampling.logprobs` is set.
        top_logprobs: the likeliest tokens at the place of each token, if `Sampling.top_logprobs` is not 0.
    """

    text: str
    token_ids: tuple[int, ...]
    finish: Finish
    error: str | None = None
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[Alternatives, ...] | None = None


@dataclass(frozen=True, slots=True)
class Script:
    """Script of a dialogue with a model: the first question, and follow-ups that do not depend on answers.

    Attributes:
        conversation: conversation that ends with the first question.
        follow_ups: the next questions, without images.
        images: images of `conversation`, in the order of their `<image>` placeholders.
        seed: seed of sampling, instead of that of `Sampling`.
    """

    conversation: Conversation
    follow_ups: tuple[str, ...] = ()
    images: tuple[ImageRef, ...] = ()
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Dialogue that was held, of 1 + `len(Script.follow_ups)` answers.

    Attributes:
        encoded: all tokens as the model read and wrote them. Its labels are the tokens that the model wrote, its turns
            number the turns of the dialogue; an end token that an answer lacks is added, without label. Empty if the
            script could not be read.
        texts: text of each answer.
        finishes: how each answer ended; `error` for those that do not fit the context or were never asked.
        logprobs: for each answer, the natural log-probability of each of its tokens under the distribution that is
            sampled from: logits divided by the temperature (1 for greedy answers), without the image placeholder; none
            with a repetition penalty, after which tokens are sampled from other logits.
        error: why answers are missing, else None.
    """

    encoded: Encoded
    texts: tuple[str, ...]
    finishes: tuple[Finish, ...]
    logprobs: tuple[tuple[float, ...], ...]
    error: str | None = None


Answer = TypeVar("Answer", Completion, Dialogue)


def sampling_of_each(prompts: Sequence[object], sampling: Sampling | Sequence[Sampling]) -> list[Sampling]:
    """Return the sampling of each prompt.

    Raises:
        ConfigError: there are several, but not one for each prompt.
    """
    if isinstance(sampling, Sampling):
        return [sampling] * len(prompts)
    if len(sampling) != len(prompts):
        raise ConfigError(
            f"got {len(sampling)} sampling settings for {len(prompts)} prompts; pass one, or one for each"
        )
    return list(sampling)


def num_distinct(sampling: Sampling) -> int:
    """Return the number of answers to compute: greedy answers are equal, so one is computed and repeated."""
    return 1 if sampling.temperature == 0.0 else sampling.n


def repeated(answers: list[Answer], num: int) -> list[Answer]:
    """Return `num` answers, of which `num` or one were computed."""
    return answers * (num // len(answers))


class Engine(Protocol):
    """Protocol of engines: a model in this process, or a server."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling | Sequence[Sampling]) -> list[list[Completion]]:
        """Return `Sampling.n` completions for each prompt, in the order of the prompts.

        A prompt that cannot be answered is a completion with finish `error`; the others are answered.

        Args:
            prompts: the prompts.
            sampling: one for all prompts, or one for each.

        Raises:
            ConfigError: the numbers of prompts and of sampling settings differ.
        """
        ...

    def converse(self, scripts: Sequence[Script], sampling: Sampling | Sequence[Sampling]) -> list[list[Dialogue]]:
        """Hold `Sampling.n` dialogues for each script; the model's answers stay in the history as tokens.

        Args:
            scripts: the scripts.
            sampling: one for all scripts, or one for each; limits hold for each answer.

        Raises:
            ConfigError: answers of the template do not end with a token, or `sampling` asks for a beam search, or for
                the log-probabilities of a truncated distribution.
        """
        ...

    def stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[str]:
        """Yield the answer so far each time it has grown; the last value is the text of `generate`.

        Closing the iterator cancels the request.

        Raises:
            GenerationError: the prompt cannot be answered.
        """
        ...
