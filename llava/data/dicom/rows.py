"""`llava data dicom DIR`: a folder of studies to rows in LLaVA format.

    headers --dicom_folder--> instances, one a series if asked --facts, table of texts--> conversations --> rows.json

A row names its image, its modality, part of the body and view in words of closed lists, and patient, study and series
by keys. What is left out is counted, and listed with its reason beside the rows.
"""

from __future__ import annotations

import io
import logging
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from llava.constants import IMAGE_TOKEN
from llava.data.converters.tables import cell, read_table
from llava.data.dicom.pseudonyms import read_salt
from llava.data.dicom.studies import JOIN_TAGS, Instance, NotDicom, RepeatedInstance, files_of, scan_instances
from llava.data.quarantine import BadRow, Quarantine
from llava.errors import ConfigError, DataError, NotAPicture
from llava.imaging.decode import load
from llava.imaging.dicom.policy import DEFAULT, DicomPolicy, add_dicom_options
from llava.utils import log
from llava.utils.cli import Parser
from llava.utils.jsonl import write_atomic, write_json
from llava.utils.log import progress

logger = logging.getLogger(__name__)

LEFT_OUT: dict[type[DataError], str] = {
    NotAPicture: "DICOM files without a picture",
    NotDicom: "files of other formats",
    RepeatedInstance: "repeated",
}
"""Why a file is left out, to how the summary counts it; anything else is broken."""

QUESTION = "Describe the findings of this image."


