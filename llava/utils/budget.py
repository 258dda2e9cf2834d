"""Budget of a run in tokens and money: estimated before a request, counted after it.

    messages  --estimate-->  reserve()  --request-->  settle(counted)        refused if a limit would be exceeded

The estimate is four tokens per message plus one per four bytes of its UTF-8 text, which fits English medical prose;
other scripts and long numbers need more. An image counts by its tiles, as the large endpoints charge it. Once the
endpoint has counted tokens, estimates are scaled by the ratio of counted to estimated tokens.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llava.errors import ConfigError

PER_MESSAGE, BYTES_PER_TOKEN = 4, 4

PER_IMAGE, PER_TILE, TILE = 85, 170, 512
"""Tokens of an image and of each of its tiles, and the side of a tile in pixels."""

LONGEST_SIDE, SHORTEST_SIDE = 2048, 768
"""An image is scaled down to these largest sides before it is divided into tiles."""


def estimate_tokens(messages: Iterable[Mapping[str, Any]]) -> int:
    """Return the estimated number of tokens of a conversation; a content is text or a list of parts."""
    return sum(PER_MESSAGE + _content_tokens(message["content"]) for message in messages)


def _content_tokens(content: Any) -> int:
    if isinstance(content, str):
        return -(-len(content.encode()) // BYTES_PER_TOKEN)
    return sum(_part_tokens(part) for part in content)


def _part_tokens(part: Mapping[str, Any]) -> int:
    if part.get("type") == "image_url":
        return image_tokens(*_size_of(str(part["image_url"]["url"])))
    return _content_tokens(str(part.get("text", "")))


def image_tokens(width: int, height: int) -> int:
    """Return the estimated number of tokens of an image of this size."""
    scale = min(1.0, LONGEST_SIDE / max(width, height))
    scale *= min(1.0, SHORTEST_SIDE / (scale * min(width, height)))
    return PER_IMAGE + PER_TILE * math.ceil(scale * width / TILE) * math.ceil(scale * height / TILE)


def _size_of(url: str) -> tuple[int, int]:
    """Return width and height of the image in a data URL; of other addresses the largest that is charged."""
    from PIL import Image, UnidentifiedImageError

    head, _, data = url.partition(";base64,")
    try:
        if not head.startswith("data:"):
            raise ValueError("not a data URL")
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            return image.size
    except (ValueError, binascii.Error, OSError, UnidentifiedImageError):
        return LONGEST_SIDE, SHORTEST_SIDE


@dataclass(frozen=True, slots=True)
class Prices:
    """Prices of a million tokens, in any currency; None if unknown."""

    prompt: float | None = None
    answer: float | None = None

    def cost(self, num_prompt: float, num_answer: float) -> float | None:
        """Return the cost of a number of tokens; None if a price is unknown."""
        if self.prompt is None or self.answer is None:
            return None
        return (num_prompt * self.prompt + num_answer * self.answer) / 1e6


@dataclass(slots=True)
class Budget:
    """Spent and reserved tokens with their limits.

    Attributes:
        prices: prices, needed for a limit of the cost.
        max_answer_tokens: limit of each answer; a reservation includes this number of tokens.
        max_total_tokens: limit of prompt and answer tokens together; None: no limit.
        max_cost: limit of the cost; None: no limit.
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
            raise ConfigError("--max-cost requires --price-prompt and --price-answer, the prices of a million tokens")
        values = (self.prices.prompt, self.prices.answer, self.max_cost, self.max_total_tokens)
        if self.max_answer_tokens < 1 or any(value is not None and value < 0 for value in values):
            raise ConfigError(
                "--price-prompt, --price-answer, --max-cost and --max-total-tokens must not be negative, and "
                "--max-answer-tokens must be at least 1"
            )

    @property
    def scale(self) -> float:
        """Ratio of counted to estimated prompt tokens so far; 1 before the first count."""
        return self._counted / self._estimated if self._estimated else 1.0

    def spend(self, num_prompt: int, num_answer: int) -> None:
        """Add spent tokens, including those of earlier runs."""
        self.num_prompt += num_prompt
        self.num_answer += num_answer

    def reserve(self, key: str, estimate: int) -> bool:
        """Reserve the tokens of a request; False, without a reservation, if a limit would be exceeded.

        The reservation includes an answer of maximum length, so answers cannot exceed a limit.
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
        """Replace a reservation by the tokens of the answer, and return them.

        Args:
            key: key of the reservation.
            num_prompt: prompt tokens as counted by the endpoint; None to use the estimate.
            num_answer: answer tokens as counted by the endpoint; None to estimate them from `answer`.
            answer: text of the answer.
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
        """Remove a reservation and add the tokens that were spent on it."""
        del self._reserved[key]
        self.spend(num_prompt, num_answer)
