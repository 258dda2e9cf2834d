"""`llava eval`: answer a question file, answer it again on gray images, score both, and write a page.

llava eval --model runs/first --data test.json --image-folder images --out runs/first/eval

    data --answers--> answers.jsonl ----------+
         --gray image--> answers-blank.jsonl -+--score--> results.json, report.html, tables on the screen
    train data --majority, candidates---------+
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from llava.compat import parse_compat, with_aliases
from llava.data.records import load_samples
from llava.errors import ConfigError
from llava.eval import fingerprint
from llava.eval import options as model_options
from llava.eval.inference import AnswerOptions, AnswerRun, AnswerSummary
from llava.eval.intervals import Draws
from llava.eval.medvqa.controls import control_verdicts, majority_answers
from llava.eval.medvqa.items import ScoredItem, check_reference, join_answers, open_answers
from llava.eval.medvqa.metrics import PUBLISHED, strict_scores
from llava.eval.medvqa.page import write_page
from llava.eval.medvqa.report import full_report, report_table, type_table
from llava.eval.questions import GRAY, YES_NO_OPTIONS
from llava.generation.options import engine_of
from llava.generation.protocol import Engine
from llava.imaging.decode import load_image
from llava.imaging.dicom.policy import DEFAULT_POLICY, DicomPolicy
from llava.samples import Sample
from llava.utils import log
from llava.utils.cli import Parser, run_program
from llava.utils.jsonl import read_records, write_json
from llava.utils.provenance import provenance_fields

MAX_NEW_TOKENS = 128
ANSWERS, BLANK_ANSWERS, RESULTS, PAGE = ("answers.jsonl", "answers-blank.jsonl", "results.json", "report.html")


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """Everything that defines an evaluation except the engine.

    Attributes:
        samples: questions with references.
        out: output folder.
        options: options of answering.
        train_samples: training rows for the majority baseline and the candidate answers; with None, the baseline is
            that of the test answers, and the report says so.
        blank_control: also answer the questions on a gray image.
        batch_size: questions passed to the engine at once.
        resume: keep the answers of an interrupted run.
        defects: known defects of the published scores to reproduce.
        num_resamples: number of resamples of the intervals.
        seed: seed of the resampling.
        num_examples: number of answers on the page.
        facts: provenance that the result records.
        title: heading of the page.
        note: sentence under the heading.
        dicom: how the page renders DICOM files.
    """

    samples: Sequence[Sample]
    out: Path
    options: AnswerOptions
    train_samples: Sequence[Sample] | None = None
    blank_control: bool = True
    batch_size: int = 64
    resume: bool = True
    defects: frozenset[str] = PUBLISHED
    num_resamples: int = 500
    seed: int = 0
    num_examples: int = 12
    facts: Mapping[str, Any] | None = None
    title: str = "Evaluation"
    note: str = ""
    dicom: DicomPolicy = DEFAULT_POLICY


def main(argv: Sequence[str] | None = None) -> None:
    """Run `llava eval`."""
    args = make_parser().parse_args(argv)
    log.setup_logging()
    model_options.warn_no_effect(args)
    plan = plan_of(args, list(sys.argv[1:] if argv is None else argv))
    report = evaluate_model(plan, lambda: engine_of(args))
    print_report(report)
    if args.compare:
        print_comparison(plan.samples, plan.out, Path(args.compare), num_resamples=args.num_resamples, seed=args.seed)
    sys.stdout.write(f"\nresults: {plan.out / RESULTS}\npage: {plan.out / PAGE}\n")


def make_parser() -> Parser:
    """Return the parser of `llava eval`."""
    parser = Parser(prog="llava eval", description="Answer and score questions about images.")
    model_options.add_model_options(parser, compat=("answers", "scores"))
    data = parser.add_argument_group("data")
    data.add_argument("--data", "--question-file", dest="data", required=True, help="questions with answers")
    data.add_argument("--image-folder", required=True, help="folder of the images")
    data.add_argument("--out", "--output-dir", dest="out", required=True, type=Path, help="output folder")
    data.add_argument("--train-data", help="training rows, for the majority baseline and the candidate answers")
    data.add_argument("--limit", type=int, help="use only the first N rows")
    data.add_argument("--compare", help="output folder of another run on the same data: print the paired difference")
    how = parser.add_argument_group("evaluation")
    how.add_argument("--batch-size", type=int, default=64, help="questions passed to the engine at once")
    how.add_argument("--num-resamples", type=int, default=500, help="resamples of the intervals")
    how.add_argument("--num-examples", type=int, default=12, help="answers on the page")
    how.add_argument("--fix", nargs="+", default=[], metavar="NAME", help="alias of --compat published,-NAME")
    how.add_argument("--note", default="", help="a sentence on the page, such as a description of the data")
    parser.add_switch("--no-blank-control", help="skip the blank-image control")
    parser.add_switch("--resume", default=True, help="keep answers of an interrupted run in the same folder")
    parser.add_switch("--with-options", help="append the two options to closed yes/no questions")
    return parser


def plan_of(args: Namespace, words: Sequence[str]) -> EvaluationPlan:
    """Return the plan that the options describe.

    Raises:
        ConfigError: `--limit` is below 1.
        DataError: the data cannot be used.
    """
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit must be at least 1, got {args.limit}")
    samples = load_samples(args.data, image_folder=args.image_folder)[: args.limit]
    train = load_samples(args.train_data) if args.train_data else None
    options = AnswerOptions(
        image_folder=args.image_folder,
        sampling=model_options.sampling_of(args, max_new_tokens=MAX_NEW_TOKENS),
        model_id=model_options.model_id_of(args),
        choices=args.with_options,
        settings=fingerprint.model_settings(args),
    )
    files = {"questions": args.data} | ({"train": args.train_data} if args.train_data else {})
    facts = provenance_fields(
        data=files,
        command=["llava", "eval", *words],
        template=model_options.template_of(args),
        weights=fingerprint.weights_hash(args.model),
        seed=args.seed,
        sampling=asdict(options.sampling),
        limit=args.limit,
    )
    return EvaluationPlan(
        samples=samples,
        out=args.out,
        options=options,
        train_samples=None if train is None else [sample for sample in train if len(sample.conversation.turns) > 1],
        blank_control=not args.no_blank_control,
        batch_size=args.batch_size,
        resume=args.resume,
        defects=_score_defects(args),
        num_resamples=args.num_resamples,
        seed=args.seed,
        num_examples=args.num_examples,
        facts=facts,
        title=f"{options.model_id} on {Path(args.data).name}",
        note=args.note,
        dicom=model_options.dicom_policy_of(args),
    )


def _score_defects(args: Namespace) -> frozenset[str]:
    """Return the defects of the published scores that `--compat` and `--fix` leave."""
    fixed = parse_compat(with_aliases("none", added=args.fix), "scores")  # with --fix all, answers keep their defects
    return (parse_compat(args.compat, *args.compat_places) & parse_compat("all", "scores")) - fixed


def evaluate_model(plan: EvaluationPlan, open_engine: Callable[[], Engine]) -> dict[str, Any]:
    """Answer, score and write the result; the engine is opened only if questions are pending.

    Returns:
        The report, as written to `results.json`.

    Raises:
        DataError: a row has no reference or an unknown `answer_type`, or the folder holds answers generated with
            other settings.
    """
    for sample in (*plan.samples, *(plan.train_samples or ())):
        check_reference(sample)
    runs = [AnswerRun(plan.samples, plan.out / ANSWERS, resume=plan.resume, options=plan.options)]
    if plan.blank_control:
        gray = replace(plan.options, blank_images=True)
        runs.append(AnswerRun(plan.samples, plan.out / BLANK_ANSWERS, resume=plan.resume, options=gray))
    engine = open_engine() if any(run.pending for run in runs) else None
    summaries = [run.finish(engine, batch_size=plan.batch_size) for run in runs]
    items, *controls = (_items(plan.samples, summary.path) for summary in summaries)
    blank = controls[0] if controls else None
    own = plan.train_samples is None
    report = full_report(
        items,
        blank=blank,
        baseline=majority_answers(
            plan.train_samples or plan.samples, source="test answers" if own else "training answers"
        ),
        candidates=None if plan.train_samples is None else open_answers(plan.train_samples),
        defects=plan.defects,
        num_resamples=plan.num_resamples,
        seed=plan.seed,
    )
    report["verdicts"] = control_verdicts(report["scores"]["strict"])
    report["control_image"] = {"color": GRAY} if blank is not None else None
    report["options_suffix"] = YES_NO_OPTIONS if plan.options.choices else None
    report["provenance"] = _provenance(plan, summaries)
    write_json(plan.out / RESULTS, report)
    write_page(
        plan.out / PAGE,
        title=plan.title,
        report=report,
        items=items,
        blank=blank,
        open_image=lambda name: load_image(name, plan.options.image_folder, dicom=plan.dicom),
        num_examples=plan.num_examples,
        note=plan.note,
    )
    return report


def _provenance(plan: EvaluationPlan, summaries: Sequence[AnswerSummary]) -> dict[str, Any]:
    """Return the facts of the plan with the precisions that the answers were computed in."""
    precisions = sorted({name for summary in summaries for name in summary.precisions})
    return {**(plan.facts or provenance_fields(seed=plan.seed)), "precision": ", ".join(precisions) or None}


def print_report(report: Mapping[str, Any], *, out: TextIO | None = None) -> None:
    """Print every table of a report."""
    out = out or sys.stdout
    count, baseline = report["counts"], report["majority"]
    out.write(
        f"\n{count['questions']} questions on {count['images']} images "
        f"({count['open']} open, {count['closed']} closed); "
        f"{count['unparsable']} yes/no answers without a decision, {count['failed']} failed\n"
        f"majority of the {baseline['source']}: closed {baseline['closed']!r}, open {baseline['open']!r}\n"
    )
    for name, scores in report["scores"].items():
        out.write(f"\n{name}\n{report_table(scores)}\n")
    for sentence in report["verdicts"]:
        out.write(f"\n{sentence}")
    out.write("\n")
    if report["by_type"]:
        out.write(f"\nby question type (strict)\n{type_table(report['by_type'])}\n")


def print_comparison(
    samples: Sequence[Sample], here: Path, other: Path, *, num_resamples: int, seed: int, out: TextIO | None = None
) -> dict[str, Any]:
    """Print and return the paired difference between two result folders on the same questions."""
    out = out or sys.stdout
    folder = other if other.is_dir() else other.parent
    mine, theirs = (_items(samples, place / ANSWERS) for place in (here, folder))
    draws = Draws([item.image for item in mine], num_resamples=num_resamples, seed=seed)
    scores, others = strict_scores(mine), strict_scores(theirs)
    result: dict[str, Any] = {}
    out.write(f"\nthis run minus {folder.name} (same questions, paired)\n")
    for name, score in scores.items():
        estimate = draws.difference(score, others[name])
        result[name] = estimate.to_json()
        out.write(f"  {name:<34}{estimate.value:+8.2f}  [{estimate.low:+.2f}, {estimate.high:+.2f}]\n")
    return result


def _items(samples: Sequence[Sample], answers: Path) -> list[ScoredItem]:
    return join_answers(samples, read_records(answers), source=str(answers))


if __name__ == "__main__":
    run_program(main)
