"""Chats of the published snippets: `conv_templates["v1"].copy()`, `append_message`, `get_prompt`.

chat = conv_templates["v1"].copy()
chat.append_message(chat.roles[0], "<image>\\nWhat is shown?")
chat.append_message(chat.roles[1], None)
chat.get_prompt()  # "... USER: <image>\\nWhat is shown? ASSISTANT:"
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum, auto

from llava.conversation import TEMPLATES, ConversationTemplate
from llava.errors import ConfigError
from llava.samples import Conversation, Turn
from llava.template_forms import SLOT, Frame


class SeparatorStyle(Enum):
    """Whether one string separates all turns (`SINGLE`), or another one ends answers (`TWO`)."""

    SINGLE = auto()
    TWO = auto()


@dataclass(slots=True)
class PublishedChat:
    """Messages under a template, with the attributes that the snippets read.

    Attributes:
        template: the template.
        messages: pairs of role and text; None as text of the last one asks for an answer.
        roles: names of user and assistant.
    """

    template: ConversationTemplate
    roles: tuple[str, str]
    messages: list[list[str | None]] = field(default_factory=list)

    @property
    def sep_style(self) -> SeparatorStyle:
        """How turns are separated."""
        return SeparatorStyle.SINGLE if self.template.stops == ("###",) else SeparatorStyle.TWO

    @property
    def sep(self) -> str:
        """Separator of turns."""
        return self.template.stops[0] if self.sep_style is SeparatorStyle.SINGLE else " "

    @property
    def sep2(self) -> str:
        """String that ends an answer."""
        return self.template.stops[0]

    def copy(self) -> PublishedChat:
        """Return an independent chat with the same messages."""
        return replace(self, messages=[list(message) for message in self.messages])

    def append_message(self, role: str, message: str | None) -> None:
        """Add a message of one of `roles`.

        Raises:
            ConfigError: the role is unknown.
        """
        if role not in self.roles:
            raise ConfigError(f"unknown role {role!r}; expected {' or '.join(self.roles)}")
        self.messages.append([role, message])

    def get_prompt(self) -> str:
        """Return the text; it ends with the header of an answer if the last message is None."""
        names = {self.roles[0]: "human", self.roles[1]: "gpt"}
        turns = tuple(Turn(names[str(role)], text) for role, text in self.messages if text is not None)  # type: ignore[arg-type]
        conversation = Conversation(turns)
        if self.messages and self.messages[-1][1] is None:
            return self.template.prompt(conversation)
        return "".join(segment.text for segment in self.template.render(conversation))


def _role(frame: Frame) -> str:
    """Return the name of a role: the text before the slot of its frame, without separators."""
    return "".join(part for part, _ in frame).split(SLOT)[0].strip(" \n#:")


def chat_of(template: ConversationTemplate) -> PublishedChat:
    """Return an empty chat of a template."""
    human, gpt = _role(template.form.human), _role(template.form.gpt)
    return PublishedChat(template, (human or "USER", gpt or "ASSISTANT"))


conv_templates = {name: chat_of(template) for name, template in TEMPLATES.items()}
"""Chats by name of the template; copy one before adding messages."""
