"""Interface of chat templates for encoding, training, prompts and stop rules.

Conversation --render--> segments (text, trained, turn)       a whole conversation
Conversation --open--> segments up to a header                what the model continues: an answer, or a question
question --continuation--> segments                           from the end of a generated answer to the next header
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from llava.samples import Conversation, Turn


@dataclass(frozen=True, slots=True)
class Segment:
    """Part of the rendered text.

    Attributes:
        text: the characters.
        trained: whether tokens that start in this part are supervised.
        turn: index of the turn in the conversation, -1 for the system prompt.
    """

    text: str
    trained: bool
    turn: int


class ChatTemplate(Protocol):
    """Text around the turns of a conversation, and which of it is trained.

    Attributes:
        name: name that is saved with a model.
        stops: strings that end an answer or an asked question.
        echoes: role headers that models of this template repeat before an answer.
        trains_empty: whether answers without text are trained.
    """

    @property
    def name(self) -> str: ...

    @property
    def stops(self) -> tuple[str, ...]: ...

    @property
    def echoes(self) -> tuple[str, ...]: ...

    @property
    def trains_empty(self) -> bool: ...

    def header(self) -> str:
        """Return the text between a question and its answer, with which a prompt ends."""
        ...

    def end_mark(self) -> str:
        """Return the trained text after an answer."""
        ...

    def asked_header(self) -> str | None:
        """Return the text before a question that the model asks; None if it cannot ask."""
        ...

    def trains(self, turn: Turn) -> bool:
        """Return whether an answer, with its header and end mark, may be trained."""
        ...

    def render(self, conversation: Conversation) -> tuple[Segment, ...]:
        """Return the training text of a conversation."""
        ...

    def open(self, conversation: Conversation) -> tuple[Segment, ...]:
        """Return the text of a prompt, none of it trained.

        It ends with `header` after a question, and with `asked_header` after an answer.

        Raises:
            DataError: the conversation has no turn, or ends with an answer and the template cannot ask.
        """
        ...

    def continuation(self, question: Turn, *, index: int, ended: bool = True) -> tuple[Segment, ...]:
        """Return the text from the end of an answer through the next question to `header`, none of it trained.

        Args:
            question: the next question.
            index: index of that turn in the conversation.
            ended: whether the answer already has its end mark; otherwise the text starts with it.
        """
        ...


def answer_start(text: str, echoes: Sequence[str]) -> int:
    """Return the start of the answer in generated text, after white space and repeated role headers."""
    start = _after_space(text, 0)
    while (echo := next((echo for echo in echoes if text.startswith(echo, start)), None)) is not None:
        start = _after_space(text, start + len(echo))
    return start


def first_stop(text: str, stops: Sequence[str], *, start: int) -> int | None:
    """Return the position of the first stop string at or after `start`; None without one."""
    return min((place for stop in stops if (place := text.find(stop, start)) >= 0), default=None)


def _after_space(text: str, start: int) -> int:
    return len(text) - len(text[start:].lstrip())
