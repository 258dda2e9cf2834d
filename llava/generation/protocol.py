"""Interface of engines: prompts, sampling parameters and completions.

Importing this module does not load torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from llava.errors import ConfigError
from llava.samples import Conversation

if TYPE_CHECKING:
    from PIL import Image

ImageRef: TypeAlias = "Image.Image | str | Path | bytes"
"""Image, path of an image file, or bytes of one."""

Finish = Literal["stop", "length", "error"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Conversation that ends with a question, and its images in the order of their `<image>` placeholders."""

    conversation: Conversation
    images: tuple[ImageRef, ...] = ()


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters; greedy decoding by default.

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
    """

    text: str
    token_ids: tuple[int, ...]
    finish: Finish
    error: str | None = None
    logprobs: tuple[float, ...] | None = None


class Engine(Protocol):
    """Anything that answers prompts: a model in this process, or a server."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        """Return `sampling.n` completions for each prompt, in the order of the prompts.

        A prompt that cannot be answered is a completion with finish `error`; the others are answered.
        """
        ...

    def stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[str]:
        """Yield the answer so far each time it has grown; the last value is the text of `generate`.

        Closing the iterator cancels the request.

        Raises:
            GenerationError: the prompt cannot be answered.
        """
        ...
