"""Conversations to text and back: templates are data, and what is trained falls out of rendering.

    Conversation --render--> segments (text, trained, turn) --join--> what the model reads in training
    Conversation --prompt--> the same text, opened for the next answer
    generated text --parse--> the answer

A `Form` says what is written around each turn as a few frames; one function renders every template. The published
loss mask of a published template is the `trained` flag of its frames: the "v1" family trains answer and end mark; the
"v0" family also trains the `###` before each turn, the answer's role header and a closing `### `.

Some originals evaluate with another text than they trained on (v0: `S###Human: Q###` against `S\\n\\n### Human: Q\\n`).
`prompt` always continues the training text; `published_prompt` gives the other one, for comparison with old results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llava.constants import IMAGE_TOKEN
from llava.errors import DataError
from llava.samples import Conversation, Turn
from llava.system_prompts import SYSTEMS
from llava.utils.lookup import lookup

SLOT = "{}"
"""Where a frame holds the turn's text (replaced literally: braces in the text are safe)."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of rendered text.

    Attributes:
        text: the characters.
        trained: whether tokens that start here count in the loss.
        turn: index of the conversation turn it belongs to, -1 for the system text.
    """

    text: str
    trained: bool
    turn: int


Frame = tuple[tuple[str, bool], ...]
"""Parts of one turn as (text, trained); exactly one part holds the `SLOT`."""


@dataclass(frozen=True, slots=True)
class Form:
    """What is written around the system text and the turns.

    Attributes:
        system: the system text's surroundings, with a `SLOT`.
        human: frame of a question.
        gpt: frame of an answer; the parts before the one with the slot are the answer header that opens a prompt.
        no_system: written instead of `system` when the system text is empty.
        first: frame of the first question where it differs (the system text stands inside its brackets).
        asked: frame of a question that is itself trained (`Turn.train=True`).
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
class Template:
    """How conversations are written for one family of models.

    Attributes:
        name: key in `TEMPLATES`.
        system: default system text.
        form: the training form.
        stops: strings that end an answer.
        published: the form in which the original evaluates, where that is not the training form.
        preset: turns that the original's evaluation puts in front.
        image_wrap: written before and after each `<image>`.
        drops_questions: keep of each question only its images (alignment on captions).
        echoes: role headers that models of this template repeat in front of an answer.
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

    def with_system(self, text: str) -> Template:
        """Return this template with another system text."""
        return replace(self, system=text)

    def render(self, conversation: Conversation) -> tuple[Segment, ...]:
        """Return the training text as segments; joined they are what the model reads."""
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
        """Return the training text of a conversation that ends with a question, up to and with the answer header."""
        return "".join(segment.text for segment in self.open(conversation))

    def published_prompt(self, conversation: Conversation) -> str:
        """Return the prompt as the original's evaluation scripts wrote it, with the preset turns."""
        turns = (*self.preset, *conversation.turns)
        opened = _open(self, self.published or self.form, replace(conversation, turns=turns))
        return "".join(segment.text for segment in opened)

    def parse(self, text: str) -> str:
        """Return the answer in generated text: repeated role headers off the front, cut at the first stop string."""
        start = answer_start(text, self.echoes)
        return text[start : first_stop(text, self.stops, start=start)].strip()


def answer_start(text: str, echoes: Sequence[str]) -> int:
    """Return where the answer in generated text begins: behind white space and repeated role headers."""
    start = _behind_space(text, 0)
    while (echo := next((echo for echo in echoes if text.startswith(echo, start)), None)) is not None:
        start = _behind_space(text, start + len(echo))
    return start


def first_stop(text: str, stops: Sequence[str], *, start: int) -> int | None:
    """Return where the first stop string from `start` on begins; None without one."""
    return min((place for stop in stops if (place := text.find(stop, start)) >= 0), default=None)


def _behind_space(text: str, start: int) -> int:
    return len(text) - len(text[start:].lstrip())


def _open(template: Template, form: Form, conversation: Conversation) -> list[Segment]:
    if not conversation.turns or conversation.turns[-1].role != "human":
        raise DataError(
            "a prompt needs a conversation that ends with a question; drop the last answer or add a question"
        )
    segments = _render(template, form, conversation)
    for text, _ in form.gpt:
        if SLOT in text:
            break
        segments.append(Segment(text, False, len(conversation.turns)))
    return [replace(segment, trained=False) for segment in segments]


def _render(template: Template, form: Form, conversation: Conversation) -> list[Segment]:
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
    """Return the segments of one turn, `Turn.train` applied; its images end at character `lead` of its text."""
    frame = form.gpt if turn.role == "gpt" else (form.first if index == 0 and form.first else form.human)
    if turn.role == "human" and turn.train:
        return _render_asked(form.asked or frame, text, index, lead)
    allowed = turn.train is not False
    if turn.role == "gpt" and "".join(part for part, _ in frame).split(SLOT)[0].endswith("\n"):
        # Tokenizers merge line ends: the header's would no longer be the token that a prompt ends with.
        text = text.lstrip("\n")
    parts = [Segment(part.replace(SLOT, text), trained and allowed, index) for part, trained in frame]
    return [segment for segment in parts if segment.text]


