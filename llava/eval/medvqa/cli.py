"""Scoring commands of LLaVA-Med: one answer file (`run_eval`), or a folder (`run_eval_batch`)."""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from llava.compat import compat_help, parse_compat, with_aliases
from llava.errors import ConfigError, DataError, LlavaError
from llava.eval.medvqa import items as medvqa_items
from llava.eval.medvqa.metrics import METRIC_VERSION, Program, legacy_scores
from llava.eval.medvqa.report import NOT_SCORED, full_report, legacy_table, report_table
from llava.utils import log
from llava.utils.cli import Parser
from llava.utils.json_rows import read_records
from llava.utils.jsonl import write_json, write_records
from llava.utils.lookup import lookup
from llava.utils.provenance import provenance_fields
from llava.utils.terminal import write_out

logger = logging.getLogger(__name__)

PVQA_ROWS = ("exact match score", "f1 score", "precision", "recall", "open accuracy", "yes/no accuracy")
"""Rows of the table that the PathVQA variants print."""


@dataclass(frozen=True, slots=True)
class TestType:
    """Kind of answer file.

    Attributes:
        truth: name of the ground truth file.
        datasets: data sets that have one.
        results: default name of the results file.
    """

    truth: str
    datasets: tuple[str, ...]
    results: str


TEST_TYPES: dict[str, TestType] = {
    "test-answer-file": TestType(
        "test.json", ("data_RAD", "vqa_rad", "pvqa", "Slake1.0"), "eval_results_med_datasets.jsonl"
    ),
    "test_w_options-answer-file": TestType(
        "test_w_options.json", ("data_RAD", "pvqa", "Slake1.0"), "eval_results_med_datasets_w_options.jsonl"
    ),
    "test_zh-answer-file": TestType("test_zh.json", ("Slake1.0",), "eval_results_med_datasets_zh.jsonl"),
    "test_with_options-answer-file": TestType(
        "test.jsonl", ("data_RAD",), "eval_results_med_datasets_with_option.jsonl"
    ),
}
"""Kinds of answer files, by the value of `--target-test-type`."""


def _add_score_options(parser: Parser) -> None:
    parser.add_argument("--compat", default="published", metavar="LIST", help=compat_help("scores"))
    for name, text in (("--fix", "published,-NAME"), ("--with-defect", "published,NAME")):
        parser.add_argument(name, nargs="+", default=[], metavar="NAME", help=f"alias of --compat {text}")
    parser.add_argument("--num-resamples", type=int, default=500, help="resamples of the intervals; 0: no intervals")
    parser.add_argument("--seed", type=int, default=0, help="seed of the resampling")


def _defects(args: Namespace) -> frozenset[str]:
    return parse_compat(with_aliases(args.compat, added=args.with_defect, fixed=args.fix), "scores")


def run_eval(argv: Sequence[str] | None = None) -> None:
    """Score one answer file; print the published table, then the strict scores with intervals."""
    parser = Parser(
        prog="run_eval.py",
        description="Score one medical VQA answer file.",
        epilog="example: python llava/eval/run_eval.py --gt vqa_rad/test.json --pred answers.jsonl",
    )
    parser.add_argument("--gt", required=True, type=Path, help="questions with references (test.json)")
    parser.add_argument("--pred", required=True, type=Path, help="answer file")
    parser.add_argument(
        "--candidate", "--c", type=Path, help='{"0": [answers]} or train.json; without it, open accuracy is left out'
    )
    parser.add_argument("--dataset", choices=["pvqa"], help="print the rows of the PathVQA variant")
    parser.add_argument("--out", type=Path, help="write all figures to this JSON file")
    _add_score_options(parser)
    args, unknown = parser.parse_known_args(argv)
    log.setup_logging()
    if unknown:
        logger.warning("arguments without effect: %s", " ".join(unknown))
    samples = medvqa_items.read_truth(args.gt)
    answers = list(read_records(args.pred))
    items = medvqa_items.join_answers(samples, answers, source=args.pred.name)
    candidates = None if args.candidate is None else medvqa_items.read_candidates(args.candidate)
    defects = _defects(args)
    columns = legacy_scores(items, program="run_eval", candidates=candidates, defects=defects)
    print_legacy(
        args.gt.resolve().parent.name,
        legacy_table(columns, names=PVQA_ROWS if args.dataset == "pvqa" else None),
        items,
        swapped="swapped_counts" in defects,
    )
    for name in NOT_SCORED.keys() - columns.keys():
        write_out(f"note: {NOT_SCORED[name]}\n")
    report = full_report(
        items, candidates=candidates, defects=defects, num_resamples=args.num_resamples, seed=args.seed
    )
    print_strict(report)
    if args.out is not None:
        data = {"ground_truth": args.gt, "answers": args.pred}
        report["provenance"] = provenance_fields(data=data, command=_command("run_eval.py", argv), seed=args.seed)
        write_json(args.out, report)


def print_legacy(
    title: str, table: str, items: Sequence[medvqa_items.ScoredItem], *, swapped: bool, out: TextIO | None = None
) -> None:
    """Print the published output: title, counts (open and closed exchanged if `swapped`), table."""
    out = out or sys.stdout
    num_open = sum(not item.closed for item in items)
    first, second = (len(items) - num_open, num_open) if swapped else (num_open, len(items) - num_open)
    write_out(f"\n========\n {title}\n", out)
    write_out(f"num_gt_ids: {len(items)} || num_pred_ids: {len(items)}\n", out)
    write_out(f"num_open {first} || num_close {second}\n", out)
    write_out(f"{table}\n", out)


