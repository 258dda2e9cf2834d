"""Forms of conversation templates: text around system prompt and turns, and which of it is trained.

Every form is data; `llava/conversation.py` renders it.
"""

from __future__ import annotations

from dataclasses import dataclass

SLOT = "{}"
"""Position of the text of a turn in a frame; it is replaced literally, so braces in the text are safe."""

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

    def header(self, frame: Frame) -> str:
        """Return the parts of a frame before that of the text."""
        return "".join(part for part, _ in frame[: place_of(frame)])

    def after(self, frame: Frame) -> Frame:
        """Return the parts of a frame after the text."""
        place = place_of(frame)
        text, trained = frame[place]
        return ((text.partition(SLOT)[2], trained), *frame[place + 1 :])


def place_of(frame: Frame) -> int:
    """Return the index of the part with the text."""
    return next(number for number, (part, _) in enumerate(frame) if SLOT in part)


def two_separators(user: str, assistant: str, *, end: str, gap: str = "", asked: str = "") -> Form:
    """Return the form with two separators, `S USER: q ASSISTANT: a</s>`; ` a</s>` is trained."""
    human: Frame = ((f"{user}: {SLOT} ", False),)
    gpt: Frame = ((f"{assistant}:", False), (f" {SLOT}{end}", True), (gap, False))
    return Form(
        system=f"{SLOT} ",
        human=human,
        gpt=gpt,
        asked=((f"{asked}:", False), (f" {SLOT}{end}", True), (" ", False)) if asked else None,
    )


def hashes(human: str, assistant: str) -> Form:
    """Return the training form of the single-separator templates."""
    # Every `###` is trained, so that the model learns to stop with it.
    return Form(
        system=f"{SLOT}\n\n",
        human=(("###", True), (f" {human}: {SLOT}\n", False)),
        gpt=((f"### {assistant}:", True), (f" {SLOT}\n", True)),
        closing="### ",
    )


def single_separator(human: str, assistant: str) -> Form:
    """Return the evaluation form with a single separator, `S###Human: q###Assistant: a###`."""
    return Form(
        system=f"{SLOT}###",
        human=((f"{human}: {SLOT}###", False),),
        gpt=((f"{assistant}:", False), (f" {SLOT}###", True)),
    )


def brackets(start: str) -> Form:
    """Return the form with brackets, `[INST] q [/INST] a </s>`, the system prompt inside the first pair."""
    return Form(
        system=f"[INST] <<SYS>>\n{SLOT}\n<</SYS>>\n\n",
        no_system="[INST] ",
        first=((f"{SLOT} [/INST]", False),),
        human=((f"{start}[INST] {SLOT} [/INST]", False),),
        gpt=((f" {SLOT} </s>", True),),
    )


def chatml(system: str, gap: str, asked: str = "") -> Form:
    """Return the ChatML form, `<|im_start|>user\\nq<|im_end|>`."""
    return Form(
        system=f"{system}{SLOT}<|im_end|>{gap}",
        human=((f"<|im_start|>user\n{SLOT}<|im_end|>{gap}", False),),
        gpt=(("<|im_start|>assistant\n", False), (f"{SLOT}<|im_end|>", True), (gap, False)),
        asked=((f"<|im_start|>{asked}\n", False), (f"{SLOT}<|im_end|>", True), (gap, False)) if asked else None,
    )


PLAIN = Form(system=SLOT, human=((SLOT, False),), gpt=((f"{SLOT}\n", True),))