def middle_instances(instances: Sequence[Instance]) -> list[Instance]:
    """Return the middle picture of every series, in the order in which the series appear."""
    order = {instance.path: place for place, instance in enumerate(instances)}
    by_series = sorted(instances, key=lambda each: (each.keys.get("series", each.path), each.number, each.path))
    chosen = []
    for _, group in groupby(by_series, key=lambda each: each.keys.get("series", each.path)):
        members = list(group)
        chosen.append(members[(len(members) - 1) // 2])
    return sorted(chosen, key=lambda instance: order[instance.path])


def read_texts(table: str | Path, key_column: str, text_columns: Sequence[str]) -> dict[str, str]:
    """Return key to text of a table; the texts of several columns follow each other, a line each.

    Raises:
        DataError: the table cannot be read, or names one key twice; says the row, never what is in it.
    """
    texts: dict[str, str] = {}
    for origin, row in read_table(table, columns=(key_column, *text_columns)):
        if isinstance(row, DataError):
            raise row
        key, text = cell(row, key_column), "\n".join(filter(None, (cell(row, column) for column in text_columns)))
        if key and text and texts.setdefault(key, text) != text:
            raise DataError(f"{origin}: column {key_column!r} repeats a key of an earlier row with another text")
    return texts


def row_of(instance: Instance, image: str, *, per: str, text: str, question: str, facts: bool) -> dict[str, Any] | None:
    """Return the row of a picture, or None where nothing can be said about it.

    Args:
        instance: the picture.
        image: name that the row calls it by.
        per: `instance` or `series`: whose key becomes the row's id.
        text: answer from a table; empty for none.
        question: that the text answers.
        facts: whether to ask for modality, part and view.
    """
    turns = [(question, text)] if text else []
    turns += instance.facts.turns() if facts else []
    if not turns:
        return None
    written = []
    for number, (asked, answer) in enumerate(turns):
        mark = f"{IMAGE_TOKEN}\n" if number == 0 else ""
        written += [{"from": "human", "value": mark + asked}, {"from": "gpt", "value": answer}]
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
    identity = instance.keys.get(per, instance.path)
    known = {name: value for name, value in stated.items() if value is not None}
    return {"id": identity, "image": image, **known, "conversations": written}


class ImageExporter:
    """Decodes the chosen pictures: to make sure that they are whole and, if asked for, to write them as PNG files."""

    def __init__(self, folder: Path, png: Path | None, policy: DicomPolicy) -> None:
        """Take pictures from `folder`, write them to `png` (None: only look)."""
        self.folder = folder
        self.png = png
        self.policy = policy

    def name_of(self, instance: Instance) -> str:
        """Decode a picture and return what its row calls it: its path, or the name of its PNG file.

        Raises:
            DataError: it does not decode, or has no identifier that its PNG file could be called by.
        """
        picture = load(instance.path, self.folder, dicom=self.policy)
        if self.png is None:
            return instance.path
        if "instance" not in instance.keys:
            raise DataError(
                f"image {instance.path} lacks an instance identifier, by which its PNG file would be called"
            )
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        name = f"{instance.keys['instance']}.png"
        write_atomic(self.png / name, buffer.getvalue())
        return name


def build_rows(args: Namespace, *, salt: bytes) -> tuple[list[dict[str, Any]], list[BadRow], Counter[str]]:
    """Return rows, what was left out, and counts of both.

    Raises:
        DataError: the folder or the table cannot be used.
    """
    join = args.key if args.table else "path"
    texts = read_texts(args.table, args.key_column, args.text_column) if args.table else {}
    left_out: list[BadRow] = []
    counts: Counter[str] = Counter()
    instances = []
    found = scan_instances(args.folder, paths := files_of(args.folder), salt=salt, join=join)
    for path, outcome in progress(found, title="reading headers", total=len(paths), unit="file"):
        if isinstance(outcome, DataError):
            left_out.append(BadRow(path, -1, "", str(outcome)))
            counts[_kind(outcome)] += 1
        else:
            instances.append(outcome)
    counts["pictures"] = len(instances)
    if args.table:
        counts["keys of the table that name no picture"] = _num_unused(texts, instances, args)
    chosen = middle_instances(instances) if args.per == "series" else instances
    counts["not the middle of their series"] = len(instances) - len(chosen)
    pictures = ImageExporter(args.folder, args.png, DEFAULT.changed(args.dicom_window, args.dicom_frame))
    rows = []
    for instance in progress(chosen, title="decoding", unit="image"):
        text = texts.get(instance.join, "")
        row = row_of(instance, instance.path, per=args.per, text=text, question=args.question, facts=args.facts)
        if row is None:
            counts["nothing known to say about them"] += 1
            continue
        try:
            row["image"] = pictures.name_of(instance) if args.check or args.png else instance.path
        except DataError as error:
            left_out.append(BadRow(instance.path, -1, str(row["id"]), str(error)))
            counts["broken"] += 1
            continue
        rows.append(row)
        counts["with a text"] += bool(text)
    return rows, left_out, counts


def _num_unused(texts: Mapping[str, str], instances: Iterable[Instance], args: Namespace) -> int:
    """Return how many texts of a table belong to no picture.

    Raises:
        DataError: none belongs to one: the rows would silently be without them.
    """
    num_unused = len(texts.keys() - {instance.join for instance in instances})
    if num_unused == len(texts):
        raise DataError(
            f"{args.table}: none of its {len(texts)} keys with a text (column {args.key_column!r}) is the {args.key} "
            f"of a picture in {args.folder}; is --key right? Clean copies of `llava data deid` have new identifiers: "
            "name them by --key path"
        )
    return num_unused


def _kind(error: DataError) -> str:
    return next((name for kind, name in LEFT_OUT.items() if isinstance(error, kind)), "broken")


def make_parser() -> Parser:
    """Return the options of `llava data dicom`."""
    parser = Parser(prog="llava data dicom", description="A folder of DICOM studies to rows in LLaVA format.")
    parser.add_argument("folder", type=Path, help="searched for DICOM files, also in folders inside it")
    parser.add_argument("--out", type=Path, required=True, help="file of rows to write")
    parser.add_argument("--per", choices=["instance", "series"], default="instance", help="one row for each of these")
    parser.add_argument("--salt_file", help="secret of the keys, made when absent; without it keys are plain hashes")
    parser.add_argument("--png", type=Path, help="write the pictures into this folder too, named by their keys")
    parser.add_switch("--check", True, help="decode every picture, and leave broken ones out")
    parser.add_switch("--facts", True, help="questions about modality, part of the body and view")
    table = parser.add_argument_group("texts from a table")
    table.add_argument("--table", help="CSV, TSV, JSON lines or Parquet")
    table.add_argument("--key", choices=["path", *JOIN_TAGS], default="study", help="what a row of the table is about")
    table.add_argument("--key-column", help="column with the file's path, identifier or number")
    table.add_argument("--text-column", nargs="+", default=[], help="columns that become the answer")
    table.add_argument("--question", default=QUESTION, help="what that text answers")
    add_dicom_options(parser, suffix="; with --png")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run `llava data dicom`."""
    args = make_parser().parse_args(argv)
    log.setup()
    if bool(args.table) != bool(args.key_column and args.text_column):
        raise ConfigError("--table, --key_column and --text_column belong together; give all three or none")
    if args.salt_file is None:
        logger.warning("keys are plain hashes, which can be undone by trying all numbers; --salt_file makes them safe")
    rows, left_out, counts = build_rows(args, salt=b"" if args.salt_file is None else read_salt(args.salt_file))
    listed = args.out.with_suffix(".skipped.jsonl")
    Quarantine(listed).add(left_out)
    if not rows:
        raise DataError(f"{args.folder}: no picture gives a row; {listed} says why files were left out")
    write_json(args.out, rows)
    sys.stdout.write(_summary(rows, counts))
    sys.stdout.write(f"{len(rows)} rows -> {args.out}; {len(left_out)} files left out -> {listed}\n")


def _summary(rows: Iterable[Mapping[str, Any]], counts: Mapping[str, int]) -> str:
    modalities = Counter(str(row.get("modality", "not stated")) for row in rows)
    lines = [f"  {count:>8} {name}" for name, count in counts.items() if count]
    lines += [f"  {count:>8} rows of modality {name}" for name, count in sorted(modalities.items())]
    return "\n".join(lines) + "\n"
