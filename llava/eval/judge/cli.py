"""Commands of the GPT-assisted chat evaluation: judge the answers, and summarize the scores.

eval_multimodal_chat_gpt_score   questions, answers --judge--> scores file, table
summarize_gpt_review             scores file(s) --> table, agreement, page
"""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.compat import compat_help, with_aliases
from llava.errors import ConfigError
from llava.eval.judge import summary
from llava.eval.judge.cases import Case, read_cases
from llava.eval.judge.prompts import TEMPLATES
from llava.eval.judge.review import (
    REPLY_KEYS,
    JudgeSettings,
    chosen_defects,
    num_to_ask,
    release_of,
    review_cases,
    score_row,
)
from llava.eval.judge.scores import Rated, read_rated
from llava.judging.asking import ask_endpoint
from llava.judging.parsing import parser_of
from llava.judging.store import Judge, Store, reply_not_stored
from llava.openai_api import add_api_flags, settings_of
from llava.utils import log
from llava.utils.cli import Parser, check_folder
from llava.utils.files import refuse_overwriting
from llava.utils.jsonl import read_object, write_json, write_records
from llava.utils.provenance import provenance_fields
from llava.utils.terminal import write_out

logger = logging.getLogger(__name__)

REVIEW_FOLDER = Path("vqa/reviews/coco2014_val80")
"""Folder in which LLaVA's own summary looks for reviews."""

REVIEWS = "gpt4_text*.jsonl"
"""Pattern of the review files in that folder."""


FIRST_HELP = {
    "files": ["--question-file", "--answers-file", "--scores-file"],
    "judge": ["--model", "--api-type", "--api-base", "--api-key-env", "--temperature", "--swap-order"],
    "requests": ["--dry-run", "--offline", "--store", "--max-concurrency"],
    "scores": ["--domains", "--num-resamples", "--out"],
}
"""Options of the short help of the judging command by topic."""


def _add_published_options(parser: Parser) -> None:
    parser.add_argument("--compat", default="none", metavar="LIST", help=compat_help("judge"))
    parser.add_argument("--release", choices=list(REPLY_KEYS), default="none", help="alias of --compat RELEASE")
    for name, text in (("--with-defect", "RELEASE,NAME"), ("--fix", "RELEASE,-NAME")):
        parser.add_argument(name, nargs="+", default=[], metavar="NAME", help=f"alias of --compat {text}")


def _compat_of(args: Namespace) -> str:
    return with_aliases(args.compat, added=[args.release, *args.with_defect], fixed=args.fix)


def _add_summary_options(parser: Parser) -> None:
    group = parser.add_argument_group("summary")
    group.add_argument(
        "--domains", choices=["first", "all"], default="first", help="domains that a question counts for"
    )
    group.add_argument("--num-resamples", type=int, default=500, help="resamples of the intervals; 0: no intervals")
    group.add_argument("--seed", type=int, default=0, help="seed of the resampling")
    group.add_argument("--out", type=Path, help="write all figures to this JSON file")


def _score_parser() -> Parser:
    parser = Parser(
        prog="eval_multimodal_chat_gpt_score.py",
        description="Score chat answers against the reference answers with a judge.",
        epilog="example: eval_multimodal_chat_gpt_score.py --question-file questions.jsonl "
        "--answers-file answers.jsonl --scores-file scores.jsonl --swap-order",
    )
    files = parser.add_argument_group("files")
    files.add_argument("--question-file", "--question-input-path", required=True, type=Path, help="chat questions")
    files.add_argument("--answers-file", "--input-path", required=True, type=Path, help="answers of the model")
    files.add_argument(
        "--scores-file", "--output-path", required=True, type=Path, help="JSON lines, one judged question per line"
    )
    judge = parser.add_argument_group("judge")
    judge.add_argument("--store", type=Path, help="file of the judge's replies; default: SCORES_FILE.replies.jsonl")
    parser.add_switch("--offline", help="send no request; use only the replies in the store")
    parser.add_switch("--swap-order", help="judge in both orders and average the scores")
    judge.add_argument("--num-rounds", type=int, default=3, help="maximum number of replies until one is readable")
    judge.add_argument("--template", choices=list(TEMPLATES), default="chat-v1", help="instruction of the judge")
    judge.add_argument("--temperature", type=_temperature, default=0.0, help="of the judge; none: the endpoint's own")
    judge.add_argument("--max-tokens", type=int, default=1024, help="limit of a reply in tokens")
    judge.add_argument("--max-concurrency", type=int, default=8, help="requests in flight at once")
    parser.add_switch("--dry-run", help="print the number of requests and send none")
    add_api_flags(parser)
    _add_published_options(parser)
    _add_summary_options(parser)
    parser.show_first(FIRST_HELP)
    return parser


