"""Converter from a table (CSV, TSV, JSON, JSON lines or Parquet) to LLaVA rows by column name.

    table + --image-column, --answer-column, ... --> train.json (val.json, test.json), images/, manifest.json

Command:
    llava data csv cases.csv --image-column file --question-column question --answer-column answer --out data/cases \
        --image-root scans --source "Our hospital" --license "internal"
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from llava.data.converters.base import Converter, Job, add_output_options, run_with_args
from llava.data.converters.dataset_cards import DatasetCard
from llava.data.converters.items import SPLIT_WORDS, ConvertedItem, Event, kind_of_answer
from llava.data.converters.output import name_of_bytes
from llava.data.converters.persons import PersonColumns
from llava.data.converters.sources import is_file
from llava.data.converters.tables import (
    Row,
    answer_cell,
    cell_text,
    column_names,
    read_table,
    require_columns,
    to_json_value,
)
from llava.data.pseudonyms import key_of, read_salt
from llava.data.quarantine import BadRow
from llava.errors import ConfigError, DataError
from llava.samples import Origin, type_and_length
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
"""Field of the row to the option that names its column."""

PERSON_FIELDS = ("patient", "study")
"""Fields that identify a person."""

TABLE = DatasetCard("table", "a table of your own", "not stated", "Pass the table; the images are in --image-root.")


def read_events(job: Job, *, salt: bytes | None = None) -> Iterator[Event]:
    """Yield a question for each row of the tables; with a salt, columns of persons are written as keys."""
    args = job.args
    if not job.sources.files:
        raise ConfigError("no table given; pass the table file as argument and the image folder as --image-root")
    columns = {getattr(args, FIELDS[kind]): kind for kind in PERSON_FIELDS if getattr(args, FIELDS[kind])}
    persons = PersonColumns(columns, salt)
    for path in job.sources.files:
        job.inputs[path.name] = path
        require_columns([*_text_columns(args), *args.keep], column_names(path, delimiter=args.delimiter), path)
        for origin, row in read_table(path, columns=_required(args), delimiter=args.delimiter):
            yield _event(job, origin, row, persons)


def _required(args: Any) -> list[str]:
    named = (args.image_column, args.answer_column, args.question_column)
    return [column for column in named if column]


def _text_columns(args: Any) -> list[str]:
    """Return the names of all columns that are read as text."""
    flags = [getattr(args, flag) for flag in ("id_column", "split_column", *FIELDS.values())]
    return [*_required(args), *(column for column in flags if column)]


def _no_booleans(row: Row, args: Any) -> None:
    """Check that no text column of a row holds a boolean, as JSON and Parquet tables may.

    Raises:
        DataError: a text column holds true or false; the message names it.
    """
    for column in _text_columns(args):
        if isinstance(row.get(column), bool):
            raise DataError(f"column {column!r} holds a boolean; expected text. Write yes or no instead")


def _event(job: Job, origin: Origin, row: Row | DataError, persons: PersonColumns) -> Event:
    args = job.args
    if isinstance(row, DataError):
        return BadRow(*origin, "", str(row))
    place = f"{Path(origin.file).stem}_{origin.row}"
    identity = persons.written(args.id_column, cell_text(row, args.id_column)) if args.id_column else ""
    try:
        _no_booleans(row, args)
        split = _split(row, args)
        answer = answer_cell(row, args.answer_column)
        columns = {name: getattr(args, flag) for name, flag in FIELDS.items()}
        fields = {name: cell_text(row, column) for name, column in columns.items()}
        named = [fields[name] for name in PERSON_FIELDS]
        fields |= {name: persons.written(columns[name], fields[name]) for name in PERSON_FIELDS if columns[name]}
        fields["answer_type"] = kind_of_answer(fields["answer_type"], answer)
        kept = {name: _kept(row, name, persons) for name in args.keep}
        image, name = _image(args, row)
    except DataError as error:
        return BadRow(*origin, identity or place, str(error))
    persons.check_image_name(name, named)
    asked = cell_text(row, args.question_column) if args.question_column else args.question
    meta = {**fields, **kept, "source": job.card.name, "license": job.card.license}
    return ConvertedItem(identity or place, split, asked, answer, image, name, meta, origin)


def _kept(row: Row, column: str, persons: PersonColumns) -> Any:
    """Return the value of a column of `--keep`, as a key if it identifies persons."""
    value, text = to_json_value(row.get(column)), cell_text(row, column)
    if not isinstance(value, str) and not persons.is_person(column):
        return value
    written = persons.written(column, text)
    return value if written == text else written


def _split(row: Row, args: Any) -> str:
    if not args.split_column:
        return "train"
    word = cell_text(row, args.split_column).lower()
    if word not in SPLIT_WORDS:
        known = ", ".join(sorted(SPLIT_WORDS))
        raise DataError(f"column {args.split_column!r} holds {type_and_length(word)}; expected a split, one of {known}")
    return SPLIT_WORDS[word]


def _image(args: Any, row: Row) -> tuple[Path | bytes, str]:
    """Return the image of a row and its name in `images/`.

    Raises:
        DataError: the row names no image, or the image does not exist.
    """
    value: Any = row.get(args.image_column)
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value, name_of_bytes(value)
    name = str(value).strip() if isinstance(value, str | int) else ""
    if not name:
        raise DataError(f"column {args.image_column!r} names no image")
    name = f"{args.image_prefix}{name}{args.image_suffix}"
    root = Path(args.image_root)
    path = Path(name)
    if path.is_absolute():
        if not path.is_relative_to(root.resolve()):
            raise DataError(f"image {path.name} lies outside --image-root; set it to a folder that contains all images")
        path = path.relative_to(root.resolve())
    inside = path.as_posix()
    if ".." in path.parts:
        raise DataError(f"image {path.name} leads out of --image-root; set it to a folder that contains all images")
    if not is_file(root / inside):
        raise DataError(f"image {inside[:200]} is not in --image-root {root}")
    return root / inside, inside


def make_parser() -> Parser:
    """Return the parser of `llava data csv`."""
    parser = Parser(
        prog="llava data csv",
        description="Convert tables (CSV, TSV, JSON, JSON lines, Parquet) to {train,val,test}.json and images/.",
    )
    parser.add_argument("paths", nargs="+", help="tables with the same columns")
    add_output_options(parser)
    parser.add_argument("--image_column", required=True, help="column with the image names or, in Parquet, the images")
    parser.add_argument("--answer_column", required=True, help="column with the answers")
    parser.add_argument("--question_column", help="column with the questions; default: --question for every image")
    parser.add_argument(
        "--question", default="Describe the image.", help="question for every image, without --question-column"
    )
    parser.add_argument("--image_root", default=".", help="folder that image names are relative to")
    parser.add_argument("--image_prefix", default="", help="prefix of each image name, for example images/")
    parser.add_argument("--image_suffix", default="", help="suffix of each image name, for example .png")
    parser.add_argument("--id_column", help="column with the ids; default: file name and row number")
    parser.add_argument("--split_column", help="column with train, val(idation) or test; default: all rows are train")
    for name, flag in FIELDS.items():
        parser.add_argument(f"--{flag}", help=f"column for the field {name}")
    parser.add_argument("--keep", nargs="*", default=[], help="further columns to keep under their own names")
    parser.add_argument(
        "--salt_file", help="file with the secret of keys for columns that name persons; created if missing"
    )
    parser.add_argument("--delimiter", help="cell delimiter; default: tab or comma, from the header")
    parser.add_argument("--source", default=TABLE.name, help="value of the field source of every row")
    parser.add_argument("--license", default=TABLE.license, help="value of the field license of every row")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run `llava data csv`.

    Raises:
        ConfigError: --delimiter is longer than a character, or --keep names a field that rows have.
        DataError: a table or row cannot be used.
    """
    args = make_parser().parse_args(argv)
    if args.delimiter is not None and len(args.delimiter) != 1:
        raise ConfigError(f"--delimiter must be one character, got {args.delimiter!r}")
    if taken := sorted({"id", "image", "conversations"}.intersection(args.keep)):
        raise ConfigError(f"--keep {', '.join(taken)}: every row has a field of that name; rename the column")
    salt = None if args.salt_file is None else read_salt(args.salt_file)
    # The manifest compares settings and is shared with the data, so it has a key of the salt in place of its path.
    shared = {name: value for name, value in vars(args).items() if name != "salt_file"}
    if salt is not None:
        shared["salt_file"] = key_of("salt", "", salt)
    card = replace(TABLE, name=args.source, license=args.license)
    run_with_args(Converter("csv", card, partial(read_events, salt=salt)), Namespace(**shared))
