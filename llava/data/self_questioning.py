"""Questions that a model learns to ask: the trained later questions of a row, redrawn each epoch.

row, seed, epoch --QuestionDraws.apply--> conversation in which some later questions have `train=True`
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

from llava.chat_template import ChatTemplate
from llava.conversation import asking_templates
from llava.errors import ConfigError
from llava.samples import Conversation, Turn

DEFAULT_RATE = 0.3
"""Share of the later questions that a template that asks trains without `--sq_r`, as in the original trainer."""


def with_questions(
    conversation: Conversation, *, rate: float, draw: Callable[[], float], has_image: bool
) -> Conversation:
    """Return a conversation in which some of its later questions are trained.

    Only the questions of a row with an image, after the first one, may be; `draw` is called once for each of them, in
    order. A question with a flag `train` of its own keeps it, and costs no draw.

    Args:
        conversation: the turns.
        rate: probability of each question.
        draw: returns a random number in [0, 1).
        has_image: whether the row has an image.
    """
    if not has_image:
        return conversation

    def drawn(turn: Turn) -> Turn:
        if turn.role != "human" or turn.train is not None:
            return turn
        return replace(turn, train=True) if draw() < rate else turn

    first, *later = conversation.turns or (None,)
    return conversation if first is None else replace(conversation, turns=(first, *map(drawn, later)))


@dataclass(frozen=True, slots=True)
class QuestionDraws:
    """Settings for drawing trained questions.

    Attributes:
        rate: share of the later questions; None for `DEFAULT_RATE` where the template asks, else 0.
        seed: seed of the draws, which depend on it, the epoch and the row only.
        shared: draw from Python's global stream instead, in the order in which rows are read.
    """

    rate: float | None = None
    seed: int = 0
    shared: bool = False

    def fitting(self, template: ChatTemplate) -> Self | None:
        """Return the draws for a template, or None if no question is drawn.

        Raises:
            ConfigError: a share above 0 with a template that cannot ask.
        """
        if template.asked_header() is not None:
            return replace(self, rate=DEFAULT_RATE if self.rate is None else self.rate) if self.rate != 0 else None
        if self.rate:
            raise ConfigError(
                f"--sq-r {self.rate:g}: template {template.name} has no header with which a model asks; use --version "
                f"{' or '.join(asking_templates())}, or omit --sq-r"
            )
        return None

    def apply(self, conversation: Conversation, *, has_image: bool, place: str) -> Conversation:
        """Return a conversation with its drawn questions trained; `place` names the epoch and the row."""
        draw = random.random if self.shared else random.Random(f"{self.seed}/{place}").random
        return with_questions(conversation, rate=self.rate or 0.0, draw=draw, has_image=has_image)
