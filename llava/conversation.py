"""Conversation templates: rendering of conversations to text, and parsing of generated answers.

    Conversation --render--> segments (text, trained, turn) --join--> training text
    Conversation --prompt--> the same text up to the next answer, or up to the next question of a template that asks
    generated text --parse--> answer

A `Form` holds the text around each turn as frames; one function renders every template. The `trained` flags of the
frames are the published loss mask of a template: the "v1" family trains answers and end marks; the "v0" family also
trains the `###` before each turn, the role header of answers and a closing `### `.

Some original code evaluates with another text than in training (v0: `S###Human: Q###` and `S\\n\\n### Human: Q\\n`).
`prompt` always continues the training text; `published_prompt` returns the other one, to reproduce published results.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from llava.chat_template import Segment, answer_start, first_stop
from llava.constants import IMAGE_TOKEN
from llava.errors import DataError
from llava.samples import Conversation, Turn
from llava.system_prompts import SYSTEM_PROMPTS
from llava.template_forms import (
    PLAIN,
    SLOT,
    Form,
    Frame,
    brackets,
    chatml,
    hashes,
    place_of,
    single_separator,
    two_separators,
)
from llava.utils.lookup import lookup


@dataclass(frozen=True, slots=True)
class ConversationTemplate:
    """Conversation template of one family of models; a `ChatTemplate`.

    Attributes:
        name: key in `TEMPLATES`.
        system: default system prompt.
        form: form for training.
        stops: strings that end an answer.
        published: form of the original evaluation if it differs from the training form.
        preset: turns that the original evaluation adds at the start.
        image_wrap: text before and after each `<image>`.
        drops_questions: whether questions are reduced to their images (alignment on captions).
        trains_empty: whether answers without text are trained (`--compat empty_answers`): their end marks, and in the
            "v0" family their headers.
        echoes: role headers that models of this template repeat before an answer.
    """

    name: str
    system: str
    form: Form
    stops: tuple[str, ...]
    published: Form | None = None
    preset: tuple[Turn, ...] = ()
    image_wrap: tuple[str, str] = ("", "")
    drops_questions: bool = False
    trains_empty: bool = False
    echoes: tuple[str, ...] = ()

    def with_system(self, text: str) -> ConversationTemplate:
        """Return this template with another system prompt."""
        return replace(self, system=text)

    def render(self, conversation: Conversation) -> tuple[Segment, ...]:
        """Return the training text as segments."""
        segments = _render(self, self.form, conversation)
        if self.form.closing and conversation.turns and conversation.turns[-1].role == "gpt":
            trained = self.trains(conversation.turns[-1])
            segments.append(Segment(self.form.closing, trained, len(conversation.turns) - 1))
        return tuple(segments)

    def trains(self, turn: Turn) -> bool:
        """Return whether an answer, with its header and end mark, may be trained."""
        return self.trains_empty or not turn.is_empty if turn.train is None else turn.train

    def header(self) -> str:
        """Return the text between a question and its answer, with which a prompt ends."""
        return self.form.header(self.form.gpt)

    def end_mark(self) -> str:
        """Return the trained text after an answer."""
        return "".join(text for text, trained in self.form.after(self.form.gpt) if trained)

    def asked_header(self) -> str | None:
        """Return the text before a question that the model asks; None if it cannot ask."""
        return None if self.form.asked is None else self.form.header(self.form.asked)

    def open(self, conversation: Conversation) -> tuple[Segment, ...]:
        """Return the segments of `prompt`; none is trained.

        Raises:
            DataError: the conversation has no turn, or ends with an answer and the template cannot ask.
        """
        return tuple(_open(self, self.form, conversation))

    def continuation(self, question: Turn, *, index: int, ended: bool = True) -> tuple[Segment, ...]:
        """Return the text from the end of an answer through the next question to `header`; see `ChatTemplate`."""
        after = [text for text, trained in self.form.after(self.form.gpt) if not (trained and ended)]
        asked = [part.replace(SLOT, self.shown(question)) for part, _ in self.form.human]
        parts = [(index - 1, after), (index, asked), (index + 1, [self.header()])]
        return tuple(Segment(text, False, turn) for turn, texts in parts for text in texts if text)

    def shown(self, turn: Turn) -> str:
        """Return the text of a turn, its images wrapped."""
        if turn.role == "human" and self.drops_questions:
            return IMAGE_TOKEN * turn.text.count(IMAGE_TOKEN)
        return turn.text.replace(IMAGE_TOKEN, IMAGE_TOKEN.join(self.image_wrap))

    def prompt(self, conversation: Conversation) -> str:
        """Return the training text of a conversation up to the header of the next answer or question."""
        return "".join(segment.text for segment in self.open(conversation))

    def published_prompt(self, conversation: Conversation) -> str:
        """Return the prompt of the original evaluation scripts, with the preset turns."""
        turns = (*self.preset, *conversation.turns)
        opened = _open(self, self.published or self.form, replace(conversation, turns=turns))
        return "".join(segment.text for segment in opened)

    def parse(self, text: str) -> str:
        """Return the answer in generated text, without repeated role headers, up to the first stop string."""
        start = answer_start(text, self.echoes)
        return text[start : first_stop(text, self.stops, start=start)].strip()


def _open(template: ConversationTemplate, form: Form, conversation: Conversation) -> list[Segment]:
    asks = bool(conversation.turns) and conversation.turns[-1].role == "gpt"
    frame = form.asked if asks else form.gpt
    if not conversation.turns or frame is None:
        hint = f" (template {template.name} cannot ask one itself; {', '.join(asking_templates())} can)" if asks else ""
        raise DataError("the conversation does not end with a question; remove the last answer or add one" + hint)
    segments = [*_render(template, form, conversation), Segment(form.header(frame), False, len(conversation.turns))]
    return [replace(segment, trained=False) for segment in segments if segment.text]


def _render(template: ConversationTemplate, form: Form, conversation: Conversation) -> list[Segment]:
    system = template.system if conversation.system is None else conversation.system
    opening = form.system.replace(SLOT, system) if system else form.no_system
    segments = [Segment(opening, False, -1)] if opening else []
    for index, turn in enumerate(conversation.turns):
        text = template.shown(turn)
        frame = form.gpt if turn.role == "gpt" else (form.first if index == 0 and form.first else form.human)
        if turn.role == "human" and not _ends_trained(template, conversation.turns, index):
            frame = _unmarked(frame)
        lead = lead_of_images(text, template.image_wrap[1])
        if turn.role == "human" and turn.train:
            text = text if lead or form.asked is None else _after_header(form.asked, text)
            segments.extend(_render_asked(form.asked or frame, text, index, lead))
        else:
            allowed = template.trains(turn) if turn.role == "gpt" else turn.train is not False
            segments.extend(_render_turn(frame, turn, text, index, allowed=allowed))
    return segments


def _ends_trained(template: ConversationTemplate, turns: Sequence[Turn], index: int) -> bool:
    """Return whether the mark before a question is trained.

    It is trained if the answer that it ends is; the first mark, if any answer is.
    """
    answers = [turn for turn in turns if turn.role == "gpt"] if index == 0 else [turns[index - 1]]
    return not answers or any(map(template.trains, answers))


def _unmarked(frame: Frame) -> Frame:
    """Return a frame whose parts before the text are not trained."""
    return tuple((part, trained and number >= place_of(frame)) for number, (part, trained) in enumerate(frame))


def _render_turn(frame: Frame, turn: Turn, text: str, index: int, *, allowed: bool) -> list[Segment]:
    """Return the segments of an untrained question or of an answer.

    `allowed` says whether the frame trains this turn.
    """
    if turn.role == "gpt":
        text = _after_header(frame, text)
    parts = [Segment(part.replace(SLOT, text), trained and allowed, index) for part, trained in frame]
    return [segment for segment in parts if segment.text]


def _after_header(frame: Frame, text: str) -> str:
    """Return the text of a generated turn without line breaks that would merge with those of its header."""
    # Tokenizers merge newlines, and the header would then end with another token than a prompt.
    ends_line = "".join(part for part, _ in frame).split(SLOT)[0].endswith("\n")
    return text.lstrip("\n") if ends_line else text


def lead_of_images(text: str, wrap: str = "") -> int:
    """Return the end of a turn's images: after the last image, its wrap, and the newlines that follow."""
    if IMAGE_TOKEN not in text:
        return 0
    after = text.rpartition(IMAGE_TOKEN)[2]
    return len(text) - len(after.removeprefix(wrap).lstrip("\n"))


