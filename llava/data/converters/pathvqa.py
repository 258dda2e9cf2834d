"""Converter for PathVQA: Parquet files with embedded images, or JSON questions with an image folder.

    train-00000-of-00007-....parquet: image {bytes, path}, question, answer
    train_qa.json: [{"image": "train_0422", "question": ..., "answer": ...}, ...] + images/train/train_0422.jpg

Pickle files are refused, as loading one can run code. Neither variant has question types: a closed question has the
type yes/no, any other has its question word (what, where, how many).

Command:
    llava data pathvqa DOWNLOADED --out data/pathvqa
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava.data.converters.base import Converter, Job, run_converter
from llava.data.converters.dataset_cards import PATHVQA
from llava.data.converters.items import ConvertedItem, Event, kind_of_answer
from llava.data.converters.output import name_of_bytes
from llava.data.converters.tables import Row, answer_cell, cell_text, read_table
from llava.data.quarantine import BadRow
from llava.errors import DataError
from llava.samples import Origin

NAMES = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}
ASKING = ("how many", "how much", "how", "what", "where", "when", "whose", "who", "why", "which")
OWN_IDS = ("qid", "question_id", "id")


class _Part(NamedTuple):
    """Values that differ between the two variants: id, split, image and image name."""

    id: str
    split: str
    image: Path | bytes = b""
    name: str = ""


def read_events(job: Job) -> Iterator[Event]:
    """Yield the questions of the variant that exists; Parquet has priority."""
    parquet = {
        split: [path for name in names for path in job.sources.matching(f"{name}-*.parquet")]
        for split, names in NAMES.items()
    }
    if any(parquet.values()):
        job.variant = "parquet"
        for split, paths in parquet.items():
            yield from _parquet(job, split, paths)
        return
    found = {split: job.sources.file(*_json_names(names)) for split, names in NAMES.items()}
    if not any(found.values()):
        raise DataError(_missing_message(job))
    job.variant = "json"
    for split, names in NAMES.items():
        path = job.require_file(*_json_names(names))
        for origin, row in read_table(path, columns=("image", "question", "answer")):
            if job.is_full(split):
                break
            yield _from_json(job, origin, row, split)


def _json_names(names: Sequence[str]) -> list[str]:
    return [f"{name}{ending}" for name in names for ending in ("_qa.json", "_qa.jsonl", "set.json", ".json", ".jsonl")]


def _missing_message(job: Job) -> str:
    pickles = job.sources.matching("*.pkl")
    if pickles:
        return (
            f"{pickles[0]} is a pickle, and loading it could run code, so it is not read. Use the Parquet release or "
            f"JSON questions. {job.card.how_to_get}"
        )
    return job.missing("train-*.parquet and no train_qa.json")


def _parquet(job: Job, split: str, paths: Sequence[Path]) -> Iterator[Event]:
    place = 0
    for path in paths:
        job.inputs[path.name] = path
        for origin, row in read_table(path, columns=("image", "question", "answer")):
            if job.is_full(split):
                return
            yield _from_parquet(job, origin, row, _Part(f"pathvqa_{split}_{place}", split))
            place += 1


def _from_parquet(job: Job, origin: Origin, row: Row | DataError, part: _Part) -> Event:
    if isinstance(row, DataError):
        return BadRow(*origin, part.id, str(row))
    value: Any = row["image"]
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes) or not data:
        return BadRow(*origin, part.id, "column 'image' holds no image; expected its bytes")
    return _item(job, origin, row, part._replace(image=data, name=name_of_bytes(data)))


def _from_json(job: Job, origin: Origin, row: Row | DataError, split: str) -> Event:
    if isinstance(row, DataError):
        return BadRow(*origin, "", str(row))
    own = next((cell_text(row, name) for name in OWN_IDS if cell_text(row, name)), f"{split}_{origin.row}")
    part = _Part(f"pathvqa_{own}", split)
    try:
        image = _image_path(job, cell_text(row, "image"), split)
    except DataError as error:
        return BadRow(*origin, part.id, str(error))
    return _item(job, origin, row, part._replace(image=image, name=image.name))


def _image_path(job: Job, name: str, split: str) -> Path:
    """Return the path of an image; the release writes names without an extension."""
    under = [f"images/{folder}" for folder in NAMES[split]] + ["images"]
    for ending in ("", ".jpg", ".png", ".jpeg"):
        try:
            return job.sources.image(f"{name}{ending}", *under)
        except DataError:
            continue
    return job.sources.image(f"{name}.jpg", *under)


def _item(job: Job, origin: Origin, row: Row, part: _Part) -> Event:
    question, answer = cell_text(row, "question"), answer_cell(row, "answer")
    try:
        kind = kind_of_answer(cell_text(row, "answer_type"), answer)
    except DataError as error:
        return BadRow(*origin, part.id, str(error))
    meta = {
        "answer_type": kind,
        "question_type": cell_text(row, "question_type") or question_type(question, kind),
        "modality": "Pathology",
        "official_split": part.split,
        "source": job.card.name,
        "license": job.card.license,
    }
    return ConvertedItem(part.id, part.split, question, answer, part.image, part.name, meta, origin)


def question_type(question: str, kind: str) -> str:
    """Return `yes/no` for a closed question, else its question words, else `other`."""
    if kind == "CLOSED":
        return "yes/no"
    text = " ".join(question.lower().split())
    return next((words for words in ASKING if text.startswith(f"{words} ")), "other")


CONVERTER = Converter("pathvqa", PATHVQA, read_events)


def main(argv: Sequence[str] | None = None) -> None:
    """Run `llava data pathvqa`."""
    run_converter(CONVERTER, argv)
