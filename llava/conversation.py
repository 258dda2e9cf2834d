"""Conversation templates: rendering of conversations to text, and parsing of generated answers.

    Conversation --render--> segments (text, trained, turn) --join--> training text
    Conversation --prompt--> the same text up to the next answer
    generated text --parse--> answer

A `Form` holds the text around each turn as frames; one function renders every template. The `trained` flags of the
frames are the published loss mask of a template: the "v1" family trains answers and end marks; the "v0" family also
trains the `###` before each turn, the role header of answers and a closing `### `.

Some original code evaluates with another text than in training (v0: `S###Human: Q###` and `S\\n\\n### Human: Q\\n`).
`prompt` always continues the training text; `published_prompt` returns the other one, to reproduce published results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llava.constants import IMAGE_TOKEN
from llava.errors import DataError
from llava.samples import Conversation, Turn
from llava.system_prompts import SYSTEM_PROMPTS
from llava.utils.lookup import lookup

SLOT = "{}"
"""Position of the text of a turn in a frame; it is replaced literally, so braces in the text are safe."""


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


Frame = tuple[tuple[str, bool], ...]
"""Parts of one turn as (text, trained); exactly one part contains `SLOT`."""


@dataclass(frozen=True, slots=True)
class Form:
    """Text around the system prompt and the turns.

    Attributes:
        system: text around the system prompt, with a `SLOT`.
        human: frame of a question.
        gpt: frame of an answer; the parts before the slot are the answer header, with which a prompt ends.
        no_system: text instead of `system` if the system prompt is empty.
        first: frame of the first question if it differs (the system prompt is inside its brackets).
        asked: frame of a question that is trained (`Turn.train=True`).
        closing: trained text after the last answer.
    """

    system: str
    human: Frame
    gpt: Frame
    no_system: str = ""
    first: Frame | None = None
    asked: Frame | None = None
    closing: str = ""


@dataclass(frozen=True, slots=True)
class ConversationTemplate:
    """Conversation template of one family of models.

    Attributes:
        name: key in `TEMPLATES`.
        system: default system prompt.
        form: form for training.
        stops: strings that end an answer.
        published: form of the original evaluation if it differs from the training form.
        preset: turns that the original evaluation adds at the start.
        image_wrap: text before and after each `<image>`.
        drops_questions: whether questions are reduced to their images (alignment on captions).
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
    echoes: tuple[str, ...] = ()

    def with_system(self, text: str) -> ConversationTemplate:
        """Return this template with another system prompt."""
        return replace(self, system=text)

    def render(self, conversation: Conversation) -> tuple[Segment, ...]:
        """Return the training text as segments."""
        segments = _render(self, self.form, conversation)
        if self.form.closing and conversation.turns and conversation.turns[-1].role == "gpt":
            segments.append(Segment(self.form.closing, True, len(conversation.turns) - 1))
        return tuple(segments)

    def open(self, conversation: Conversation) -> tuple[Segment, ...]:
        """Return the segments of `prompt`; none is trained.

        Raises:
            DataError: the conversation does not end with a question.
        """
        return tuple(_open(self, self.form, conversation))

    def prompt(self, conversation: Conversation) -> str:
        """Return the training text of a conversation that ends with a question, including the answer header."""
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


def _open(template: ConversationTemplate, form: Form, conversation: Conversation) -> list[Segment]:
    if not conversation.turns or conversation.turns[-1].role != "human":
        raise DataError("the conversation does not end with a question; remove the last answer or add a question")
    segments = _render(template, form, conversation)
    for text, _ in form.gpt:
        if SLOT in text:
            break
        segments.append(Segment(text, False, len(conversation.turns)))
    return [replace(segment, trained=False) for segment in segments]


def _render(template: ConversationTemplate, form: Form, conversation: Conversation) -> list[Segment]:
    system = template.system if conversation.system is None else conversation.system
    opening = form.system.replace(SLOT, system) if system else form.no_system
    segments = [Segment(opening, False, -1)] if opening else []
    for index, turn in enumerate(conversation.turns):
        text = turn.text.replace(IMAGE_TOKEN, IMAGE_TOKEN.join(template.image_wrap))
        if turn.role == "human" and template.drops_questions:
            text = IMAGE_TOKEN * turn.text.count(IMAGE_TOKEN)
        segments.extend(_render_turn(form, turn, text, index, _lead(text, template.image_wrap[1])))
    return segments


def _render_turn(form: Form, turn: Turn, text: str, index: int, lead: int) -> list[Segment]:
    """Return the segments of one turn with `Turn.train` applied; `lead` is the end of its images."""
    frame = form.gpt if turn.role == "gpt" else (form.first if index == 0 and form.first else form.human)
    if turn.role == "human" and turn.train:
        return _render_asked(form.asked or frame, text, index, lead)
    allowed = turn.train is not False
    if turn.role == "gpt" and "".join(part for part, _ in frame).split(SLOT)[0].endswith("\n"):
        # Tokenizers merge newlines, so that the header would not end with the same token as a prompt.
        text = text.lstrip("\n")
    parts = [Segment(part.replace(SLOT, text), trained and allowed, index) for part, trained in frame]
    return [segment for segment in parts if segment.text]


def _lead(text: str, wrap: str) -> int:
    """Return the end of the images of a turn: after the last image, its wrap and the newlines that follow."""
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


