"""Any table (CSV, TSV, JSON, JSON lines, Parquet; plain or gzipped) to LLaVA rows, by the names of its columns.

    table + --image_column, --answer_column, ... --> train.json (val.json, test.json), images/, manifest.json

Command:
    llava data csv cases.csv --image_column file --question_column question --answer_column answer --out data/cases \
        --image_root scans --source "Our hospital" --license "internal"
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava.data.converters.base import Converter, Job, add_output_options, run_with_args
from llava.data.converters.dataset_cards import DatasetCard
from llava.data.converters.items import SPLIT_WORDS, ConvertedItem, Event, kind_of_answer
from llava.data.converters.output import name_of_bytes
from llava.data.converters.sources import is_file
from llava.data.converters.tables import (
    Row,
    answer_cell,
    cell,
    column_names,
    read_table,
    require_columns,
    to_json_value,
)
from llava.data.quarantine import BadRow
from llava.errors import ConfigError, DataError
from llava.samples import Origin, describe
from llava.utils.cli import Parser

FIELDS = {
    "answer_type": "answer_type_column",
    "question_type": "question_type_column",
    "image_organ": "organ_column",
    "modality": "modality_column",
    "view": "view_column",
    "patient": "patient_column",
    "study": "study_column",
}
"""Field of the row, and the flag that names its column."""

TABLE = DatasetCard("table", "a table of your own", "not stated", "Give the table; pictures lie in --image_root.")


def read_events(job: Job) -> Iterator[Event]:
    """Yield a question for each row."""
    args = job.args
    if not job.sources.files:
        raise ConfigError("give the table's file; the folder of its pictures is --image_root")
    for path in job.sources.files:
        job.inputs[path.name] = path
        require_columns([*_text_columns(args), *args.keep], column_names(path, delimiter=args.delimiter), path)
        for origin, row in read_table(path, columns=_required(args), delimiter=args.delimiter):
            yield _event(job, origin, row)


def _required(args: Any) -> list[str]:
    named = (args.image_column, args.answer_column, args.question_column)
    return [column for column in named if column]


def _text_columns(args: Any) -> list[str]:
    """Return every column that is taken as text."""
    flags = [getattr(args, flag) for flag in ("id_column", "split_column", *FIELDS.values())]
    return [*_required(args), *(column for column in flags if column)]


def _no_booleans(row: Row, args: Any) -> None:
    """Refuse what a JSON or Parquet table may hold in place of a text: nobody answers a question with `True`.

    Raises:
        DataError: a column that is taken as text holds true or false; names it.
    """
    for column in _text_columns(args):
        if isinstance(row.get(column), bool):
            raise DataError(f"column {column!r} holds true or false where a text is expected; write yes or no instead")


def _event(job: Job, origin: Origin, row: Row | DataError) -> Event:
    args = job.args
    if isinstance(row, DataError):
        return BadRow(*origin, "", str(row))
    identity = cell(row, args.id_column) or f"{Path(origin.file).stem}_{origin.row}"
    try:
        _no_booleans(row, args)
        split = _split(row, args)
        answer = answer_cell(row, args.answer_column)
        fields = {name: cell(row, getattr(args, flag)) for name, flag in FIELDS.items()}
        fields["answer_type"] = kind_of_answer(fields["answer_type"], answer)
        kept = {name: to_json_value(row.get(name)) for name in args.keep}
        image, name = _image(args, row)
    except DataError as error:
        return BadRow(*origin, identity, str(error))
    asked = cell(row, args.question_column) if args.question_column else args.question
    meta = {**fields, **kept, "source": job.card.name, "license": job.card.license}
    return ConvertedItem(identity, split, asked, answer, image, name, meta, origin)


def _split(row: Row, args: Any) -> str:
    if not args.split_column:
        return "train"
    word = cell(row, args.split_column).lower()
    if word not in SPLIT_WORDS:
        known = ", ".join(sorted(SPLIT_WORDS))
        raise DataError(
            f"column {args.split_column!r} must say the split in one of the words {known}; got {describe(word)}"
        )
    return SPLIT_WORDS[word]


def _image(args: Any, row: Row) -> tuple[Path | bytes, str]:
    """Return the picture of a row and its name in `images/`.

    Raises:
        DataError: no picture is named, or it is not there.
    """
    value: Any = row.get(args.image_column)
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value, name_of_bytes(value)
    name = str(value).strip() if isinstance(value, str | int) else ""
    if not name:
        raise DataError(f"column {args.image_column!r} names no picture")
    name = f"{args.image_prefix}{name}{args.image_suffix}"
    root = Path(args.image_root)
    path = Path(name)
    if path.is_absolute():
        if not path.is_relative_to(root.resolve()):
            raise DataError(f"image {path.name} lies outside --image_root; give a folder above all pictures")
        path = path.relative_to(root.resolve())
    inside = path.as_posix()
    if ".." in path.parts:
        raise DataError(f"image {path.name} leads out of --image_root; give a folder above all pictures")
    if not is_file(root / inside):
        raise DataError(f"image {inside[:200]} is not in {root}")
    return root / inside, inside


def make_parser() -> Parser:
    """Return the parser of `llava data csv`."""
    parser = Parser(
        prog="llava data csv",
        description="A table (CSV, TSV, JSON, JSON lines, Parquet) to train.json, val.json, test.json and images/.",
        epilog="example: llava data csv cases.csv --image_column file --answer_column report --image_root scans "
        '--question "Describe the image." --patient_column patient --out data/cases',
    )
    parser.add_argument("paths", nargs="+", help="the table, or several of the same columns")
    add_output_options(parser)
    parser.add_argument("--image_column", required=True, help="names of the pictures, or (Parquet) the pictures")
    parser.add_argument("--answer_column", required=True, help="answers")
    parser.add_argument("--question_column", help="questions; without it --question is asked of every picture")
    parser.add_argument("--question", default="Describe the image.", help="the question, where no column holds it")
    parser.add_argument("--image_root", default=".", help="folder that the names of pictures are relative to")
    parser.add_argument("--image_prefix", default="", help="put before each name, for example images/")
    parser.add_argument("--image_suffix", default="", help="put behind each name, for example .png")
    parser.add_argument("--id_column", help="ids; without it file name and row number")
    parser.add_argument("--split_column", help="train, val(idation) or test; without it all rows are train")
    for name, flag in FIELDS.items():
        parser.add_argument(f"--{flag}", help=f"goes into the field {name}")
    parser.add_argument("--keep", nargs="*", default=[], help="further columns that are kept under their own names")
    parser.add_argument("--delimiter", help="between cells; told from the header by default (tab or comma)")
    parser.add_argument("--source", default=TABLE.name, help="goes into the field source of every row")
    parser.add_argument("--license", default=TABLE.license, help="goes into the field license of every row")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry of `llava data csv`."""
    args = make_parser().parse_args(argv)
    if args.delimiter is not None and len(args.delimiter) != 1:
        raise ConfigError(f"--delimiter must be one character, got {args.delimiter!r}")
    if taken := sorted({"id", "image", "conversations"}.intersection(args.keep)):
        raise ConfigError(f"--keep {', '.join(taken)}: rows have a field of that name already; rename the column")
    card = replace(TABLE, name=args.source, license=args.license)
    run_with_args(Converter("csv", card, read_events), args)
