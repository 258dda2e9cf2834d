"""`llava data dicom DIR`: convert a folder of DICOM studies to rows in LLaVA format.

    headers --studies--> instances (with --per series, one each) --facts, table of texts--> conversations --> rows.json

A row has its image, modality, body part and view in words of closed lists, and patient, study and series as keys.
Files without a row are counted, and listed with the reason in a second file.
"""

from __future__ import annotations

import io
import logging
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from llava.constants import IMAGE_TOKEN
from llava.data.check.vocabulary import shown_counts
from llava.data.converters.tables import cell_text, read_table
from llava.data.dicom.studies import JOIN_TAGS, Instance, NotDicom, RepeatedInstance, files_of, scan_instances
from llava.data.pseudonyms import read_salt
from llava.data.quarantine import BadRow, Quarantine
from llava.errors import ConfigError, DataError, NotAnImageError
from llava.imaging.decode import load_image
from llava.imaging.dicom.policy import DEFAULT_POLICY, DicomPolicy, add_dicom_options
from llava.utils import log
from llava.utils.cli import Parser
from llava.utils.jsonl import write_atomic, write_json
from llava.utils.log import with_progress
from llava.utils.terminal import write_out

logger = logging.getLogger(__name__)

LEFT_OUT: dict[type[DataError], str] = {
    NotAnImageError: "DICOM files without an image",
    NotDicom: "files of other formats",
    RepeatedInstance: "repeated",
}
"""Error type of a skipped file to its category in the summary; all others are broken."""

QUESTION = "Describe the findings of this image."


