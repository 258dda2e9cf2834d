"""Recomputation of known label defects of the original trainers, to explain recorded labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from llava.chat_template import Segment
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN
from llava.data.encode import place_images, tokenize_segments
from llava.processing import LlavaMedProcessor
from llava.samples import Conversation


@dataclass(frozen=True, slots=True)
class Counting:
    """Constants by which a release counts the tokens of a round.

    Attributes:
        asked: tokens to add to the count of a ChatML question.
        end: whether the end mark of a ChatML round is counted in addition to the round.
        later_chatml: tokens to add from the second ChatML round on, by "legacy" of the tokenizer.
        later_two: tokens to add from the second round with two separators on, by "legacy" of the tokenizer.
    """

    asked: int
    end: bool
    later_chatml: tuple[int, int]
    later_two: tuple[int, int]


COUNTINGS = (Counting(0, True, (0, 0), (0, 0)), Counting(-1, False, (0, 1), (-1, 0)))
"""Counting of releases before LLaVA 1.2, such as LLaVA-Rad and STLLaVA-Med, and of LLaVA 1.2; pairs are without and
with the "legacy" tokenizer."""

LEAST_LIMIT = 32
"""Length below which no recorded trainer cuts rows."""

CHATML_END, CHATML_ANSWER = "<|im_end|>", "<|im_start|>assistant\n"


@dataclass(frozen=True, slots=True)
class Counted:
    """Labels of the published arithmetic, and the token at which its count ends (None: it does not check)."""

    labels: list[int]
    stop: int | None

    def is_mismatch(self, num_tokens: int, limit: int | None, recorded: bool) -> bool:
        """Return whether the original ignores the row, because its count differs from the tokens.

        Args:
            num_tokens: number of tokens that are no padding.
            limit: maximum length, from which on the count is not checked; None if unknown.
            recorded: what was recorded, returned if the limit is needed and unknown.
        """
        if self.stop is None or self.stop == num_tokens:
            return False
        return recorded or self.stop < LEAST_LIMIT if limit is None else self.stop < limit


Count = Callable[[str], int]
"""Number of tokens of a text alone, including the start token."""


def counted_rounds(ids: Sequence[int], text: str, count: Count, split: str, *, later: int) -> Counted:
    """Return labels of a text with two separators, whose answers follow `split`."""
    labels, cursor = [IGNORE_INDEX, *ids[1:]], 1
    for number, part in enumerate(text.split("</s>")):
        pieces = part.split(split)
        if not part or len(pieces) != 2:
            break
        shift = later if number else 0
        # The start token of the count stands for the end mark; the last token before the answer is its space.
        _ignore(labels, cursor, cursor + count(pieces[0] + split) - 2 + shift)
        cursor += count(part) + shift
    _ignore(labels, cursor, len(labels))
    return Counted(labels, cursor)


def counted_asked(ids: Sequence[int], text: str, count: Count, split: str, header: str) -> Counted:
    """Return labels of a text in which the model asks questions too, each after `header`."""
    labels, cursor = [IGNORE_INDEX, *ids[1:]], 1
    for number, part in enumerate(text.split("</s>")):
        if not part:
            break
        pieces = part.split(split)
        image = part.find(f"{IMAGE_TOKEN}\n") + len(f"{IMAGE_TOKEN}\n")
        before = pieces[0] + split if len(pieces) == 2 else header if number else part[:image]
        # Of a question in the first round all up to the image is counted, without a correction.
        _ignore(labels, cursor, cursor + count(before) - (2 if number or len(pieces) == 2 else 0))
        cursor += count(part)
    _ignore(labels, cursor, len(labels))
    return Counted(labels, cursor)


def counted_chatml(ids: Sequence[int], text: str, count: Count, counting: Counting, *, legacy: bool) -> Counted:
    """Return labels of a ChatML text; the first round has the system prompt too."""
    parts, header = text.split(CHATML_END), CHATML_END + CHATML_ANSWER
    rounds = [CHATML_END.join(parts[:3]), *(CHATML_END.join(parts[at : at + 2]) for at in range(3, len(parts), 2))]
    labels, cursor = list(ids), 0
    for number, part in enumerate(rounds):
        pieces = part.split(header)
        if not part or len(pieces) != 2:
            break
        shift = counting.later_chatml[legacy] if number else 0
        _ignore(labels, cursor, cursor + count(pieces[0] + header) + counting.asked + shift)
        cursor += count(part) + (count(CHATML_END) if counting.end else 0) + shift
    _ignore(labels, cursor, len(labels))
    return Counted(labels, cursor)


def counted_v0(
    ids: Sequence[int], conversation: Conversation, processor: LlavaMedProcessor, count: Count | None = None
) -> list[int]:
    """Return labels by the published arithmetic of the `###` form: tokens of every turn counted alone.

    `###` may be fewer tokens in the text than alone; the count then drifts into the text. Without `count`, our tokens
    are counted.
    """
    count = count or partial(count_alone, processor=processor)
    form, template = processor.template.form, processor.template
    labels = list(ids)
    cursor = count(form.system.replace("{}", template.system))
    _ignore(labels, 0, cursor)
    for turn in place_images(conversation, processor).turns:
        text = turn.text.replace(IMAGE_TOKEN, IMAGE_TOKEN.join(template.image_wrap))
        frame = form.human if turn.role == "human" else form.gpt
        length = count("".join(part for part, _ in frame).replace("{}", text))
        if turn.role == "human":
            _ignore(labels, cursor + 2, cursor + length)
        cursor += length
    return labels


def count_alone(text: str, processor: LlavaMedProcessor) -> int:
    """Return the number of tokens of a text tokenized alone, including the start token."""
    return len(tokenize_segments([Segment(text, False, 0)], processor).ids)


def _ignore(labels: list[int], start: int, stop: int) -> None:
    """Set `labels[start:stop]` to ignored, as far as there are labels."""
    stop = min(stop, len(labels))
    if start < stop:
        labels[start:stop] = [IGNORE_INDEX] * (stop - start)


def counted_patches(width: int, height: int, processor: LlavaMedProcessor) -> int:
    """Return the number of tokens of an image in mode `keep` as LLaVA-Med 1.0 counts them.

    It derives the side of a patch from the height of the image, as if every image were as many patches high as a tile.
    """
    patch = height // processor.image_grid.side
    return (height // patch) * (width // patch)


def is_v0(processor: LlavaMedProcessor) -> bool:
    """Return whether the template has the `###` form."""
    return processor.template.form.closing == "### "
