"""Converter for VQA-RAD: the public release, or the later trainset.json and testset.json.

    VQA_RAD Dataset Public.json + VQA_RAD Image Folder/  -->  train.json 1,797 rows, test.json 451 rows

A row of the public release has `qid`, `phrase_type` (freeform, para, test_freeform, test_para; it defines the split),
`image_name`, `image_organ`, `question`, `question_frame` and others (`NULL` if empty), `question_type`, `answer` and
`answer_type`. Some values end with a space, and some answers are numbers.

Command:
    llava data vqa-rad DOWNLOADED --out data/vqa-rad
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava.data.converters.base import Converter, Job, run_converter
from llava.data.converters.dataset_cards import VQA_RAD
from llava.data.converters.items import ConvertedItem, Event, kind_of_answer
from llava.data.converters.tables import answer_cell, cell_text, read_table
from llava.data.quarantine import BadRow
from llava.errors import DataError
from llava.samples import Origin
from llava.utils.cli import Parser

PUBLIC = "VQA_RAD Dataset Public.json"
PAIR = {"train": "trainset.json", "test": "testset.json"}
IMAGE_FOLDERS = ("VQA_RAD Image Folder", "images")
NEEDED = ("image_name", "question", "answer")
TEST_MARK = "test_"


def read_events(job: Job) -> Iterator[Event]:
    """Yield the questions of the variant that exists."""
    public = job.sources.file(PUBLIC)
    if public is not None:
        job.variant = "public with framed questions" if job.args.framed else "public"
        yield from _public(job, job.require_file(PUBLIC))
        return
    if job.sources.file(PAIR["train"]) is None:
        raise DataError(job.missing(f"{PUBLIC} (and no {PAIR['train']} with {PAIR['test']})"))
    job.variant = "data_RAD"
    for split, name in PAIR.items():
        path = job.require_file(name)
        for origin, row in read_table(path, columns=NEEDED):
            yield _event(job, origin, row, split)


def _public(job: Job, path: Path) -> Iterator[Event]:
    """Yield every question, then (with --framed) the framed ones, each text once per image."""
    framed: dict[tuple[str, str, str], tuple[Origin, dict[str, Any]]] = {}
    asked: set[tuple[str, str, str]] = set()
    for origin, row in read_table(path, columns=(*NEEDED, "phrase_type")):
        if isinstance(row, DataError):
            yield BadRow(*origin, "", str(row))
            continue
        test = cell_text(row, "phrase_type").startswith(TEST_MARK)
        yield _event(job, origin, row, "test" if test else "train")
        asked.add(_key(row, "question"))
        if job.args.framed and not test and cell_text(row, "question_frame"):
            framed.setdefault(_key(row, "question_frame"), (origin, row))
    for key, (origin, row) in framed.items():
        if key not in asked:
            changed = {
                **row,
                "question": row["question_frame"],
                "phrase_type": "frame",
                "qid": f"{cell_text(row, 'qid')}_frame",
            }
            yield _event(job, origin, changed, "train")


def _key(row: dict[str, Any], column: str) -> tuple[str, str, str]:
    return cell_text(row, "image_name"), cell_text(row, column).lower(), answer_cell(row, "answer").lower()


def _event(job: Job, origin: Origin, row: dict[str, Any] | DataError, split: str) -> Event:
    if isinstance(row, DataError):
        return BadRow(*origin, "", str(row))
    identity = f"vqarad_{cell_text(row, 'qid') or f'{split}{origin.row}'}"
    answer, name = answer_cell(row, "answer"), cell_text(row, "image_name")
    try:
        meta = {
            "answer_type": kind_of_answer(cell_text(row, "answer_type"), answer),
            "question_type": cell_text(row, "question_type"),
            "image_organ": cell_text(row, "image_organ"),
            "phrase_type": cell_text(row, "phrase_type").removeprefix(TEST_MARK),
            "official_split": split,
            "source": job.card.name,
            "license": job.card.license,
            "linked_id": cell_text(row, "qid_linked_id"),
            "case": cell_text(row, "image_case_url"),
        }
        image = job.sources.image(name, *IMAGE_FOLDERS)
    except DataError as error:
        return BadRow(*origin, identity, str(error))
    return ConvertedItem(identity, split, cell_text(row, "question"), answer, image, name, meta, origin)


def add_options(parser: Parser) -> None:
    """Add the options of this converter."""
    parser.add_switch("--framed", help="add the questions in fixed form (`question_frame`) to the training rows")


CONVERTER = Converter("vqa-rad", VQA_RAD, read_events, add_options)


def main(argv: Sequence[str] | None = None) -> None:
    """Run `llava data vqa-rad`."""
    run_converter(CONVERTER, argv)