def _temperature(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


def score_main(argv: Sequence[str] | None = None) -> None:
    """Judge an answer file; a repeated run sends only the requests whose replies are not in the store.

    Raises:
        SystemExit: with status 1 if no question has a score.
    """
    args = _score_parser().parse_args(argv)
    log.setup_logging()
    read = [args.question_file, args.answers_file]
    refuse_overwriting(read, {"scores-file": args.scores_file, "store": _store_file(args), "out": args.out})
    settings = JudgeSettings(
        template=args.template,
        swap=args.swap_order,
        num_rounds=args.num_rounds,
        defects=chosen_defects(_compat_of(args)),
        release=release_of(_compat_of(args)),
    )
    cases = read_cases(args.question_file, args.answers_file, defects=settings.defects)
    judge = _judge(args)
    if args.dry_run:
        write_out(_plan(cases, judge, settings))
        return
    judgments = review_cases(cases, judge, settings)
    logger.info("%d requests to %s; all other replies were in the store", judge.num_asked, judge.name)
    write_records(args.scores_file, [score_row(judgment, settings) for judgment in judgments])
    command = ["eval_multimodal_chat_gpt_score.py", *(sys.argv[1:] if argv is None else argv)]
    provenance = _provenance(args, judge, settings, command)
    write_json(_provenance_file(args.scores_file), provenance)
    rated = read_rated(args.scores_file, parser=parser_of(settings.defects))
    report = _report(rated, args)
    _print(args.scores_file.name, report)
    if args.out is not None:
        write_json(args.out, {**report, "provenance": provenance})
    if all(one.scores is None for one in rated):
        sys.exit("no question has a score; the reasons are listed above")


def _store_file(args: Namespace) -> Path:
    store: Path = args.store or args.scores_file.with_name(f"{args.scores_file.name}.replies.jsonl")
    return store


def _judge(args: Namespace) -> Judge:
    """Return the judge that the options describe, with its store."""
    store = Store(_store_file(args))
    sampling = {"temperature": args.temperature, "max_tokens": args.max_tokens}
    if args.offline or args.dry_run:
        return Judge(args.model or settings_of(args).deployment, reply_not_stored, store, sampling=sampling)
    settings = settings_of(args)
    ask = ask_endpoint(settings, sampling=sampling, max_concurrency=args.max_concurrency, max_retries=args.max_retries)
    return Judge(settings.deployment, ask, store, sampling=sampling)


def _plan(cases: Sequence[Case], judge: Judge, settings: JudgeSettings) -> str:
    """Return the text of a dry run: the number and size of the requests."""
    num_requests, num_characters = num_to_ask(cases, judge, settings)
    return (
        f"{len(cases)} questions, {sum(case.failed for case in cases)} without an answer; "
        f"{num_requests} requests to {judge.name} of {num_characters} characters (about {num_characters // 4} tokens) "
        f"in the first round; all other replies are in the store\n"
    )


def _provenance(args: Namespace, judge: Judge, settings: JudgeSettings, command: Sequence[str]) -> dict[str, Any]:
    return provenance_fields(
        data={"questions": args.question_file, "answers": args.answers_file, "scores": args.scores_file},
        command=command,
        judge={"model": judge.name, **judge.sampling},
        template={"name": settings.template, "sha256": TEMPLATES[settings.template].sha256},
        orders=list(settings.orders),
        num_rounds=settings.num_rounds,
        parser=parser_of(settings.defects),
        release=settings.release,
        defects=sorted(settings.defects),
    )


def _provenance_file(scores: Path) -> Path:
    return scores.with_name(f"{scores.name}.provenance.json")


def _report(rated: Sequence[Rated], args: Namespace) -> dict[str, Any]:
    options = {"num_resamples": args.num_resamples, "seed": args.seed}
    report = summary.score_summary(rated, domains=args.domains, **options)
    return {**report, "orders": summary.of_orders(rated, **options)}


def _print(name: str, report: Mapping[str, Any]) -> None:
    """Print the published table, the table with intervals, the failures, and the agreement of both orders."""
    out = sys.stdout
    write_out(f"\n{name}\n{summary.published_table(report)}\n\n{summary.interval_table(report)}\n", out)
    write_out("intervals: 95 %, resampled by image; the published relative score is the mean of ratios\n", out)
    if report["failures"]:
        text = ", ".join(f"{reason}: {count}" for reason, count in report["failures"].items())
        write_out(f"without a score, excluded from all figures: {text}\n", out)
    if report["mean_words"] is not None:
        words = report["mean_words"]
        write_out(f"mean words: reference {words['reference']:.1f}, answer {words['answer']:.1f}\n", out)
    if report["orders"] is not None:
        orders = report["orders"]
        write_out(f"\nthe same judge in both orders, {orders['num_questions']} questions\n", out)
        write_out(f"{summary.agreement_table(orders)}\n", out)


def summarize_main(argv: Sequence[str] | None = None) -> None:
    """Summarize files of scores; without `--scores-file`, the review files of LLaVA in `--review-dir`."""
    parser = Parser(
        prog="summarize_gpt_review.py",
        description="Summarize the scores of judges.",
        epilog="example: summarize_gpt_review.py --scores-file scores.jsonl --against other-judge.jsonl",
    )
    parser.add_argument("--scores-file", type=Path, help="scores of LLaVA-Med (either release) or a LLaVA review")
    parser.add_argument("--against", type=Path, help="scores of the same answers by another judge: print the agreement")
    parser.add_argument(
        "--review-dir", type=Path, default=REVIEW_FOLDER, help=f"folder of {REVIEWS}, used without --scores-file"
    )
    parser.add_argument("--html", type=Path, help="write a page with figures and judged answers")
    parser.add_argument("--image-folder", type=Path, help="folder of the images shown on the page")
    parser.add_argument("--num-examples", type=int, default=12, help="judged answers on the page")
    _add_published_options(parser)
    _add_summary_options(parser)
    args = parser.parse_args(argv)
    log.setup_logging()
    check_folder(args.image_folder, "--image-folder")
    defects = chosen_defects(_compat_of(args))
    read = [path for path in (args.scores_file, args.against) if path is not None]
    refuse_overwriting(read, {"out": args.out, "html": args.html})
    if args.scores_file is None:
        needing = [name for name in ("against", "html", "out") if getattr(args, name) is not None]
        if needing:
            raise ConfigError(f"--{needing[0]} requires --scores-file")
        for path in _reviews(args.review_dir):
            _print_file(path, read_rated(path, parser=parser_of(defects)), args, defects)
        return
    rated = read_rated(args.scores_file, parser=parser_of(defects))
    report = _print_file(args.scores_file, rated, args, defects)
    if args.against is not None:
        report["agreement"] = _agreement(rated, args, parser_of(defects))
    if args.out is not None or args.html is not None:
        command = ["summarize_gpt_review.py", *(sys.argv[1:] if argv is None else argv)]
        report["provenance"] = _summary_provenance(args, defects, command)
    if args.out is not None:
        write_json(args.out, report)
    if args.html is not None:
        from llava.eval.judge.page import write_scores_page

        write_scores_page(
            args.html, args.scores_file, rated, report, image_folder=args.image_folder, num_examples=args.num_examples
        )


def _reviews(folder: Path) -> list[Path]:
    found = sorted(folder.glob(REVIEWS))
    if not found:
        raise ConfigError(
            f"{folder} contains no {REVIEWS}; pass a file with --scores-file or a folder with --review-dir"
        )
    return found


def _print_file(path: Path, rated: Sequence[Rated], args: Namespace, defects: frozenset[str]) -> dict[str, Any]:
    """Print the summary of one file in the format of the tool that wrote it, and return its figures."""
    report = _report(rated, args)
    if any(one.review for one in rated):
        name = path.stem.removeprefix("gpt4_text").lstrip("_-") or path.stem
        write_out(summary.review_text(name, rated, minus_one_counts="minus_one_counts" in defects) + "\n")
        write_out("mean scores by category, then the ratio of means in %\n")
    else:
        _print(path.name, report)
    return report


def _agreement(rated: Sequence[Rated], args: Namespace, parser: str) -> dict[str, Any]:
    """Print and return the agreement with a second judge."""
    other = read_rated(args.against, parser=parser)
    report = summary.of_judges(rated, other, num_resamples=args.num_resamples, seed=args.seed)
    write_out(f"\n{args.scores_file.name} against {args.against.name}, {report['num_questions']} questions\n")
    write_out(f"{summary.agreement_table(report)}\n")
    return report


def _summary_provenance(args: Namespace, defects: frozenset[str], command: Sequence[str]) -> dict[str, Any]:
    """Return the provenance of a summary, including the provenance files of the judged scores."""

    data = {"scores": args.scores_file} | ({} if args.against is None else {"against": args.against})
    facts = provenance_fields(data=data, command=command, seed=args.seed, defects=sorted(defects))
    for name, path in data.items():
        beside = _provenance_file(path)
        if beside.is_file():
            facts[f"judging of {name}"] = read_object(beside)
    return facts
