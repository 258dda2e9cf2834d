"""What is asked and what is written down: a question of any file, and the row of its answer.

Sample --question--> Question --prompt--> engine
                        |
                        +--answer_row--> {question_id, prompt, text, answer_id, model_id, metadata}
"""

from __future__ import annotations

import string
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llava.constants import IMAGE_TOKEN
from llava.errors import DataError
from llava.samples import Conversation, Sample, Turn, describe
from llava.scoring.decisions import is_closed

MAX_NAMED_IDS = 10


def match_answers(
    ids: Sequence[str], answers: Iterable[Mapping[str, Any]], *, source: str = "answers"
) -> list[Mapping[str, Any]]:
    """Return the answer row of each id, in the order of the ids.

    Raises:
        DataError: as `join`.
    """
    rows = list(answers)
    for index, row in enumerate(rows):
        if "question_id" not in row or "text" not in row:
            raise DataError(f"{source}, row {index}: expected question_id and text, found {', '.join(row)}")
        if isinstance(row["text"], bool) or not isinstance(row["text"], str | int | float):
            got = describe(row["text"])
            raise DataError(f"{source}, row {index}: field 'text' must be text or a number, got {got}; answer it again")
    refuse_doubles([str(row["question_id"]) for row in rows], source)
    by_id = {str(row["question_id"]): row for row in rows}
    missing = [identity for identity in ids if identity not in by_id]
    extra = sorted(by_id.keys() - set(ids))
    if missing or extra:
        raise DataError(
            f"{source} and ground truth hold different questions: {_named(missing)} without an answer, "
            f"{_named(extra)} answered but not in the ground truth; score an answer file with the questions it answers"
        )
    return [by_id[identity] for identity in ids]


def refuse_doubles(ids: Sequence[str], source: str) -> None:
    """Refuse ids that occur more than once.

    Raises:
        DataError: names them.
    """
    doubles = [identity for identity, count in Counter(ids).items() if count > 1]
    if doubles:
        raise DataError(f"{source}: ids must be unique, but {_named(doubles)} occur more than once")


def _named(ids: Sequence[str]) -> str:
    shown = ", ".join(ids[:MAX_NAMED_IDS]) + (", ..." if len(ids) > MAX_NAMED_IDS else "")
    return f"{len(ids)} ids" + (f" ({shown})" if ids else "")


PromptForm = Literal["raw", "tagged", "plain"]
"""How the row's `prompt` is written: as in the file, the text with an image tag after it, the text alone."""

YES_NO_OPTIONS = " Please choose from the following two options: [yes, no]"
"""Told to the model after closed questions on request; results name it."""

FOLLOW_UP = "ANSWER:"
FOLLOW_UP_JOINT = "\n The answer is "
"""The second question of `--answer-prompter`, and what joins its answer to the first."""

GREY = (127, 127, 127)
BLANK_SIZE = 336
"""The picture of the blank-image control: one grey square for all questions."""

_ID_ALPHABET = "".join(sorted(set(string.ascii_letters + string.digits) - set("0O1Il")))
_ID_LENGTH = 22


@dataclass(frozen=True, slots=True)
class Question:
    """One question as it is asked.

    Attributes:
        raw_id: the id as the file has it, number or text.
        conversation: one turn of the person, with a mark for each image.
        images: names of the images.
        prompt: what the answer row calls the question.
    """

    raw_id: Any
    conversation: Conversation
    images: tuple[str, ...]
    prompt: str

    @property
    def id(self) -> str:
        """The id as text, by which answers are found again."""
        return str(self.raw_id)


def question(sample: Sample, *, form: PromptForm = "tagged", options: bool = False) -> Question:
    """Return the first question of a sample, whatever follows it.

    Args:
        sample: a row of any question file.
        form: how the answer row repeats the question.
        options: append the two options to closed yes/no questions (of rows that hold their answer).

    Raises:
        DataError: the question has another number of image marks than images.
    """
    turns = sample.conversation.turns
    text = turns[0].text
    plain = text.replace(IMAGE_TOKEN, "").strip()
    suffix = YES_NO_OPTIONS if options and _is_yes_no(sample) else ""
    num_marks = text.count(IMAGE_TOKEN)
    if num_marks == 0 and sample.images:
        asked = "".join(f"{IMAGE_TOKEN}\n" for _ in sample.images) + text + suffix
    elif num_marks == len(sample.images):
        asked = text.replace(plain, plain + suffix, 1) if plain and plain in text else text + suffix
    else:
        raise DataError(f"id {sample.id!r}: {num_marks} {IMAGE_TOKEN} marks for {len(sample.images)} images")
    tag = f"\n{IMAGE_TOKEN}" if sample.images else ""
    prompts = {"raw": text + suffix, "tagged": plain + suffix + tag, "plain": plain + suffix}
    conversation = Conversation((Turn("human", asked),), sample.conversation.system)
    return Question(sample.meta.get("id", sample.id), conversation, sample.images, prompts[form])


def _is_yes_no(sample: Sample) -> bool:
    turns = sample.conversation.turns
    if len(turns) < 2 or not is_closed(sample.meta.get("answer_type"), turns[1].text):
        return False
    return turns[1].text.strip().strip(".").lower() in {"yes", "no"}


def follow_up(conversation: Conversation, reasoning: str) -> Conversation:
    """Return the conversation that asks for a short answer after a long one."""
    turns = (*conversation.turns, Turn("gpt", reasoning), Turn("human", FOLLOW_UP))
    return Conversation(turns, conversation.system)


def answer_row(question: Question, text: str, *, model_id: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of an answer: the six keys of the published files, in their order."""
    return {
        "question_id": question.raw_id,
        "prompt": question.prompt,
        "text": text,
        "answer_id": short_id(),
        "model_id": model_id,
        "metadata": dict(metadata),
    }


def short_id() -> str:
    """Return a random identifier of 22 letters and digits that cannot be mistaken for each other."""
    number, letters = uuid.uuid4().int, []
    for _ in range(_ID_LENGTH):
        number, digit = divmod(number, len(_ID_ALPHABET))
        letters.append(_ID_ALPHABET[digit])
    return "".join(reversed(letters))