def _two(user: str, assistant: str, *, end: str, gap: str = "", asked: str = "") -> Form:
    """Return the form with two separators, `S USER: q ASSISTANT: a</s>`; ` a</s>` is trained."""
    human: Frame = ((f"{user}: {SLOT} ", False),)
    gpt: Frame = ((f"{assistant}:", False), (f" {SLOT}{end}", True), (gap, False))
    return Form(
        system=f"{SLOT} ",
        human=human,
        gpt=gpt,
        asked=((f"{asked}: {SLOT}", False), (end, True), (" ", False)) if asked else None,
    )


def _hashes(human: str, assistant: str) -> Form:
    """Return the training form of the single-separator templates."""
    # Every `###` is trained, so that the model learns to stop with it.
    return Form(
        system=f"{SLOT}\n\n",
        human=(("###", True), (f" {human}: {SLOT}\n", False)),
        gpt=((f"### {assistant}:", True), (f" {SLOT}\n", True)),
        closing="### ",
    )


def _single(human: str, assistant: str) -> Form:
    """Return the evaluation form with a single separator, `S###Human: q###Assistant: a###`."""
    return Form(
        system=f"{SLOT}###",
        human=((f"{human}: {SLOT}###", False),),
        gpt=((f"{assistant}:", False), (f" {SLOT}###", True)),
    )


def _brackets(start: str) -> Form:
    """Return the form with brackets, `[INST] q [/INST] a </s>`, the system prompt inside the first pair."""
    return Form(
        system=f"[INST] <<SYS>>\n{SLOT}\n<</SYS>>\n\n",
        no_system="[INST] ",
        first=((f"{SLOT} [/INST]", False),),
        human=((f"{start}[INST] {SLOT} [/INST]", False),),
        gpt=((f" {SLOT} </s>", True),),
    )


def _chatml(system: str, gap: str) -> Form:
    """Return the ChatML form, `<|im_start|>user\\nq<|im_end|>`."""
    return Form(
        system=f"{system}{SLOT}<|im_end|>{gap}",
        human=((f"<|im_start|>user\n{SLOT}<|im_end|>{gap}", False),),
        gpt=(("<|im_start|>assistant\n", False), (f"{SLOT}<|im_end|>", True), (gap, False)),
    )


_PLAIN = Form(system=SLOT, human=((SLOT, False),), gpt=((f"{SLOT}\n", True),))
_GREETING = (Turn("human", "Hi!"), Turn("gpt", "Hi there!  How can I help you today?\n"))
_HASH_ECHOES = ("###", "Assistant:", "Response:", "Human:")
_MMTAG = ("<Image>", "</Image>")


def _v0(
    name: str, system: str, *, published: Form | None = None, roles: tuple[str, str] = ("Human", "Assistant")
) -> ConversationTemplate:
    """Return a template that trains in the `###` form."""
    echoes = tuple(dict.fromkeys((*_HASH_ECHOES, f"{roles[1]}:")))
    published = published or _single(*roles)
    return ConversationTemplate(
        name, SYSTEM_PROMPTS[system], _hashes(*roles), stops=("###",), published=published, echoes=echoes
    )


def _v1(
    name: str, system: str, *, roles: tuple[str, str] = ("USER", "ASSISTANT"), gap: str = ""
) -> ConversationTemplate:
    """Return a template of the Vicuna v1 family; `gap` separates an end mark from the next question."""
    return ConversationTemplate(name, SYSTEM_PROMPTS[system], _two(*roles, end="</s>", gap=gap), stops=("</s>",))


def _marked(name: str, system: str, *, opening: str = "", gap: str = "") -> ConversationTemplate:
    """Return a template with `<|im_start|>` and `<|im_end|>` around each turn."""
    return ConversationTemplate(name, SYSTEM_PROMPTS[system], _chatml(opening, gap), stops=("<|im_end|>",))


def _instruct(name: str, system: str, start: str) -> ConversationTemplate:
    """Return a template with `[INST]` brackets."""
    return ConversationTemplate(name, SYSTEM_PROMPTS.get(system, ""), _brackets(start), stops=("</s>",))


def _plain(name: str) -> ConversationTemplate:
    """Return a template for captions: image, caption, newline."""
    return ConversationTemplate(name, "", _PLAIN, stops=("\n",), drops_questions=True)


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
    _v0("bair_v1", "bair", roles=("USER", "GPT"), published=_two("USER", "GPT", end="</s>")),
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
        form=_two("USER", "ASSISTANT", end="</s>", asked="VUSER"),
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
    _v0(
        "dolly",
        "dolly",
        roles=("### Instruction", "### Response"),
        published=_two("### Instruction", "### Response", end="### End"),
    ),
    replace(_v0("stllava_med:v0_mmtag", "mmtag", roles=("Instruction", "Response")), image_wrap=_MMTAG),
)

TEMPLATES: dict[str, ConversationTemplate] = {template.name: template for template in _LISTED}
"""Templates by name. `v1` is Vicuna v1, except in LLaVA-Med 1.0 (`llava_med_v1.0:v1`). Templates `llava_med_v1.5:*`
write a space after each end mark, as in the evaluation of that release. `chatml` is for SmolLM2 and similar models."""


def get_template(name: str) -> ConversationTemplate:
    """Return a template by name.

    Raises:
        ConfigError: the name is unknown; the message lists the known names.
    """
    return lookup(TEMPLATES, name, "template")
