"""`llava data check FILE`: can rows and pictures be trained on, and does a score on the other file mean anything?

    llava data check train.json --images images --against test.json --html check.html --fix clean.json

Ends with status 1 when there are errors (with --strict also for warnings), else 0. Nothing that it writes shows a text
of the rows: findings name rows, rules and image files.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava.data.check.report import CheckReport, check_file, report_data, report_summary
from llava.data.check.row_index import as_array
from llava.data.check.rows import view_row
from llava.data.check.rules import FILE, RULES
from llava.data.groups import GROUP_FIELDS
from llava.data.records import file_text, form_of, stream_rows
from llava.errors import ConfigError, DataError
from llava.samples import to_row
from llava.utils import log
from llava.utils.cli import Parser
from llava.utils.files import refuse_overwriting
from llava.utils.jsonl import open_atomic, write_json


@dataclass(frozen=True, slots=True)
class FixResult:
    """What `write_fixed` did: rows written, rows left out, and how many of those broke each rule (or several)."""

    path: Path
    num_kept: int
    num_dropped: int
    by_rule: dict[str, int]


def write_fixed(report: CheckReport, path: Path) -> FixResult:
    """Write the cleaned copy of the checked file.

    Raises:
        DataError: the file has not as many rows as it had when it was checked.
    """
    source, dropped, by_rule = report.scans[FILE].path, _dropped(report), {}
    for rule, file in report.findings.rules():
        if file == FILE and RULES[rule].drops:
            by_rule[rule] = report.num_rows_of(rule, FILE)
    with open_atomic(path) as stream:
        stream.writelines(file_text(_kept(source, dropped), lines=form_of(source) == "lines"))
    num_dropped = int(dropped.sum())
    return FixResult(path, len(dropped) - num_dropped, num_dropped, by_rule)


def _kept(source: Path, dropped: np.ndarray[Any, np.dtype[np.bool_]]) -> Iterator[Any]:
    """Yield the rows that stay, as they should be written."""
    row = -1
    for row, value in stream_rows(source):
        if row < len(dropped) and not dropped[row]:
            yield _cleaned(value, row)
    if row + 1 != len(dropped):
        raise DataError(f"{source} changed while it was checked; no copy was written, check it again")


def _dropped(report: CheckReport) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Say for every row of the file whether the copy goes without it."""
    dropped = np.zeros(report.scans[FILE].index.num_rows, dtype=np.bool_)
    for rule, file in report.findings.rules():
        if file == FILE and RULES[rule].drops:
            dropped[as_array(report.findings.of(rule, FILE).rows)] = True
    return dropped


def _cleaned(value: Any, row: int) -> Any:
    """Return a row as it should be written; rows of question files have no such form and stay as they are."""
    seen = view_row(value, row)
    return value if seen.sample is None or seen.is_question else to_row(seen.sample)


def make_parser() -> Parser:
    """Return the parser of `llava data check`."""
    parser = Parser(prog="llava data check", description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("file", type=Path, help="data file: a JSON array or JSON lines, plain or gzipped")
    parser.add_argument("--images", type=Path, help="folder of its pictures; without it none is opened")
    parser.add_argument("--against", type=Path, help="file that must share nothing with it: its test set")
    parser.add_argument("--against_images", type=Path, help="folder of that file's pictures; default: --images")
    parser.add_argument(
        "--model", help="count tokens with this model's tokenizer: a trained model, or a language model"
    )
    parser.add_argument("--max_length", type=int, default=512, help="the --model_max_length to judge, in tokens")
    parser.add_argument("--group_fields", nargs="+", default=GROUP_FIELDS, help="fields that name a patient or a study")
    parser.add_switch("--strict", help="end with status 1 for warnings too")
    parser.add_argument("--json", type=Path, help="write the whole result to this file, for programs")
    parser.add_argument("--html", type=Path, help="write a page with small copies of the pictures to this file")
    parser.add_argument("--fix", type=Path, help="write a copy without the rows that break a rule to this file")
    parser.add_argument("--max_listed", type=int, default=1000, help="findings of one rule in words; rows are all kept")
    parser.add_argument("--num_threads", type=int, help="threads that open pictures; default: one for each processor")
    parser.add_argument("--version", default="vicuna_v1", help="template, where --model does not bring one")
    parser.add_argument("--num_image_tokens", type=int, default=256, help="tokens of an image, likewise")
    parser.add_switch("--mm_use_im_start_end", help="write start and end tokens around images, likewise")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Check a data file.

    Raises:
        SystemExit: with status 1 when there are findings that say so.
    """
    args = make_parser().parse_args(argv)
    log.setup()
    _refuse(args)
    report = check_file(
        args.file,
        images=args.images,
        against=args.against,
        against_images=args.against_images,
        group_fields=args.group_fields,
        max_listed=args.max_listed,
        num_threads=args.num_threads,
    )
    if args.model:
        _count_tokens(args, report)
    _write(args, report)
    status = report.exit_status(strict=args.strict)
    if status:
        raise SystemExit(status)


def _refuse(args: Namespace) -> None:
    """Refuse flags that mean nothing together, before anything is read.

    Raises:
        ConfigError: they do.
    """
    if args.against_images and not (args.against and args.images):
        raise ConfigError("--against_images needs --against FILE and --images DIR: pictures of both are compared")
    for name in ("max_listed", "max_length", "num_threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} must be at least 1, got {value}")
    refuse_overwriting([args.file, args.against], {name: getattr(args, name) for name in ("fix", "json", "html")})


def _count_tokens(args: Namespace, report: CheckReport) -> None:
    from llava.data.check.tokens import count_tokens
    from llava.data.show import load_processor  # brings torch and transformers

    processor = load_processor(args.model, args)
    limit = args.max_length
    report.tokens = count_tokens(
        report.scans[FILE].path, processor, report.image_scan, report.findings, model=args.model, limit=limit
    )


def _write(args: Namespace, report: CheckReport) -> None:
    """Write the summary, and the files that were asked for."""
    sys.stdout.write(report_summary(report, strict=args.strict))
    if args.json:
        write_json(args.json, report_data(report, strict=args.strict))
        sys.stdout.write(f"report: {args.json}\n")
    if args.html:
        from llava.data.check.page import write_page

        write_page(args.html, report, strict=args.strict)
        sys.stdout.write(f"page: {args.html}\n")
    if args.fix:
        fixed = write_fixed(report, args.fix)
        rules = ", ".join(f"{rule} {count}" for rule, count in fixed.by_rule.items())
        sys.stdout.write(
            f"copy: {fixed.path}, {fixed.num_kept} rows; left out {fixed.num_dropped} ({rules or 'none'})\n"
        )