def print_strict(report: dict[str, Any], *, out: TextIO | None = None) -> None:
    """Print the counts of a report and the strict scores with their intervals."""
    out = out or sys.stdout
    count = report["counts"]
    write_out(
        f"\nstrict scores, metric version {METRIC_VERSION}; {count['questions']} questions on {count['images']} images "
        f"({count['open']} open, {count['closed']} closed), {count['unparsable']} yes/no answers without a decision, "
        f"{count['failed']} failed\n{report_table(report['scores']['strict'])}\n",
        out,
    )


def run_eval_batch(argv: Sequence[str] | None = None) -> None:
    """Score all answer files of one type under a folder and write one row per file.

    Raises:
        SystemExit: with status 1 if no file was scored.
    """
    parser = Parser(
        prog="run_eval_batch.py",
        description="Score all medical VQA answer files under a folder.",
        epilog="example: python llava/eval/run_eval_batch.py --pred-file-parent-path answers --gt-root data",
    )
    parser.add_argument("--pred-file-parent-path", required=True, type=Path, help="folder searched for answer files")
    parser.add_argument("--target-test-type", default="test-answer-file", help=f"one of {', '.join(TEST_TYPES)}")
    parser.add_argument("--gt-root", type=Path, help="folder with DATASET/test.json or test.json; searched first")
    parser.add_argument("--results-file", type=Path, help="default: the published name, in the current folder")
    _add_score_options(parser)
    args, unknown = parser.parse_known_args(argv)
    log.setup_logging()
    if unknown:
        logger.warning("arguments without effect: %s", " ".join(unknown))
    kind = lookup(TEST_TYPES, args.target_test_type, "test type")
    if not args.pred_file_parent_path.is_dir():
        raise ConfigError(f"--pred-file-parent-path {args.pred_file_parent_path} is not a folder")
    command = _command("run_eval_batch.py", argv)
    rows = list(_score_files(args, kind, command))
    if not rows:
        sys.exit(
            f"nothing was scored: no file under {args.pred_file_parent_path} whose name ends in "
            f"{args.target_test_type}.jsonl could be joined with a {kind.truth}; see the messages above, and pass the "
            f"folder of the ground truth with --gt-root"
        )
    write_records(args.results_file or Path(kind.results), rows)


def _score_files(args: Namespace, kind: TestType, command: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the result row of every answer file that can be scored; print a reason for the others."""
    for pred in sorted(args.pred_file_parent_path.rglob(f"*{args.target_test_type}.jsonl")):
        try:
            dataset = dataset_of(pred, kind)
            truth = find_truth(pred, dataset, kind, gt_root=args.gt_root, top=args.pred_file_parent_path)
            yield _score_file(pred, dataset, truth, args, command)
        except LlavaError as error:
            write_out(f">>>Skip {pred}: {error}\n")


def _score_file(pred: Path, dataset: str, truth: Path, args: Namespace, command: Sequence[str]) -> dict[str, Any]:
    items = medvqa_items.join_answers(medvqa_items.read_truth(truth), read_records(pred), source=pred.name)
    program: Program = "run_eval_batch"
    defects = _defects(args)
    table = legacy_table(legacy_scores(items, program=program, defects=defects))
    print_legacy(f"{dataset}: {pred.name}", table, items, swapped=False)
    report = full_report(items, defects=defects, num_resamples=args.num_resamples, seed=args.seed)
    print_strict(report)
    provenance = provenance_fields(data={"ground_truth": truth, "answers": pred}, command=command, seed=args.seed)
    return {"dataset": dataset, "pred_file": str(pred), "results": table, "report": report, "provenance": provenance}


def dataset_of(pred: Path, kind: TestType) -> str:
    """Return the data set whose name occurs last in a file's path.

    Raises:
        DataError: the path contains no such name.
    """
    path = str(pred.absolute())
    found = [(path.rfind(name), name) for name in kind.datasets if name in path]
    if not found:
        known = ", ".join(kind.datasets)
        raise DataError(f"the path names no data set; expected a folder or file named after one of {known}")
    return max(found)[1]


def find_truth(pred: Path, dataset: str, kind: TestType, *, gt_root: Path | None, top: Path) -> Path:
    """Return the ground truth of an answer file: under `gt_root`, else in its folders up to `top`.

    Raises:
        DataError: the file is not found; the message names the searched paths.
    """
    places = [] if gt_root is None else [gt_root / dataset / kind.truth, gt_root / kind.truth]
    stop = top.resolve()
    for folder in pred.resolve().parents:
        places += [folder / kind.truth, folder / dataset / kind.truth]
        if folder == stop:
            break
    for place in places:
        if place.is_file():
            return place
    raise DataError(f"{kind.truth} not found, tried {', '.join(map(str, places))}; pass its folder with --gt-root")


def _command(name: str, argv: Sequence[str] | None) -> list[str]:
    """Return the command line as typed."""
    return [name, *(sys.argv[1:] if argv is None else argv)]