def _lead(text: str, wrap: str) -> int:
    """Return where the images of a turn end: behind the last one, what wraps it and the line ends that follow."""
    if IMAGE_TOKEN not in text:
        return 0
    after = text.rpartition(IMAGE_TOKEN)[2]
    return len(text) - len(after.removeprefix(wrap).lstrip("\n"))


def _render_asked(frame: Frame, text: str, index: int, lead: int) -> list[Segment]:
    """Return a trained question: its text is trained from behind its images on, and so is an end mark."""
    segments: list[Segment] = []
    for part, trained in frame:
        if SLOT not in part:
            segments.append(Segment(part, trained, index))
            continue
        before, after = part.split(SLOT)
        # Without a leading image the space in front of the question belongs to its first token.
        space = before[-1:] if not lead and before.endswith(" ") else ""
        segments.append(Segment(before[: len(before) - len(space)] + text[:lead], False, index))
        segments.append(Segment(space + text[lead:], True, index))
        segments.append(Segment(after, trained, index))
    return [segment for segment in segments if segment.text]


def _two(user: str, assistant: str, *, end: str, gap: str = "", asked: str = "") -> Form:
    """Two separators: `S USER: q ASSISTANT: a</s>`; the answer, its leading space and the end mark are trained."""
    human: Frame = ((f"{user}: {SLOT} ", False),)
    gpt: Frame = ((f"{assistant}:", False), (f" {SLOT}{end}", True), (gap, False))
    return Form(
        system=f"{SLOT} ",
        human=human,
        gpt=gpt,
        asked=((f"{asked}: {SLOT}", False), (end, True), (" ", False)) if asked else None,
    )


def _hashes(human: str, assistant: str) -> Form:
    """Training form of the single-separator templates: every `###` is trained, so the model learns to stop with it."""
    return Form(
        system=f"{SLOT}\n\n",
        human=(("###", True), (f" {human}: {SLOT}\n", False)),
        gpt=((f"### {assistant}:", True), (f" {SLOT}\n", True)),
        closing="### ",
    )


def _single(human: str, assistant: str) -> Form:
    """Single separator, as evaluated: `S###Human: q###Assistant: a###`."""
    return Form(
        system=f"{SLOT}###",
        human=((f"{human}: {SLOT}###", False),),
        gpt=((f"{assistant}:", False), (f" {SLOT}###", True)),
    )


def _brackets(start: str) -> Form:
    """Instruct brackets: `[INST] q [/INST] a </s>`, the system text inside the first pair."""
    return Form(
        system=f"[INST] <<SYS>>\n{SLOT}\n<</SYS>>\n\n",
        no_system="[INST] ",
        first=((f"{SLOT} [/INST]", False),),
        human=((f"{start}[INST] {SLOT} [/INST]", False),),
        gpt=((f" {SLOT} </s>", True),),
    )


def _chatml(system: str, gap: str) -> Form:
    """Marked roles: `<|im_start|>user\\nq<|im_end|>`."""
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
) -> Template:
    """A template that trains in the `###` form."""
    echoes = tuple(dict.fromkeys((*_HASH_ECHOES, f"{roles[1]}:")))
    published = published or _single(*roles)
    return Template(name, SYSTEMS[system], _hashes(*roles), stops=("###",), published=published, echoes=echoes)


def _v1(name: str, system: str, *, roles: tuple[str, str] = ("USER", "ASSISTANT"), gap: str = "") -> Template:
    """A template of the Vicuna v1 family; `gap` is written between an end mark and the next question."""
    return Template(name, SYSTEMS[system], _two(*roles, end="</s>", gap=gap), stops=("</s>",))


def _marked(name: str, system: str, *, opening: str = "", gap: str = "") -> Template:
    """A template with `<|im_start|>` and `<|im_end|>` around each turn."""
    return Template(name, SYSTEMS[system], _chatml(opening, gap), stops=("<|im_end|>",))


def _instruct(name: str, system: str, start: str) -> Template:
    """A template with `[INST]` brackets."""
    return Template(name, SYSTEMS.get(system, ""), _brackets(start), stops=("</s>",))


def _plain(name: str) -> Template:
    """Captions alone: image, caption, line end."""
    return Template(name, "", _PLAIN, stops=("\n",), drops_questions=True)


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

TEMPLATES: dict[str, Template] = {template.name: template for template in _LISTED}
"""All templates. `v1` is Vicuna v1, as everywhere but in LLaVA-Med 1.0 (`llava_med_v1.0:v1`); the `llava_med_v1.5:`
ones write a space after each end mark, as that release's evaluation does; `chatml` suits SmolLM2 and its like."""


def get_template(name: str) -> Template:
    """Return a template by name.

    Raises:
        ConfigError: the name is unknown; the message lists the known ones.
    """
    return lookup(TEMPLATES, name, "template")
