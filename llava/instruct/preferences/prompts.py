"""Messages to a judge of two answers: question, answers, instruction, and images if permitted.

The layout is that of STLLaVA-Med; the wording of the instruction is this project's, and a file may replace it. Rows
record the hash of these texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.errors import DataError
from llava.imaging.decode import load_image
from llava.judging.orders import ORDERS
from llava.judging.store import Messages
from llava.utils.jsonl import read_object, read_text
from llava.utils.reporting import image_url

SYSTEM = "You check the quality of answers to medical questions. You are precise and fair."

SEEN = (
    "Two AI assistants answered the question above about the attached medical image. Judge both answers by how "
    "accurate, relevant, helpful and detailed they are about what the image shows"
)
UNSEEN = (
    "Two AI assistants answered the question above about a medical image that you cannot see. Judge both answers by "
    "how plausible, relevant, helpful and detailed they are"
)
FORMAT = (
    ", and give each answer one overall score from 1 to 10; more is better.\n"
    "Write on the first line only the two scores, Answer 1 before Answer 2, with one space between them. From the "
    "second line on, explain the scores. Do not let the order or the length of the answers influence you."
)
REMINDER = (
    "The first line of that reply was not two scores. Reply again: on the first line only two numbers from 1 to 10, "
    "the score of Answer 1 and the score of Answer 2, with one space between them."
)

LONGEST_SIDE = 2048
"""Largest side of an image that is sent; endpoints scale larger ones down to it."""


@dataclass(frozen=True, slots=True)
class PairPrompt:
    """Texts that instruct a judge of two answers.

    Attributes:
        instruction: the task and the format of the reply.
        image_folder: folder of the images.
        send_images: whether images leave this machine.
    """

    instruction: str
    image_folder: str | Path | None = None
    send_images: bool = False

    @property
    def sha256(self) -> str:
        """Hash of all texts, recorded with every judgment."""
        return hashlib.sha256("\0".join((SYSTEM, self.instruction, REMINDER)).encode()).hexdigest()

    def messages(self, question: str, answers: tuple[str, str], images: Sequence[str], order: str) -> Messages:
        """Return the messages about two answers in an order of `ORDERS`.

        Raises:
            DataError: an image cannot be read.
        """
        first, second = answers if order == ORDERS[0] else answers[::-1]
        text = (
            f"[Question]\n{question}\n\n"
            f"[Answer 1]\n{first}\n\n[End of Answer 1]\n\n"
            f"[Answer 2]\n{second}\n\n[End of Answer 2]\n\n"
            f"[System]\n{self.instruction}\n\n"
        )
        content: Any = text
        if self.send_images and images:
            urls = [image_data_url(name, self.image_folder) for name in images]
            content = [{"type": "text", "text": text}]
            content += [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        return ({"role": "system", "content": SYSTEM}, {"role": "user", "content": content})


def remind(messages: Messages, reply: str) -> Messages:
    """Return the messages after a reply without readable scores."""
    return (
        *messages,
        {"role": "assistant", "content": reply or "(no text)"},
        {"role": "user", "content": REMINDER},
    )


def image_data_url(name: str, image_folder: str | Path | None) -> str:
    """Return the pixels of an image as a data URL, without its file's metadata about the patient.

    Raises:
        DataError: the image cannot be read.
    """
    return image_url(load_image(name, image_folder), side=LONGEST_SIDE, form="png")


def instruction_of(rule: str | Path | None, *, send_images: bool) -> str:
    """Return the instruction of a judge: the shipped one, or that of a file.

    Args:
        rule: text file, or JSON with `{"preference": {"prompt": text}}` as published; None for the shipped text.
        send_images: whether the judge sees the images.

    Raises:
        DataError: the file cannot be read or has no instruction.
    """
    if rule is None:
        return (SEEN if send_images else UNSEEN) + FORMAT
    if Path(rule).suffix != ".json":
        text: Any = read_text(rule).strip()
    else:
        entry = read_object(rule).get("preference")
        text = entry.get("prompt") if isinstance(entry, dict) else None
    if not isinstance(text, str) or not text:
        raise DataError(f'{rule}: no instruction; expected a text, or JSON with {{"preference": {{"prompt": text}}}}')
    return text
