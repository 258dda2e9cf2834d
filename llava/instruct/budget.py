"""What a run may cost: tokens estimated before, counted after, and ceilings that hold in between.

    messages  --estimate-->  reserve()  --request-->  settle(counted)        refused when a ceiling would be passed

Rule of the estimate: four tokens a message, and one for every four bytes of its UTF-8 text. English medical prose has
about that; other scripts and long numbers have more. As soon as the endpoint has counted something, estimates are
scaled by what it counted over what was estimated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from llava.errors import ConfigError

PER_MESSAGE, BYTES_PER_TOKEN = 4, 4


def estimate_tokens(messages: Iterable[Mapping[str, str]]) -> int:
    """Return the estimated number of tokens of a conversation."""
    texts = [message["content"].encode() for message in messages]
    return sum(PER_MESSAGE - -len(text) // BYTES_PER_TOKEN for text in texts)


@dataclass(frozen=True, slots=True)
class Prices:
    """Money for a million tokens, in any currency, as the endpoint's owner states it; None is unknown."""

    prompt: float | None = None
    answer: float | None = None

    def cost(self, num_prompt: float, num_answer: float) -> float | None:
        """Return what so many tokens cost; None when a price is unknown."""
        if self.prompt is None or self.answer is None:
            return None
        return (num_prompt * self.prompt + num_answer * self.answer) / 1e6


@dataclass(slots=True)
class Budget:
    """Tokens spent and reserved, against ceilings.

    Attributes:
        prices: for ceilings in money.
        max_answer_tokens: limit of each answer; so much is reserved for it.
        max_total_tokens: ceiling of prompt and answer tokens together; None is none.
        max_cost: ceiling in money; None is none.
        num_prompt: tokens spent on prompts.
        num_answer: tokens spent on answers.
    """

    prices: Prices
    max_answer_tokens: int
    max_total_tokens: int | None = None
    max_cost: float | None = None
    num_prompt: int = 0
    num_answer: int = 0
    _reserved: dict[str, int] = field(default_factory=dict)
    _counted: int = 0
    _estimated: int = 0

    def __post_init__(self) -> None:
        if self.max_cost is not None and self.prices.cost(0, 0) is None:
            raise ConfigError("--max-cost needs --price-prompt and --price-answer: what a million tokens cost you")
        values = (self.prices.prompt, self.prices.answer, self.max_cost, self.max_total_tokens)
        if self.max_answer_tokens < 1 or any(value is not None and value < 0 for value in values):
            raise ConfigError("prices and ceilings must not be negative, and an answer needs at least one token")

    @property
    def scale(self) -> float:
        """Counted over estimated tokens of the prompts so far; 1 before any was counted."""
        return self._counted / self._estimated if self._estimated else 1.0

    def spend(self, num_prompt: int, num_answer: int) -> None:
        """Count tokens that were spent, also by earlier runs."""
        self.num_prompt += num_prompt
        self.num_answer += num_answer

    def reserve(self, key: str, estimate: int) -> bool:
        """Reserve a request's tokens; False when a ceiling would be passed, with nothing reserved.

        The reserved answer is the longest possible one, so that no ceiling is passed by answers.
        """
        prompt = self.num_prompt + self.scale * (sum(self._reserved.values()) + estimate)
        answer = self.num_answer + self.max_answer_tokens * (len(self._reserved) + 1)
        cost = self.prices.cost(prompt, answer)
        if self.max_total_tokens is not None and prompt + answer > self.max_total_tokens:
            return False
        if self.max_cost is not None and cost is not None and cost > self.max_cost:
            return False
        self._reserved[key] = estimate
        return True

    def settle(self, key: str, num_prompt: int | None, num_answer: int | None, *, answer: str) -> tuple[int, int]:
        """Count an answer's tokens in the place of its reservation, and return them.

        Args:
            key: of the reservation.
            num_prompt: as the endpoint counted; None when it does not count, and the estimate stands.
            num_answer: likewise; None is estimated from `answer`.
            answer: the text.
        """
        estimate = self._reserved[key]
        if num_prompt is not None:
            self._counted += num_prompt
            self._estimated += estimate
        prompt = estimate if num_prompt is None else num_prompt
        tokens = estimate_tokens([{"content": answer}]) if num_answer is None else num_answer
        self.release(key, prompt, tokens)
        return prompt, tokens

    def release(self, key: str, num_prompt: int, num_answer: int) -> None:
        """Give back a reservation; so much was spent on it."""
        del self._reserved[key]
        self.spend(num_prompt, num_answer)
