"""Questions of any file, and the rows of their answers.

Sample --question_of--> Question --prompt--> engine
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
from llava.samples import Conversation, Sample, Turn, type_and_length
from llava.scoring.decisions import is_closed

MAX_NAMED_IDS = 10
"""Number of ids that a message lists before it ends with an ellipsis."""


def match_answers(
    ids: Sequence[str], answers: Iterable[Mapping[str, Any]], *, source: str = "answers"
) -> list[Mapping[str, Any]]:
    """Return the answer row of each id, in the order of the ids.

    Raises:
        DataError: an id has no answer, an answer has no such id or no text, or an id occurs twice; the message names
            the ids or the row.
    """
    rows = list(answers)
    for index, row in enumerate(rows):
        if "question_id" not in row or "text" not in row:
            raise DataError(f"{source}, row {index}: expected question_id and text, found {', '.join(row)}")
        if isinstance(row["text"], bool) or not isinstance(row["text"], str | int | float):
            got = type_and_length(row["text"])
            raise DataError(
                f"{source}, row {index}: field 'text' must be text or a number, got {got}; rerun the answering command"
            )
    check_unique([str(row["question_id"]) for row in rows], source)
    by_id = {str(row["question_id"]): row for row in rows}
    missing = [identity for identity in ids if identity not in by_id]
    extra = sorted(by_id.keys() - set(ids))
    if missing or extra:
        raise DataError(
            f"{source} and the ground truth hold different questions: {_named(missing)} without an answer, "
            f"{_named(extra)} answered but not in the ground truth; use the question file that was answered"
        )
    return [by_id[identity] for identity in ids]


def check_unique(ids: Sequence[str], source: str) -> None:
    """Check that no id occurs more than once.

    Raises:
        DataError: an id is repeated; the message names the repeated ids.
    """
    repeated = [identity for identity, count in Counter(ids).items() if count > 1]
    if repeated:
        raise DataError(f"{source}: ids must be unique, but {_named(repeated)} occur more than once")


def _named(ids: Sequence[str]) -> str:
    shown = ", ".join(ids[:MAX_NAMED_IDS]) + (", ..." if len(ids) > MAX_NAMED_IDS else "")
    return f"{len(ids)} ids" + (f" ({shown})" if ids else "")


PromptForm = Literal["raw", "tagged", "plain"]
"""Form of a row's `prompt`: as in the file, the text followed by an image placeholder, or the text alone."""

YES_NO_OPTIONS = " Please choose from the following two options: [yes, no]"
"""Suffix of closed yes/no questions under `--with-options`; results record it."""

FOLLOW_UP = "ANSWER:"
FOLLOW_UP_JOINT = "\n The answer is "
"""Second question of `--answer-prompter`, and the text that joins its answer to the first."""

GRAY = (127, 127, 127)
BLANK_SIZE = 336
"""Color and side of the blank-image control: one gray square for all questions."""

_ID_ALPHABET = "".join(sorted(set(string.ascii_letters + string.digits) - set("0O1Il")))
_ID_LENGTH = 22


@dataclass(frozen=True, slots=True)
class Question:
    """Question as it is passed to the engine.

    Attributes:
        raw_id: the id as in the file, number or text.
        conversation: one human turn with a placeholder per image.
        images: names of the images.
        prompt: the question as the answer row repeats it.
    """

    raw_id: Any
    conversation: Conversation
    images: tuple[str, ...]
    prompt: str

    @property
    def id(self) -> str:
        """The id as text, the key of answers."""
        return str(self.raw_id)


def question_of(sample: Sample, *, form: PromptForm = "tagged", options: bool = False) -> Question:
    """Return the first question of a sample; later turns are ignored.

    Args:
        sample: a row of any question file.
        form: how the answer row repeats the question.
        options: append the two options to closed yes/no questions (of rows that contain their answer).

    Raises:
        DataError: the number of placeholders in the question differs from the number of images.
    """
    turns = sample.conversation.turns
    text = turns[0].text
    plain = text.replace(IMAGE_TOKEN, "").strip()
    suffix = YES_NO_OPTIONS if options and _is_yes_no(sample) else ""
    num_placeholders = text.count(IMAGE_TOKEN)
    if num_placeholders == 0 and sample.images:
        asked = "".join(f"{IMAGE_TOKEN}\n" for _ in sample.images) + text + suffix
    elif num_placeholders == len(sample.images):
        asked = text.replace(plain, plain + suffix, 1) if plain and plain in text else text + suffix
    else:
        raise DataError(
            f"id {sample.id!r}: {num_placeholders} {IMAGE_TOKEN} placeholders for {len(sample.images)} images; "
            f"write none, or one per image"
        )
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
    """Return the row of an answer, with the six keys of the published files in their order."""
    return {
        "question_id": question.raw_id,
        "prompt": question.prompt,
        "text": text,
        "answer_id": short_id(),
        "model_id": model_id,
        "metadata": dict(metadata),
    }


def short_id() -> str:
    """Return a random identifier of 22 letters and digits without look-alikes (0O1Il)."""
    number, letters = uuid.uuid4().int, []
    for _ in range(_ID_LENGTH):
        number, digit = divmod(number, len(_ID_ALPHABET))
        letters.append(_ID_ALPHABET[digit])
    return "".join(reversed(letters))
