"""Questions of any file, and the rows of their answers.

Sample --question_of--> Question --prompt--> engine
                           |
                           +--answer_row--> {question_id, prompt, text, answer_id, model_id, metadata}
"""

from __future__ import annotations

import hashlib
import json
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llava.constants import IMAGE_TOKEN
from llava.errors import DataError
from llava.samples import Conversation, Sample, Turn, sample_label, type_and_length, with_placeholders
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
    """Return the first question of a sample with its images; later turns and their images are ignored.

    Args:
        sample: a row of any question file.
        form: how the answer row repeats the question.
        options: append the two options to closed yes/no questions (of rows that contain their answer).

    Raises:
        DataError: the number of placeholders in the row differs from the number of images; names the row.
    """
    turns = sample.conversation.turns
    text, num_placeholders = turns[0].text, sum(turn.text.count(IMAGE_TOKEN) for turn in turns)
    if num_placeholders not in (0, len(sample.images)):
        raise DataError(
            f"{sample_label(sample)}: {num_placeholders} {IMAGE_TOKEN} placeholders for {len(sample.images)} images; "
            f"write none, or one per image"
        )
    shown = with_placeholders(sample).turns[0].text
    images = sample.images[: shown.count(IMAGE_TOKEN)]
    plain = text.replace(IMAGE_TOKEN, "").strip()
    suffix = YES_NO_OPTIONS if options and _is_yes_no(sample) else ""
    in_front = IMAGE_TOKEN not in text or not plain or plain not in text  # then the suffix is the end of the question
    asked = shown + suffix if in_front else text.replace(plain, plain + suffix, 1)
    tag = f"\n{IMAGE_TOKEN}" if images else ""
    prompts = {"raw": text + suffix, "tagged": plain + suffix + tag, "plain": plain + suffix}
    conversation = Conversation((Turn("human", asked),), sample.conversation.system)
    return Question(sample.meta.get("id", sample.id), conversation, images, prompts[form])


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
    """Return the row of an answer, with the six keys of the published files in their order.

    `answer_id` is derived from the other five values, so equal evaluations write equal files.
    """
    first = {"question_id": question.raw_id, "prompt": question.prompt, "text": text}
    last = {"model_id": model_id, "metadata": dict(metadata)}
    return {**first, "answer_id": derived_id(first | last), **last}


def derived_id(content: Mapping[str, Any]) -> str:
    """Return an identifier of JSON values: 22 letters and digits without look-alikes (0O1Il)."""
    written = json.dumps(content, sort_keys=True).encode()
    number, letters = int.from_bytes(hashlib.sha256(written).digest()), []
    for _ in range(_ID_LENGTH):
        number, digit = divmod(number, len(_ID_ALPHABET))
        letters.append(_ID_ALPHABET[digit])
    return "".join(letters)
