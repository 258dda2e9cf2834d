"""`llava data check FILE`: find rows and images that cannot be trained on, and leaks into a test set.

    llava data check train.json --images images --against test.json --html check.html --fix clean.json

The exit status is 1 for errors (with --strict also for warnings), else 0. The output shows no text of the rows;
findings name rows, rules and image files.
"""

from __future__ import annotations

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
from llava.errors import ConfigError, DataError
from llava.samples import to_row
from llava.utils import log
from llava.utils.cli import Parser
from llava.utils.files import refuse_overwriting
from llava.utils.json_rows import form_of, iter_rows
from llava.utils.jsonl import file_text, open_atomic, write_json
from llava.utils.plugins import add_plugin_option
from llava.utils.terminal import write_out


@dataclass(frozen=True, slots=True)
class FixResult:
    """Result of `write_fixed`: rows kept and dropped, and the number of dropped rows by rule."""

    path: Path
    num_kept: int
    num_dropped: int
    by_rule: dict[str, int]


def write_fixed(report: CheckReport, path: Path) -> FixResult:
    """Write the cleaned copy of the checked file.

    Raises:
        DataError: the number of rows changed since the check.
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
    """Yield the remaining rows in normalized form."""
    row = -1
    for row, value in iter_rows(source):
        if row < len(dropped) and not dropped[row]:
            yield _cleaned(value, row)
    if row + 1 != len(dropped):
        raise DataError(f"{source} changed during the check, so no copy was written; check it again")


def _dropped(report: CheckReport) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return a mask of the rows that the copy omits."""
    dropped = np.zeros(report.scans[FILE].index.num_rows, dtype=np.bool_)
    for rule, file in report.findings.rules():
        if file == FILE and RULES[rule].drops:
            dropped[as_array(report.findings.of(rule, FILE).rows)] = True
    return dropped


def _cleaned(value: Any, row: int) -> Any:
    """Return a row in normalized form; those of other kinds are returned unchanged."""
    seen = view_row(value, row)
    is_other = seen.is_question or seen.pair is not None or seen.is_good is not None
    return value if seen.sample is None or is_other else to_row(seen.sample)


def make_parser() -> Parser:
    """Return the parser of `llava data check`."""
    parser = Parser(
        prog="llava data check",
        description="Find rows and images that cannot be trained on, and leaks into a test set.",
    )
    parser.add_argument("file", type=Path, help="data file: JSON array or JSON lines, plain or gzipped")
    parser.add_argument("--images", type=Path, metavar="DIR", help="image folder; without it no image is opened")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="FILE",
        help="file to compare with, for example the test set; nothing may be in both",
    )
    parser.add_argument(
        "--against_images", type=Path, metavar="DIR", help="image folder of the --against file; default: --images"
    )
    parser.add_argument("--model", help="trained model or language model whose tokenizer counts tokens")
    parser.add_argument("--max_length", type=int, default=512, help="the --model-max-length to evaluate, in tokens")
    parser.add_argument("--group_fields", nargs="+", default=GROUP_FIELDS, help="fields with patient or study ids")
    parser.add_switch("--strict", help="exit with status 1 also for warnings")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the complete result as JSON to this file")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write an HTML report with thumbnails to this file")
    parser.add_argument(
        "--fix", type=Path, metavar="FILE", help="write a copy without the rows that violate a rule to this file"
    )
    parser.add_argument("--max_listed", type=int, default=1000, help="messages per rule; row numbers are not limited")
    parser.add_argument("--num_threads", type=int, help="threads that open images; default: one per CPU")
    parser.add_argument("--version", default="vicuna_v1", help="conversation template, if --model has none")
    parser.add_argument(
        "--num_image_tokens", type=int, default=256, help="tokens per image, if --model does not define it"
    )
    parser.add_switch(
        "--mm_use_im_start_end", help="add start and end tokens around images, if --model does not define it"
    )
    parser.add_switch("--show-folders", help="show folders of images on the page; they often name patients")
    add_plugin_option(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Check a data file.

    Raises:
        SystemExit: status 1 for errors, with --strict also for warnings.
    """
    args = make_parser().parse_args(argv)
    log.setup_logging()
    _check_options(args)
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


def _check_options(args: Namespace) -> None:
    """Check the options before any file is read.

    Raises:
        ConfigError: options are inconsistent or out of range.
    """
    if args.against_images and not (args.against and args.images):
        raise ConfigError(
            "--against-images requires --against FILE and --images DIR, as the images of both files are compared"
        )
    for name in ("max_listed", "max_length", "num_threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    refuse_overwriting([args.file, args.against], {name: getattr(args, name) for name in ("fix", "json", "html")})


def _count_tokens(args: Namespace, report: CheckReport) -> None:
    from llava.data.check.tokens import count_tokens
    from llava.data.show import load_processor  # imports torch and transformers

    processor = load_processor(args.model, args)
    limit = args.max_length
    report.tokens = count_tokens(
        report.scans[FILE].path, processor, report.image_scan, report.findings, model=args.model, limit=limit
    )


def _write(args: Namespace, report: CheckReport) -> None:
    """Write the summary and the requested files."""
    write_out(report_summary(report, strict=args.strict))
    if args.json:
        write_json(args.json, report_data(report, strict=args.strict))
        write_out(f"report: {args.json}\n")
    if args.html:
        from llava.data.check.page import write_page

        write_page(args.html, report, strict=args.strict, show_folders=args.show_folders)
        write_out(f"page: {args.html}\n")
    if args.fix:
        fixed = write_fixed(report, args.fix)
        rules = ", ".join(f"{rule} {count}" for rule, count in fixed.by_rule.items())
        write_out(f"copy: {fixed.path}, {fixed.num_kept} rows; dropped {fixed.num_dropped} ({rules or 'none'})\n")