def _render_asked(frame: Frame, text: str, index: int, lead: int) -> list[Segment]:
    """Return the segments of a trained question: its text after the images and its end mark are trained."""
    segments: list[Segment] = []
    for part, trained in frame:
        if SLOT not in part:
            segments.append(Segment(part, trained, index))
            continue
        before, after = part.split(SLOT)
        # Without a leading image the space before the question belongs to its first token.
        space = before[-1:] if not lead and before.endswith(" ") else ""
        segments.append(Segment(before[: len(before) - len(space)] + text[:lead], False, index))
        segments.append(Segment(space + text[lead:], True, index))
        segments.append(Segment(after, trained, index))
    return [segment for segment in segments if segment.text]


_GREETING = (Turn("human", "Hi!"), Turn("gpt", "Hi there!  How can I help you today?\n"))
_HASH_ECHOES = ("###", "Assistant:", "Response:", "Human:")
_MMTAG = ("<Image>", "</Image>")


def _v0(
    name: str, system: str, *, published: Form | None = None, roles: tuple[str, str] = ("Human", "Assistant")
) -> ConversationTemplate:
    """Return a template that trains in the `###` form."""
    echoes = tuple(dict.fromkeys((*_HASH_ECHOES, f"{roles[1]}:")))
    published = published or single_separator(*roles)
    return ConversationTemplate(
        name, SYSTEM_PROMPTS[system], hashes(*roles), stops=("###",), published=published, echoes=echoes
    )


