"""Rows as the original trainers read them: text, ids and labels with each of their known defects.

row of data.json --readings--> conversation, text, ids with some defects (`llava.compat`) --counted_labels--> labels
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import sentencepiece

from benchmarks.fidelity.folder import IMAGE_MARK
from benchmarks.fidelity.published import (
    CHATML_END,
    Count,
    Counted,
    Counting,
    counted_asked,
    counted_chatml,
    counted_rounds,
    counted_v0,
    is_v0,
)
from llava.chat_template import Segment
from llava.constants import IGNORE_INDEX, IM_END_TOKEN, IM_START_TOKEN, IMAGE_TOKEN
from llava.conversation import SLOT, ConversationTemplate, Form, Frame
from llava.data.encode import place_images, tokenize_segments
from llava.processing import LlavaMedProcessor
from llava.samples import ASKING_ROLE, CONVERSATION_KEYS, ROLES, Conversation, Turn, image_names

END_MARKS = ("</s>", "<s>")
MARK_SPACE = re.compile(r"\s*(<\|im_(?:start|end)\|>)\s*")


@dataclass(frozen=True, slots=True)
class Reading:
    """Row as an original reads it.

    Attributes:
        names: defects that were needed, in alphabetical order; none for our own reading.
        conversation: the turns, with images where they are placed.
        text: rendered text.
        ids: token ids in the notation of the originals.
        count: number of tokens of a text alone.
    """

    names: tuple[str, ...]
    conversation: Conversation
    text: str
    ids: list[int]
    count: Count


def turns_of(row: Mapping[str, Any]) -> list[Turn]:
    """Return all turns of a row, an answer before the first question included."""
    written = next(row[key] for key in CONVERSATION_KEYS if key in row)
    return [
        Turn(ROLES[turn["from"]], str(turn["value"]), True if turn["from"] == ASKING_ROLE else None)
        for turn in written
        if turn["from"] in ROLES
    ]


def asked_row(row: Mapping[str, Any], *, rate: float, seed: int) -> dict[str, Any]:
    """Return a row in which the questions are asked that the original draws, with Python's stream from `seed`.

    It counts all turns, so that the question after an answer at the start of a row is a later one.
    """
    key = next(key for key in CONVERSATION_KEYS if key in row)
    draw = random.Random(seed).random
    asked = bool(row.get("image"))
    turns = [
        {**turn, "from": ASKING_ROLE} if asked and place and turn["from"] == "human" and draw() < rate else turn
        for place, turn in enumerate(row[key])
    ]
    return {**row, key: turns}


def readings(row: Mapping[str, Any], processor: LlavaMedProcessor) -> Iterator[Reading]:
    """Yield our reading of a row, then those with one defect that changes it, with two, and so on."""
    possible = _possible(turns_of(row), processor)
    for number in range(len(possible) + 1):
        for names in combinations(possible, number):
            yield read(row, processor, names)


def read(row: Mapping[str, Any], processor: LlavaMedProcessor, names: Sequence[str] = ()) -> Reading:
    """Return the reading of a row with defects."""
    spoken = _conversation(row, keeps_first="first_answer" in names)
    placed = _collapsed(spoken) if "collapsed_images" in names else place_images(spoken, processor)
    text = _text(placed, processor, names)

    def ids_of(part: str) -> list[int]:
        return _ids(part, processor, names)

    return Reading(tuple(sorted(names)), placed, text, ids_of(text), lambda part: len(ids_of(part)))


def _possible(turns: Sequence[Turn], processor: LlavaMedProcessor) -> list[str]:
    """Return the defects that change a row."""
    template = processor.template
    in_marks = CHATML_END in template.stops
    rounds = not is_v0(processor) and not template.drops_questions
    spells = bool(set(END_MARKS) & set(template.stops)) or any(mark in t.text for mark in END_MARKS for t in turns)
    found = {
        "first_answer": (is_v0(processor) or bool(template.form.asked)) and turns[0].role == "gpt",
        "collapsed_images": processor.placement != "as_written" and any(t.text.count(IMAGE_TOKEN) > 1 for t in turns),
        "open_answers": rounds and any(not turn.text for turn in turns),
        "trained_headers": is_v0(processor) and turns[-1].role == "human",
        "dropped_markers": template.drops_questions and processor.use_im_start_end,
        "spelled_end_marks": spells and _model_file(processor).is_file(),
        "stripped_marks": in_marks and any(turn.text != turn.text.strip() for turn in turns),
    }
    return [name for name, is_possible in found.items() if is_possible]


def _conversation(row: Mapping[str, Any], *, keeps_first: bool) -> Conversation:
    turns = turns_of(row)
    turns = turns[1:] if turns[0].role == "gpt" and not keeps_first else turns
    num_images = len(image_names(row.get("image")))
    if num_images and not any(IMAGE_TOKEN in turn.text for turn in turns):
        turns[0] = replace(turns[0], text=f"{IMAGE_TOKEN}\n" * num_images + turns[0].text)
    return Conversation(tuple(turns))


def _collapsed(spoken: Conversation) -> Conversation:
    """Return the conversation with one placeholder at the front of each turn that has any."""

    def first(turn: Turn) -> Turn:
        text = turn.text.replace(IMAGE_TOKEN, "").strip()
        return replace(turn, text=f"{IMAGE_TOKEN}\n{text}".strip()) if IMAGE_TOKEN in turn.text else turn

    return replace(spoken, turns=tuple(first(turn) for turn in spoken.turns))


def _text(placed: Conversation, processor: LlavaMedProcessor, names: Sequence[str]) -> str:
    template = processor.template
    if "first_answer" in names and template.form.asked:
        return _by_position(placed, template)
    texts: dict[int, str] = {}
    for segment in template.render(placed):
        texts[segment.turn] = texts.get(segment.turn, "") + segment.text
    if "open_answers" in names:
        for index, turn in enumerate(placed.turns):
            if not turn.text:
                texts[index] = _header(template.form, turn)
    return "".join(texts.values()) + (template.form.closing if "trained_headers" in names else "")


def _by_position(placed: Conversation, template: ConversationTemplate) -> str:
    """Return the text in which the place of a turn, and not its role, decides what stands after it."""
    form, end = template.form, template.end_mark()
    text = form.system.replace(SLOT, template.system)
    for index, turn in enumerate(placed.turns):
        frame = form.gpt if turn.role == "gpt" else form.asked if turn.train and form.asked else form.human
        text += f"{_header_of(frame)} {turn.text}{end if turn.train else ''}{end if index % 2 else ' '}"
    return text


def _header_of(frame: Frame) -> str:
    return "".join(part for part, _ in frame).split(SLOT)[0].rstrip(" ")


def _header(form: Form, turn: Turn) -> str:
    """Return what an original writes for a turn without text: its open header, nothing within brackets."""
    frame = form.gpt if turn.role == "gpt" else form.human
    return "" if form.first else _header_of(frame)


def _ids(text: str, processor: LlavaMedProcessor, names: Sequence[str]) -> list[int]:
    if "stripped_marks" in names:
        text = MARK_SPACE.sub(r"\1", text)
    if "spelled_end_marks" in names:
        return _spelled_ids(text, processor)
    if "dropped_markers" in names:
        processor = copy.copy(processor)
        processor.use_im_start_end = False
    found = tokenize_segments([Segment(text, False, 0)], processor).ids
    placed = processor.image_token_id if processor.num_image_tokens == 1 else None
    return [IMAGE_MARK if token == placed else token for token in found]


def _spelled_ids(text: str, processor: LlavaMedProcessor) -> list[int]:
    """Return the ids of a text in which sentencepiece spells the end marks; only added tokens are split off."""
    tokenizer = processor.tokenizer
    added = {word: index for word, index in tokenizer.get_added_vocab().items() if word not in _own_marks(tokenizer)}
    if processor.use_im_start_end and IM_START_TOKEN not in added:
        text = text.replace(IMAGE_TOKEN, f"{IM_START_TOKEN}{IMAGE_TOKEN}{IM_END_TOKEN}")
    split = re.compile("(" + "|".join(map(re.escape, added)) + ")")
    model, ids = _model(_model_file(processor)), list(processor.text.bos_ids)
    for piece in split.split(text):
        if piece in added:
            ids.append(IMAGE_MARK if added[piece] == processor.image_token_id else added[piece])
        elif piece:
            ids += model.encode(piece)
    return ids


def _own_marks(tokenizer: Any) -> set[str | None]:
    return {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token}


def _model_file(processor: LlavaMedProcessor) -> Path:
    return Path(str(processor.tokenizer.name_or_path)) / "tokenizer.model"


def sentencepiece_of(processor: LlavaMedProcessor) -> Any:
    """Return the sentencepiece model of a processor's tokenizer; None if its folder has none."""
    file = _model_file(processor)
    return _model(file) if file.is_file() else None


@cache
def _model(file: Path) -> Any:
    return sentencepiece.SentencePieceProcessor(model_file=str(file))


def counted_labels(
    reading: Reading, theirs: Sequence[int], processor: LlavaMedProcessor, counting: Counting, *, legacy: bool
) -> Counted:
    """Return the labels of recorded ids by the arithmetic of a release, see `published`."""
    template = processor.template
    if is_v0(processor):
        return Counted(counted_v0(theirs, reading.conversation, processor, reading.count), None)
    if template.drops_questions:
        asked = reading.count(IMAGE_TOKEN)
        return Counted([IGNORE_INDEX] * min(asked, len(theirs)) + list(theirs[asked:]), None)
    if CHATML_END in template.stops:
        return counted_chatml(theirs, reading.text, reading.count, counting, legacy=legacy)
    if template.form.first:
        return counted_rounds(theirs, reading.text, reading.count, "[/INST] ", later=0)
    split = f" {template.form.gpt[0][0]} "
    if template.form.asked:
        return counted_asked(theirs, reading.text, reading.count, split, f"{template.asked_header()} ")
    return counted_rounds(theirs, reading.text, reading.count, split, later=counting.later_two[legacy])
