"""Jinja chat template of a tokenizer, rendered by transformers, as a conversation template.

    Conversation --messages--> transformers' renderer --marks or differences--> segments (text, trained, turn)

What is trained is read from the generation marks of the template (`{% generation %}`, as for the assistant mask of
transformers). Without marks it is the difference of two renderings: an answer starts where the prompt before it ends,
and ends with the text that also follows the last answer. A template for which this is ambiguous is refused.

The text of a template contains its begin-of-text token, so none is added, and images are placeholders in the text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from llava.chat_families import FAMILIES
from llava.chat_template import Segment, first_stop
from llava.constants import IMAGE_TOKEN
from llava.conversation import TEMPLATES, ConversationTemplate, get_template, lead_of_images
from llava.errors import ConfigError, DataError
from llava.samples import Conversation, Turn
from llava.utils.jsonl import read_text
from llava.utils.lookup import lookup

AUTO = "auto"
"""Name of the template that a tokenizer holds."""

ASKING = "_sq"
"""End of the name of a template in which a model also asks: `auto_sq`, `qwen3_sq`."""

ROLES = {"human": "user", "gpt": "assistant"}

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")

PROBE = (Turn("human", "qv"), Turn("gpt", "av"), Turn("human", "qw"), Turn("gpt", "aw"))
"""Conversation whose rendering reveals the parts of a template; its words occur in no template."""

Message = dict[str, str]


@dataclass(frozen=True)
class JinjaTemplate:
    """Jinja chat template, with the interface of `chat_template.ChatTemplate`.

    Attributes:
        source: text of the template.
        tokens: special tokens by their names in templates, for example `eos_token`.
        special: texts of all special tokens, which end answers.
        name: `auto`, or a key of `FAMILIES`.
        system: system prompt; empty for that of the template.
        trains_empty: see `ConversationTemplate`.
        echoes: none; the header of an answer is part of the prompt.
        asks: whether a model may ask the next question, after the header of a user (names that end with `_sq`).
    """

    source: str
    tokens: Mapping[str, str] = field(hash=False)
    special: frozenset[str] = frozenset()
    name: str = AUTO
    system: str = ""
    trains_empty: bool = False
    echoes: tuple[str, ...] = ()
    asks: bool = False

    @classmethod
    def of(cls, tokenizer: Any, name: str = AUTO) -> JinjaTemplate:
        """Return the template of a tokenizer, or that of a family with its tokens.

        Raises:
            ConfigError: it has none, or the template cannot be used.
        """
        family = name.removesuffix(ASKING)
        source = tokenizer.chat_template if family == AUTO else FAMILIES[family]
        if isinstance(source, dict):
            source = source.get("default")
        if not source:
            raise ConfigError(
                f"the tokenizer of {tokenizer.name_or_path or 'the model'} has no chat template; use --version NAME or "
                "--version FILE.jinja"
            )
        special = {str(token) for token in tokenizer.added_tokens_decoder.values()} - {IMAGE_TOKEN}
        tokens = {name: text for name, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}
        made = cls(source, tokens, frozenset(special), name, asks=name.endswith(ASKING))
        made.check()
        return made

    def with_system(self, text: str) -> JinjaTemplate:
        """Return this template with another system prompt."""
        return replace(self, system=text)

    def check(self) -> None:
        """Render a small conversation.

        Raises:
            ConfigError: the template cannot be rendered, or what it trains is ambiguous.
        """
        turns = (replace(PROBE[0], text=f"{IMAGE_TOKEN}\nqv"), *PROBE[1:])
        try:
            segments = self.render(Conversation(turns))
        except DataError as error:
            raise ConfigError(f"the chat template cannot be used: {error}; use --version NAME") from None
        text, trained = ("".join(s.text for s in segments if s.trained or every) for every in (True, False))
        lost = [turn.text for turn in turns if turn.text not in text]
        if lost or "av" not in trained or "aw" not in trained or "qv" in trained or "qw" in trained:
            what = f"it leaves out {', '.join(map(repr, lost))}" if lost else "its marks do not cover the answers"
            raise ConfigError(f"the chat template cannot be used: {what}; use --version NAME or another FILE.jinja")

    @property
    def has_marks(self) -> bool:
        """Whether the template marks what a model generates."""
        return _MARKS.search(self.source) is not None

    @cached_property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer: the first special token, or the text, that follows every answer."""
        after = self.end_mark()
        first = next(iter(self._leading_special(after)), after.strip())
        return tuple(dict.fromkeys(mark for mark in (first, self.tokens.get("eos_token", "")) if mark))

    def header(self) -> str:
        """Return the text between a question and its answer, with which a prompt ends."""
        return self._rendered(self._messages(Conversation(PROBE[:1])), prompt=True)[0].rpartition("qv")[2]

    def end_mark(self) -> str:
        """Return the trained text after an answer."""
        segments = self.render(Conversation(PROBE))
        return "".join(part.text for part in segments if part.turn == 1 and part.trained).rpartition("av")[2]

    def asked_header(self) -> str | None:
        """Return the text before a question that the model asks; None if it does not ask."""
        if not self.asks:
            return None
        text = self._rendered(self._messages(Conversation(PROBE)))[0]
        return text.partition("av")[2].partition("qw")[0].removeprefix(self.end_mark())

    def continuation(self, question: Turn, *, index: int, ended: bool = True) -> tuple[Segment, ...]:
        """Return the text from the end of an answer through the next question to `header`; see `ChatTemplate`."""
        turns = (*PROBE[:2], replace(question, train=None))
        text = self._rendered(self._messages(Conversation(turns)), prompt=True)[0].partition("av")[2]
        return (Segment(text.removeprefix(self.end_mark()) if ended else text, False, index),)

    def trains(self, turn: Turn) -> bool:
        """Return whether an answer, with its end mark, may be trained."""
        return self.trains_empty or not turn.is_empty if turn.train is None else turn.train

    def render(self, conversation: Conversation) -> tuple[Segment, ...]:
        """Return the training text as segments.

        Raises:
            DataError: the template refuses the conversation, or what is trained is ambiguous.
        """
        messages = self._messages(conversation)
        text, marks = self._rendered(messages, marks=self.has_marks)
        shift = len(messages) - len(conversation.turns)
        answers = [index for index, turn in enumerate(conversation.turns) if turn.role == "gpt"]
        if self.has_marks:
            spans = _merged(marks)
            if len(spans) != len(answers):
                raise DataError(
                    f"the chat template marks {len(spans)} answers of a conversation with {len(answers)}, so what is "
                    "trained is ambiguous"
                )
        else:
            spans = [self._span(text, messages, index + shift) for index in answers]
        return tuple(self._segments(text, conversation, dict(zip(answers, spans, strict=True))))

    def open(self, conversation: Conversation) -> tuple[Segment, ...]:
        """Return the segments of `prompt`; none is trained.

        Raises:
            DataError: the conversation has no turn, ends with an answer and the template does not ask, or is refused.
        """
        return (Segment(self.prompt(conversation), False, len(conversation.turns)),)

    def prompt(self, conversation: Conversation) -> str:
        """Return the training text up to the next answer, or up to the next question after an answer."""
        if conversation.turns and conversation.turns[-1].role == "human":
            return self._rendered(self._messages(conversation), prompt=True)[0]
        header = self.asked_header()
        if not conversation.turns or header is None:
            hint = " (a template whose name ends with _sq can ask one itself)" if conversation.turns else ""
            raise DataError(f"the conversation does not end with a question; remove the last answer or add one{hint}")
        messages = self._messages(replace(conversation, turns=(*conversation.turns, Turn("human", "qw"))))
        return self._rendered(messages)[0].rpartition("qw")[0]

    def published_prompt(self, conversation: Conversation) -> str:
        """Return the prompt; chat templates have no other one."""
        return self.prompt(conversation)

    def parse(self, text: str) -> str:
        """Return the answer in generated text, up to the first end mark."""
        return text[: first_stop(text, self.stops, start=0)].strip()

    def _messages(self, conversation: Conversation) -> list[Message]:
        system = self.system if conversation.system is None else conversation.system
        opening = [{"role": "system", "content": system}] if system else []
        return opening + [{"role": ROLES[turn.role], "content": turn.text} for turn in conversation.turns]

    def _rendered(
        self, messages: Sequence[Message], *, prompt: bool = False, marks: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of messages, and the spans of the generation marks if requested.

        Raises:
            DataError: the template refuses the messages, or is not valid.
        """
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        tokens: Any = dict(self.tokens)
        try:
            rendered: Any = render_jinja_template(
                [list(messages)],
                chat_template=self.source,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=marks,
                **tokens,
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise DataError(f"the chat template refuses the conversation: {reason}") from None
        found, spans = rendered
        return found[0], list(spans[0]) if marks else []

    def _span(self, text: str, messages: Sequence[Message], index: int) -> tuple[int, int]:
        """Return the characters of an answer with its end mark, from differences of renderings.

        Raises:
            DataError: they are ambiguous.
        """
        prompt = self._rendered(messages[:index], prompt=True)[0]
        if not text.startswith(prompt):
            raise DataError(
                "the chat template renders earlier turns differently once an answer follows, and has no generation "
                "marks, so what is trained is ambiguous"
            )
        if index == len(messages) - 1:
            return len(prompt), len(text)
        until = self._rendered(messages[: index + 1])[0]
        if text.startswith(until) and len(until) > len(prompt):
            return len(prompt), len(until)
        answer = messages[index]["content"].strip()
        start = text.find(answer, len(prompt))
        tail = until[until.rfind(answer) + len(answer) :]
        after = _common_start(text[start + len(answer) :], tail)
        end_mark = "".join(self._leading_special(after, with_space=True))
        if start < 0 or not end_mark.strip():
            raise DataError(
                "the chat template rewrites answers or does not end them with a token, and has no generation marks, so "
                "what is trained is ambiguous"
            )
        return len(prompt), start + len(answer) + len(end_mark)

    def _leading_special(self, text: str, *, with_space: bool = False) -> list[str]:
        """Return the special tokens (and white space) that a text starts with."""
        found: list[str] = []
        rest = text
        while rest:
            mark = next((token for token in sorted(self.special, key=len, reverse=True) if rest.startswith(token)), "")
            mark = mark or (rest[: len(rest) - len(rest.lstrip())])
            if not mark:
                break
            if with_space or mark.strip():
                found.append(mark)
            rest = rest[len(mark) :]
        return found

    def _segments(self, text: str, conversation: Conversation, spans: Mapping[int, tuple[int, int]]) -> list[Segment]:
        """Return the text split at questions and answers; parts between answers go with the next question."""
        found: list[Segment] = []
        position = 0
        for index, turn in enumerate(conversation.turns):
            if turn.role == "gpt":
                start, stop = spans[index]
                before = index - 1 if index else -1
                found.append(Segment(text[position:start], False, before))
                found.append(Segment(text[start:stop], self.trains(turn), index))
                position = stop
                continue
            place = text.find(turn.text.strip(), position)
            if place >= 0:
                found.append(Segment(text[position:place], False, -1 if index == 0 else index))
                stop = place + len(turn.text.strip())
                ends = self._leading_special(text[stop:])[:1] if turn.train else []
                position = stop + sum(map(len, ends))
                found += self._question(text[place:position], turn, index)
        last = len(conversation.turns) - 1
        found.append(Segment(text[position:], False, last))
        return [segment for segment in found if segment.text]

    def _question(self, text: str, turn: Turn, index: int) -> list[Segment]:
        """Return the segments of a question; after its images it is trained if the turn is."""
        lead = lead_of_images(text)
        return [Segment(text[:lead], False, index), Segment(text[lead:], bool(turn.train), index)]


Template = ConversationTemplate | JinjaTemplate
"""Template of a model: a published one, or that of a tokenizer."""


def find_template(tokenizer: Any, name: str) -> Template:
    """Return a template by name; `auto` is that of the tokenizer.

    Raises:
        ConfigError: the name is unknown, or the tokenizer has no usable template.
    """
    return JinjaTemplate.of(tokenizer, name) if _is_chat(name) else get_template(name)


def _is_chat(name: str) -> bool:
    family = name.removesuffix(ASKING)
    return family == AUTO or family in FAMILIES


def check_name(name: str) -> None:
    """Check the name of a template.

    Raises:
        ConfigError: it is unknown; the message lists the known names.
    """
    if not _is_chat(name):
        lookup({**TEMPLATES, **FAMILIES}, name, "template")


def choose_template(tokenizer: Any) -> tuple[str, str | None]:
    """Return the template name for a language model, and the chat template text to give its tokenizer."""
    if tokenizer.chat_template:
        return AUTO, None
    if "</s>" in {str(token) for token in tokenizer.added_tokens_decoder.values()}:
        return "vicuna_v1", None
    return AUTO, PLAIN_TEMPLATE


def _common_start(first: str, second: str) -> str:
    """Return the text that both texts start with."""
    pairs = enumerate(zip(first, second, strict=False))
    return first[: next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))]


def _merged(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return spans in order, with those that touch joined: a template may mark an answer in several parts."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if stop <= start:
            continue
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return found


def read_template(path: str | Path) -> str:
    """Return the text of a template file.

    Raises:
        ConfigError: it does not exist.
    """
    if not Path(path).is_file():
        raise ConfigError(f"--version {path}: no such file; expected a chat template (Jinja)")
    return read_text(path)


PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ 'ASSISTANT:' }}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}{{ '\\n' }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\\n' }}"
    "{% else %}{{ 'USER: ' + message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""Template of a language model that has none: roles as words, answers end with the end-of-text token."""
