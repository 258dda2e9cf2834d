"""Converter for SLAKE: questions in English and Chinese about images of several modalities.

The release has train.json, validation.json, test.json and imgs/xmlabN/source.jpg. A row has `qid`, `img_id`,
`img_name` (xmlabN/source.jpg), `question`, `answer`, `q_lang` (en, zh), `location`, `modality`, `answer_type` (OPEN,
CLOSED), `base_type` (vqa, kvqa), `content_type` and `triple`.

Command:
    llava data slake DOWNLOADED imgs.zip --out data/slake --lang en
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llava.data.converters.base import Converter, Job, run_converter
from llava.data.converters.dataset_cards import SLAKE
from llava.data.converters.items import ConvertedItem, Event, Excluded, kind_of_answer
from llava.data.converters.tables import Row, answer_cell, cell_text, read_table
from llava.data.quarantine import BadRow
from llava.errors import DataError
from llava.samples import Origin
from llava.utils.cli import Parser

FILES = {"train": ("train.json",), "val": ("validation.json", "validate.json"), "test": ("test.json",)}
NEEDED = ("img_name", "question", "answer", "q_lang")
LANGUAGES = ("en", "zh", "all")


def read_events(job: Job) -> Iterator[Event]:
    """Yield the questions of the three split files."""
    job.variant = job.args.lang
    for split, names in FILES.items():
        path = job.require_file(*names)
        for origin, row in read_table(path, columns=NEEDED):
            if job.is_full(split):
                break
            if isinstance(row, DataError):
                yield BadRow(*origin, "", str(row))
            elif job.args.lang not in ("all", cell_text(row, "q_lang")):
                yield Excluded(split, "another language")
            else:
                yield _event(job, origin, row, split)


def _event(job: Job, origin: Origin, row: Row, split: str) -> Event:
    identity = f"slake_{cell_text(row, 'qid') or f'{split}{origin.row}'}"
    answer, name = answer_cell(row, "answer"), cell_text(row, "img_name")
    try:
        meta = {
            "answer_type": kind_of_answer(cell_text(row, "answer_type"), answer),
            "question_type": cell_text(row, "content_type"),
            "image_organ": cell_text(row, "location"),
            "modality": cell_text(row, "modality"),
            "official_split": split,
            "source": job.card.name,
            "license": job.card.license,
            "base_type": cell_text(row, "base_type"),
            "q_lang": cell_text(row, "q_lang"),
        }
        image = job.sources.image(name, "imgs")
    except DataError as error:
        return BadRow(*origin, identity, str(error))
    return ConvertedItem(identity, split, cell_text(row, "question"), answer, image, name, meta, origin)


def add_options(parser: Parser) -> None:
    """Add the options of this converter."""
    parser.add_argument("--lang", choices=LANGUAGES, default="en", help="language of the questions")


CONVERTER = Converter("slake", SLAKE, read_events, add_options)


def main(argv: Sequence[str] | None = None) -> None:
    """Run `llava data slake`."""
    run_converter(CONVERTER, argv)
