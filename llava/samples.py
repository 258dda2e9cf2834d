"""The records that flow through every part: a `Sample` is one conversation about zero or more images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["human", "gpt"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One message; `train` overrides whether the template trains it (None: as the template says)."""

    role: Role
    text: str
    train: bool | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order; `system` replaces the template's system text when given."""

    turns: tuple[Turn, ...]
    system: str | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation, the images it shows (paths or names, in order of their place holders) and the row's other fields."""

    id: str
    conversation: Conversation
    images: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
