"""Rows of the commands that make preference pairs, and the files that they extend row by row.

    questions --answer--> answered rows --judge--> judged rows --pairs--> preference rows

A row keeps the fields of the row before it. Its key is a hash of images and question, so an interrupted command
continues with the questions whose keys its file lacks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.constants import IMAGE_TOKEN
from llava.data.records import LOADERS, sample_of
from llava.errors import DataError
from llava.generation import fingerprint
from llava.samples import Conversation, Origin, Sample, Turn, image_names, type_and_length, with_placeholders
from llava.utils.json_rows import read_records, read_rows
from llava.utils.jsonl import append_record, drop_incomplete_line, write_records

Row = Mapping[str, Any]

KEPT = ("reference", "answer_type", "question_type", "choices", "answer_label")
"""Fields of a question that later comparisons need; they are kept in every row."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Question about images.

    Attributes:
        id: id of its row.
        images: names of the images.
        text: the question; placeholders only where they do not all precede it.
        kept: fields in `KEPT`.
    """

    id: str
    images: tuple[str, ...]
    text: str
    kept: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Hash of images and question."""
        return hashlib.sha256(json.dumps([self.images, self.text]).encode()).hexdigest()[:24]

    @property
    def shown(self) -> str:
        """The question with one placeholder per image."""
        return self.text if IMAGE_TOKEN in self.text else f"{IMAGE_TOKEN}\n" * len(self.images) + self.text

    def conversation(self, *answers: str) -> Conversation:
        """Return the conversation of the question and, if given, an answer."""
        return Conversation((Turn("human", self.shown), *(Turn("gpt", answer) for answer in answers)))

    def fields(self) -> dict[str, Any]:
        """Return the fields of a row: `key`, `id`, `img` (a name or several), `prompt`, and those in `KEPT`."""
        names = {} if not self.images else {"img": self.images[0] if len(self.images) == 1 else list(self.images)}
        return {"key": self.key, "id": self.id, **names, "prompt": self.text, **self.kept}


@dataclass(frozen=True, slots=True)
class Answered:
    """Answers to a question.

    Attributes:
        asked: the question.
        answers: texts of the answers.
        unfinished: places of answers that were cut at the limit of tokens.
        row: the whole row.
    """

    asked: Asked
    answers: tuple[str, ...]
    unfinished: frozenset[int]
    row: Row


def read_questions(path: str | Path) -> list[Asked]:
    """Return the questions of a file, each once, in file order.

    A row is a conversation, whose first question counts and whose first answer is the reference, a question of the chat
    evaluation, or an image with the list of questions asked about it (`image`, `prompt` or `questions`).

    Raises:
        DataError: the file cannot be read or a row cannot be used; the message names file and row.
    """
    found: dict[str, Asked] = {}
    for row, value in read_rows(path):
        try:
            for asked in _questions_of(value, Origin(str(path), row)):
                found.setdefault(asked.key, asked)
        except DataError as error:
            raise DataError(f"{path}, row {row}: {error}") from error
    if not found:
        raise DataError(f"{path}: no questions; expected rows with conversations, or with an image and its questions")
    return list(found.values())


def _questions_of(value: Any, origin: Origin) -> list[Asked]:
    listed = next((name for name in ("questions", "prompt") if isinstance(value, dict) and name in value), None)
    if listed is None:
        return [_first_question(sample_of(value, origin, LOADERS["default"])[0])]
    texts = [value[listed]] if isinstance(value[listed], str) else value[listed]
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(f"field {listed!r} must be a question or a list of questions, got {type_and_length(texts)}")
    identity = str(value.get("question_id", value.get("id", origin.row)))
    kept = {name: value[name] for name in KEPT if name in value}
    ids = [identity] if len(texts) == 1 else [f"{identity}-{place}" for place in range(len(texts))]
    return [_asked(one, _images(value), text, kept) for one, text in zip(ids, texts, strict=True)]


def _first_question(sample: Sample) -> Asked:
    turns = with_placeholders(sample).turns
    images = sample.images[: turns[0].text.count(IMAGE_TOKEN)]
    reference = {"reference": turns[1].text} if len(turns) > 1 and turns[1].text.strip() else {}
    kept = {**{name: sample.meta[name] for name in KEPT if name in sample.meta}, **reference}
    return _asked(sample.id, images, turns[0].text, kept)