def _v1(
    name: str, system: str, *, roles: tuple[str, str] = ("USER", "ASSISTANT"), gap: str = ""
) -> ConversationTemplate:
    """Return a template of the Vicuna v1 family; `gap` separates an end mark from the next question."""
    return ConversationTemplate(
        name, SYSTEM_PROMPTS[system], two_separators(*roles, end="</s>", gap=gap), stops=("</s>",)
    )


def _marked(name: str, system: str, *, opening: str = "", gap: str = "", asked: str = "") -> ConversationTemplate:
    """Return a template with `<|im_start|>` and `<|im_end|>` around each turn."""
    return ConversationTemplate(name, SYSTEM_PROMPTS[system], chatml(opening, gap, asked), stops=("<|im_end|>",))


def _instruct(name: str, system: str, start: str) -> ConversationTemplate:
    """Return a template with `[INST]` brackets."""
    return ConversationTemplate(name, SYSTEM_PROMPTS.get(system, ""), brackets(start), stops=("</s>",))


def _plain(name: str) -> ConversationTemplate:
    """Return a template for captions: image, caption, newline."""
    return ConversationTemplate(name, "", PLAIN, stops=("\n",), drops_questions=True)


_LISTED = (
    _v0("default", "human"),
    _v0("v0", "human"),
    _v0("llava_v0", "human"),
    replace(_v0("simple", "human"), preset=_GREETING),
    replace(
        _v0("simple_legacy", "med_simple"),
        preset=(Turn("human", "Hi!\n\n### Response:"), _GREETING[1]),
    ),
    replace(_v0("multimodal", "med_multimodal"), preset=_GREETING),
    replace(_v0("v0_mmtag", "mmtag"), image_wrap=_MMTAG),
    _v0("bair_v1", "bair", roles=("USER", "GPT"), published=two_separators("USER", "GPT", end="</s>")),
    _v0("llava_med_v1.0:v1", "human"),
    _v1("v1", "user"),
    _v1("vicuna_v1", "user"),
    _v1("vicuna_v1_1", "user"),
    _v1("llava_v1", "human"),
    _v1("llava_med_v1.0:llava_v1", "med_v1"),
    _v1("llava_med_v1.5:v1", "user", gap=" "),
    _v1("llava_med_v1.5:vicuna_v1", "user", gap=" "),
    _v1("llava_med_v1.5:llava_v1", "human", gap=" "),
    replace(_v1("v1_mmtag", "mmtag"), image_wrap=_MMTAG),
    replace(_v1("llava_med_v1.5:v1_mmtag", "mmtag", gap=" "), image_wrap=_MMTAG),
    replace(
        _v1("v1_sq", "self_questioning"),
        form=two_separators("USER", "ASSISTANT", end="</s>", asked="VUSER"),
    ),
    _instruct("llama_2", "llama_2", "<s>"),
    _instruct("llava_llama_2", "llava_llama_2", "<s>"),
    _instruct("mistral_instruct", "", ""),
    _plain("plain"),
    _plain("v0_plain"),
    _marked("mpt", "mpt"),
    _marked("chatml_direct", "chatml"),
    _marked("mistral_direct", "chatml"),
    _marked("chatml", "smollm2", opening="<|im_start|>system\n", gap="\n"),
    _marked("chatml_sq", "smollm2", opening="<|im_start|>system\n", gap="\n", asked="vuser"),
    _v0(
        "dolly",
        "dolly",
        roles=("### Instruction", "### Response"),
        published=two_separators("### Instruction", "### Response", end="### End"),
    ),
    replace(_v0("stllava_med:v0_mmtag", "mmtag", roles=("Instruction", "Response")), image_wrap=_MMTAG),
)

TEMPLATES: dict[str, ConversationTemplate] = {template.name: template for template in _LISTED}
"""Templates by name. `v1` is Vicuna v1, except in LLaVA-Med 1.0 (`llava_med_v1.0:v1`). Templates `llava_med_v1.5:*`
write a space after each end mark, as in the evaluation of that release. `chatml` is for SmolLM2 and similar models.
`v1_sq` and `chatml_sq` ask questions too."""


def asking_templates() -> list[str]:
    """Return the names of the templates in which a model asks questions."""
    return [name for name, template in TEMPLATES.items() if template.form.asked is not None]


def get_template(name: str) -> ConversationTemplate:
    """Return a template by name.

    >>> from llava.samples import Conversation, Turn
    >>> template = get_template("vicuna_v1")
    >>> segments = template.render(Conversation((Turn("human", "Which organ?"), Turn("gpt", "Lung."))))
    >>> "".join(segment.text for segment in segments if segment.trained)
    ' Lung.</s>'

    Raises:
        ConfigError: the name is unknown; the message lists the known names.
    """
    return lookup(TEMPLATES, name, "template")


def __getattr__(name: str) -> Any:
    """Return `conv_templates` or `SeparatorStyle` for published snippets, imported on first use."""
    if name in ("conv_templates", "SeparatorStyle"):
        return getattr(importlib.import_module("llava.published_chat"), name)
    raise AttributeError(f"module 'llava.conversation' has no attribute {name!r}")