def middle_instances(instances: Sequence[Instance]) -> list[Instance]:
    """Return the middle instance of every series, in the original order."""
    order = {instance.path: place for place, instance in enumerate(instances)}
    by_series = sorted(instances, key=lambda each: (each.keys.get("series", each.path), each.number, each.path))
    chosen = []
    for _, group in groupby(by_series, key=lambda each: each.keys.get("series", each.path)):
        members = list(group)
        chosen.append(members[(len(members) - 1) // 2])
    return sorted(chosen, key=lambda instance: order[instance.path])


def read_turns(
    table: str | Path,
    key_column: str,
    text_columns: Sequence[str],
    *,
    question: str,
    question_column: str | None = None,
) -> dict[str, list[tuple[str, str]]]:
    """Return the questions and answers of a table by key; texts of several columns are joined by newlines.

    With `question_column`, every row of the table is a question of its own, in the order of the table; without it, a
    key has one answer, to `question`.

    Raises:
        DataError: the table cannot be read, a key has two answers to one question, or an answer has no question; the
            message has the row number but no content.
    """
    texts: dict[str, dict[str, str]] = {}
    columns = (key_column, *text_columns, *([question_column] if question_column else []))
    for origin, row in read_table(table, columns=columns):
        if isinstance(row, DataError):
            raise row
        key = cell_text(row, key_column)
        text = "\n".join(filter(None, (cell_text(row, column) for column in text_columns)))
        if not key or not text:
            continue
        asked = cell_text(row, question_column) if question_column else question
        if not asked:
            raise DataError(f"{origin}: column {question_column!r} is empty; expected the question of the answer")
        if texts.setdefault(key, {}).setdefault(asked, text) != text:
            more = "" if question_column else "; if every row is a question of its own, pass --question-column"
            raise DataError(
                f"{origin}: column {key_column!r} repeats a key of an earlier row with a different text{more}"
            )
    return {key: list(turns.items()) for key, turns in texts.items()}


def rows_of(
    instance: Instance, *, per: str, turns: Sequence[tuple[str, str]], facts: bool, apart: bool = False
) -> list[dict[str, Any]]:
    """Return the rows of an instance; none if it has neither texts nor facts.

    Args:
        instance: the instance.
        per: `instance` or `series`: kind of the key that becomes the id.
        turns: questions and answers from a table.
        facts: whether to add questions about modality, body part and view.
        apart: write every question of the table as a row of its own, and the facts as another one.
    """
    identity = instance.keys.get(per, instance.path)
    stated = instance.facts.turns() if facts else []
    if not apart:
        parts = [(identity, [*turns, *stated])]
    else:  # `llava eval` asks the first question of a row, so that questions in later turns would never be scored
        parts = [(f"{identity}-{number}", [turn]) for number, turn in enumerate(turns)]
        parts.append((identity, stated))
    return [_row(instance, name, part) for name, part in parts if part]


def _row(instance: Instance, identity: str, turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return a row with these questions and answers; its image is the path of the instance."""
    written = []
    for number, (asked, answer) in enumerate(turns):
        prefix = f"{IMAGE_TOKEN}\n" if number == 0 else ""
        written += [{"from": "human", "value": prefix + asked}, {"from": "gpt", "value": answer}]
    stated = {
        "modality": instance.facts.modality,
        "body_part": instance.facts.organ,
        "view": instance.facts.plane,
        "laterality": instance.side,
        "num_frames": instance.num_frames if instance.num_frames > 1 else None,
        "patient": instance.keys.get("patient"),
        "study": instance.keys.get("study"),
        "series": instance.keys.get("series"),
    }
    known = {name: value for name, value in stated.items() if value is not None}
    return {"id": identity, "image": instance.path, **known, "conversations": written}


class ImageExporter:
    """Decoder that verifies the images of a folder and optionally writes them as PNG files.

    Args:
        folder: folder of the DICOM files.
        png: folder for PNG files; None writes none.
        policy: window and frame.
    """

    def __init__(self, folder: Path, png: Path | None, policy: DicomPolicy) -> None:
        self.folder = folder
        self.png = png
        self.policy = policy

    def name_of(self, instance: Instance) -> str:
        """Decode an image and return its name in the row: its path, or the name of its PNG file.

        Raises:
            DataError: the image does not decode, or has no instance identifier to name its PNG file.
        """
        image = load_image(instance.path, self.folder, dicom=self.policy)
        if self.png is None:
            return instance.path
        if "instance" not in instance.keys:
            raise DataError(f"image {instance.path} has no instance identifier, which would name its PNG file")
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        name = f"{instance.keys['instance']}.png"
        write_atomic(self.png / name, buffer.getvalue())
        return name


def build_rows(args: Namespace, *, salt: bytes) -> tuple[list[dict[str, Any]], list[BadRow], Counter[str]]:
    """Return the rows, the skipped files, and counts of both.

    Raises:
        DataError: the folder or the table cannot be used.
    """
    join = args.key if args.table else "path"
    texts = _table_turns(args) if args.table else {}
    left_out: list[BadRow] = []
    counts: Counter[str] = Counter()
    instances = []
    found = scan_instances(args.folder, paths := files_of(args.folder), salt=salt, join=join)
    for path, outcome in with_progress(found, title="reading headers", total=len(paths), unit="file"):
        if isinstance(outcome, DataError):
            left_out.append(BadRow(path, -1, "", str(outcome)))
            counts[_kind(outcome)] += 1
        else:
            instances.append(outcome)
    counts["images"] = len(instances)
    if args.table:
        counts["keys of the table without an image"] = _num_unused(texts, instances, args)
    chosen = middle_instances(instances) if args.per == "series" else instances
    counts["not the middle of their series"] = len(instances) - len(chosen)
    exporter = ImageExporter(args.folder, args.png, DEFAULT_POLICY.changed(args.dicom_window, args.dicom_frame))
    rows: list[dict[str, Any]] = []
    for instance in with_progress(chosen, title="decoding", unit="image"):
        turns = texts.get(instance.join, [])
        found_rows = rows_of(instance, per=args.per, turns=turns, facts=args.facts, apart=bool(args.question_column))
        if not found_rows:
            counts["without text and facts"] += 1
            continue
        try:
            image = exporter.name_of(instance) if args.check or args.png else instance.path
        except DataError as error:
            left_out.append(BadRow(instance.path, -1, instance.keys.get(args.per, instance.path), str(error)))
            counts["broken"] += 1
            continue
        rows += [{**row, "image": image} for row in found_rows]
        counts["with a text"] += bool(turns)
        counts["questions of the table"] += len(turns) if args.question_column else 0
    return rows, left_out, counts


def _table_turns(args: Namespace) -> dict[str, list[tuple[str, str]]]:
    return read_turns(
        args.table, args.key_column, args.text_column, question=args.question, question_column=args.question_column
    )


def _num_unused(texts: Mapping[str, object], instances: Iterable[Instance], args: Namespace) -> int:
    """Return the number of texts of a table that belong to no image.

    Raises:
        DataError: no text belongs to an image, so the rows would silently lack them.
    """
    num_unused = len(texts.keys() - {instance.join for instance in instances})
    if num_unused == len(texts):
        raise DataError(
            f"--table {args.table}: none of its {len(texts)} keys with a text (column {args.key_column!r}) is the "
            f"{args.key} of an image in {args.folder}. Check --key. Clean copies of `llava data deid` have new "
            "identifiers, so use --key path for them"
        )
    return num_unused


def _kind(error: DataError) -> str:
    return next((name for kind, name in LEFT_OUT.items() if isinstance(error, kind)), "broken")


def make_parser() -> Parser:
    """Return the parser of `llava data dicom`."""
    parser = Parser(prog="llava data dicom", description="Convert a folder of DICOM studies to rows in LLaVA format.")
    parser.add_argument("folder", type=Path, help="folder to search for DICOM files, including subfolders")
    parser.add_argument("--out", type=Path, required=True, help="output file of rows")
    parser.add_argument("--per", choices=["instance", "series"], default="instance", help="unit of a row")
    parser.add_argument(
        "--salt_file", help="file with the secret of the keys; created if missing; without it, keys are plain hashes"
    )
    parser.add_argument(
        "--png", type=Path, help="also write the images as PNG files, named by their keys, to this folder"
    )
    parser.add_switch("--check", True, help="decode every image, and skip broken ones")
    parser.add_switch("--facts", True, help="add questions about modality, body part and view")
    table = parser.add_argument_group("texts from a table")
    table.add_argument("--table", help="table as CSV, TSV, JSON lines or Parquet")
    table.add_argument(
        "--key", choices=["path", *JOIN_TAGS], default="study", help="what the key column of the table identifies"
    )
    table.add_argument("--key-column", help="column with the path, identifier or number")
    table.add_argument("--text-column", nargs="+", default=[], help="columns of the answer")
    table.add_argument("--question", default=QUESTION, help="question for that answer, without --question-column")
    table.add_argument(
        "--question-column", help="column of the question: each row of the table is one, and becomes a row of its own"
    )
    add_dicom_options(parser, suffix="; with --png")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run `llava data dicom`."""
    args = make_parser().parse_args(argv)
    log.setup_logging()
    if bool(args.table) != bool(args.key_column and args.text_column):
        raise ConfigError("--table, --key-column and --text-column belong together; pass all three or none")
    if args.question_column and not args.table:
        raise ConfigError("--question-column names a column of --table; pass the table, or omit it")
    if args.salt_file is None:
        logger.warning(
            "keys are plain hashes, which can be reversed by enumerating all numbers; pass --salt-file for safe keys"
        )
    rows, left_out, counts = build_rows(args, salt=b"" if args.salt_file is None else read_salt(args.salt_file))
    listed = args.out.with_suffix(".skipped.jsonl")
    Quarantine(listed).add(left_out)
    if not rows:
        raise DataError(f"{args.folder}: no image gives a row; {listed} lists the reason for each file")
    write_json(args.out, rows)
    write_out(_summary(rows, counts))
    write_out(f"{len(rows)} rows -> {args.out}; {len(left_out)} files left out -> {listed}\n")


def _summary(rows: Iterable[Mapping[str, Any]], counts: Mapping[str, int]) -> str:
    modalities = Counter(str(row.get("modality", "not stated")) for row in rows)
    lines = [f"  {count:>8} {name}" for name, count in counts.items() if count]
    lines += [
        f"  {count:>8} rows of modality {name}" for name, count in sorted(shown_counts("modality", modalities).items())
    ]
    return "\n".join(lines) + "\n"