def _asked(identity: str, images: tuple[str, ...], text: str, kept: Mapping[str, Any]) -> Asked:
    """Return a question without placeholders that all precede or all follow it.

    Raises:
        DataError: placeholders and images differ in number, or the text is empty.
    """
    plain = text.replace(IMAGE_TOKEN, "").strip()
    if not plain:
        raise DataError("the question has no text")
    if text.count(IMAGE_TOKEN) not in (0, len(images)):
        raise DataError(f"the question has {text.count(IMAGE_TOKEN)} placeholder(s) for {len(images)} image(s)")
    one_block = text.strip().removeprefix(IMAGE_TOKEN).removesuffix(IMAGE_TOKEN).strip() == plain
    return Asked(identity, images, plain if len(images) < 2 or one_block else text.strip(), kept)


def _images(row: Row) -> tuple[str, ...]:
    name = next((name for name in ("img", "image", "images") if row.get(name) not in (None, "", [])), "img")
    return image_names(row.get(name), name)


def read_answered(path: str | Path) -> list[Answered]:
    """Return the answered questions of a file, in file order; of rows with equal keys the last one counts.

    Rows are those of `llava preferences answer`, or the published ones with `img`, `prompt` and `answers`.

    Raises:
        DataError: the file cannot be read or a row cannot be used; the message names file and row.
    """
    found: dict[str, Answered] = {}
    for number, row in enumerate(read_records(path)):
        try:
            one = answered_of(row, str(number))
        except DataError as error:
            raise DataError(f"{path}, row {number}: {error}") from error
        found[one.asked.key] = one
    if not found:
        raise DataError(f"{path}: no answers; write the file with `llava preferences answer`")
    return list(found.values())


def answered_of(row: Row, default_id: str) -> Answered:
    """Return the answers of a row.

    Raises:
        DataError: a field is missing or invalid.
    """
    text, answers = row.get("prompt"), row.get("answers")
    finishes = row.get("finishes", [])
    if not isinstance(text, str) or not isinstance(answers, list) or not all(isinstance(one, str) for one in answers):
        raise DataError("expected 'prompt' (a question) and 'answers' (a list of texts); the row has "
                        f"{', '.join(map(repr, row)) or 'no fields'}")  # fmt: skip
    kept = {name: row[name] for name in KEPT if name in row}
    asked = _asked(str(row.get("id", default_id)), _images(row), text, kept)
    cut = frozenset(place for place, finish in enumerate(finishes) if finish == "length")
    return Answered(asked, tuple(answers), cut, row)


class KeyedFile:
    """Output file whose rows have keys; rows are appended as they are made, and sorted at the end."""

    def __init__(self, path: str | Path, settings: Mapping[str, Any], *, resume: bool = True) -> None:
        """Read the rows of an earlier run with these settings, or start over.

        Raises:
            DataError: the file holds rows of another command, or rows that were made with other settings.
        """
        self._read(path, resume=resume)
        if self.rows:
            fingerprint.check_settings(self.path, settings)
        fingerprint.write_settings(self.path, settings)

    def _read(self, path: str | Path, *, resume: bool) -> None:
        self.path = Path(path)
        self.rows: dict[str, Row] = {}
        if not resume or not self.path.exists():
            write_records(self.path, [])
            return
        drop_incomplete_line(self.path)
        for number, row in enumerate(read_records(self.path)):
            if not isinstance(row.get("key"), str):
                raise DataError(
                    f"{self.path}, row {number}: it has no key, so another command wrote it; set another --out"
                )
            self.rows[row["key"]] = row

    def forget(self, is_failed: Callable[[Row], bool]) -> None:
        """Drop failed rows, so that they are processed again."""
        self.rows = {key: row for key, row in self.rows.items() if not is_failed(row)}

    def append(self, row: Row) -> None:
        """Write a row; it is on disk when this returns."""
        append_record(self.path, row)
        self.rows[row["key"]] = row

    def settle(self, keys: Sequence[str]) -> None:
        """Rewrite the file with the rows of these keys, in their order, and after them the others."""
        order = dict.fromkeys([*keys, *self.rows])
        write_records(self.path, [self.rows[key] for key in order if key in self.rows])
