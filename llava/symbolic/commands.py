"""`llava rules check`, `score`, `priors`: check a rule file, score conversations, count true values."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llava.errors import DataError
from llava.symbolic.check import Findings, check_file, table_truths
from llava.symbolic.rubric import Priors, Reward, check_priors, count_values, reward
from llava.symbolic.rules import load_rules
from llava.symbolic.settings import PRESETS
from llava.symbolic.structure import RuleSet
from llava.utils.cli import Parser
from llava.utils.files import refuse_overwriting
from llava.utils.json_rows import read_records
from llava.utils.jsonl import read_object, write_json, write_records
from llava.utils.terminal import write_out

LISTED = 50
"""Maximum number of errors and warnings that are printed; --json has all."""


def make_check_parser() -> Parser:
    """Return the parser of `llava rules check`."""
    parser = Parser(prog="llava rules check", description="Check a rule file; exit status 1 for errors.")
    parser.add_argument("file", help="rule file, or the name of a shipped rule set")
    parser.add_argument("--table", type=Path, help="rows whose assignments are checked: JSON array or JSON lines")
    parser.add_switch("--json", help="print the result as JSON")
    return parser


def check_main(argv: Sequence[str] | None = None) -> None:
    """Check a rule file.

    Raises:
        SystemExit: status 1 for errors.
    """
    args = make_check_parser().parse_args(argv)
    rows = list(read_records(args.table)) if args.table else []
    found = check_file(args.file, rows, table=str(args.table))
    write_out(json.dumps(asdict(found), ensure_ascii=False, indent=2) + "\n" if args.json else _summary(found) + "\n")
    if found.errors:
        raise SystemExit(1)


def counted(number: int, name: str) -> str:
    """Return a number with its noun: `1 error`, `2 errors`."""
    return f"{number} {name}{'' if number == 1 else 's'}"


def _summary(found: Findings) -> str:
    lines = [f"{found.id}: {found.assignments:,} assignments, {found.paths:,} valid paths"] if found.id else []
    for kind, messages in (("error", found.errors), ("warning", found.warnings)):
        lines += [f"{kind}: {message}" for message in messages[:LISTED]]
        if len(messages) > LISTED:
            lines.append(f"{len(messages) - LISTED} more; --json lists all")
    lines.append(
        ", ".join(counted(len(of), name) for name, of in (("error", found.errors), ("warning", found.warnings)))
    )
    return "\n".join(lines)


def make_score_parser() -> Parser:
    """Return the parser of `llava rules score`."""
    parser = Parser(prog="llava rules score", description="Score conversations with a rule file.")
    parser.add_argument("file", help="rule file, or the name of a shipped rule set")
    parser.add_argument(
        "--conversations",
        type=Path,
        required=True,
        help="JSON lines with id, truth, asked, answers, references, finished",
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON lines with the reward of each conversation")
    parser.add_argument("--preset", choices=list(PRESETS), help="settings of the reward; default: the rule file's")
    parser.add_argument("--priors", type=Path, help="JSON file {node: {value: count}}; switches balance on")
    return parser


def score_main(argv: Sequence[str] | None = None) -> None:
    """Write the reward of every conversation of a file."""
    args = make_score_parser().parse_args(argv)
    rules = load_rules(args.file)
    refuse_overwriting([*rules.files, args.conversations, args.priors], {"--out": args.out})
    rows = list(_scored(rules, args, _read_priors(rules, args.priors)))
    write_records(args.out, rows)
    mean = sum(row["total"] for row in rows) / len(rows) if rows else 0.0
    write_out(f"{args.out}: {len(rows)} conversations, mean total {mean:.4f}\n")


def make_priors_parser() -> Parser:
    """Return the parser of `llava rules priors`."""
    parser = Parser(prog="llava rules priors", description="Count the true values of the rows of a training table.")
    parser.add_argument("file", help="rule file, or the name of a shipped rule set")
    parser.add_argument("--table", type=Path, required=True, help="rows of the training table")
    parser.add_argument("--out", type=Path, required=True, help="JSON file {node: {value: count}}")
    return parser


def priors_main(argv: Sequence[str] | None = None) -> None:
    """Write the counts of the true values of a table.

    Raises:
        DataError: the table is empty, or a row has no valid assignment; the message names the row.
    """
    args = make_priors_parser().parse_args(argv)
    rules = load_rules(args.file)
    refuse_overwriting([*rules.files, args.table], {"--out": args.out})
    truths, wrong = table_truths(rules, list(read_records(args.table)))
    if wrong:
        raise DataError(f"{args.table}, row {wrong[0][0]}: {wrong[0][1]}")
    if not truths:
        raise DataError(f"{args.table}: the table has no rows")
    write_json(args.out, count_values(rules, truths))
    write_out(f"{args.out}: counts of {len(truths)} rows\n")


def _read_priors(rules: RuleSet, path: Path | None) -> Priors | None:
    if path is None:
        return None
    try:
        return check_priors(rules, read_object(path))
    except DataError as error:
        raise DataError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def _scored(rules: RuleSet, args: Namespace, priors: Priors | None) -> Iterator[dict[str, Any]]:
    """Yield the output row of every conversation."""
    for index, row in enumerate(read_records(args.conversations)):
        try:
            yield {"id": row.get("id", index), **as_row(_reward_of(rules, row, args.preset, priors))}
        except DataError as error:
            raise DataError(f"{args.conversations}, row {index}: {error}") from None


def _reward_of(rules: RuleSet, row: dict[str, Any], preset: str | None, priors: Priors | None) -> Reward:
    for key, kind in {"truth": dict, "asked": list, "answers": list}.items():
        if not isinstance(row.get(key), kind):
            raise DataError(f"key {key!r}: expected {'an object' if kind is dict else 'a list'}")
    for key in ("references", "finished"):
        if row.get(key) is not None and not isinstance(row[key], list):
            raise DataError(f"key {key!r}: expected a list")
    return reward(
        rules,
        truth=row["truth"],
        asked=row["asked"],
        answers=row["answers"],
        references=row.get("references"),
        finished=row.get("finished"),
        preset=preset,
        priors=priors,
    )


def as_row(found: Reward) -> dict[str, Any]:
    """Return a reward as the fields of a JSON row."""
    names = ("values", "raw", "total", "turns", "violations", "components")
    return {name: getattr(found, name) for name in names}
