"""`llava eval`: answer a question file, answer it again on gray images, score both, and write a page.

llava eval --model runs/first --data test.json --image-folder images --out runs/first/eval

    data --answers--> answers.jsonl ----------+
         --gray image--> answers-blank.jsonl -+--score--> results.json, report.html, tables on the screen
    train data --majority, candidates---------+
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from llava.compat import parse_compat, with_aliases
from llava.constants import GRAY
from llava.data.records import LOADERS, load_samples
from llava.errors import ConfigError, DataError
from llava.eval import options as model_options
from llava.eval import task_files
from llava.eval.control_images import CONTROLS, parse_controls, shuffled_images
from llava.eval.inference import AnswerOptions, AnswerRun, AnswerSummary
from llava.eval.medvqa.controls import control_verdicts, majority_answers
from llava.eval.medvqa.items import ScoredItem, check_reference, open_answers
from llava.eval.medvqa.metrics import PUBLISHED
from llava.eval.medvqa.page import write_page
from llava.eval.medvqa.report import full_report
from llava.eval.medvqa.tables import control_tables, field_table, field_values
from llava.eval.metric_names import chosen_metrics, metrics_text
from llava.eval.printing import ANSWERS, print_comparison, print_report, read_items
from llava.eval.questions import YES_NO_OPTIONS
from llava.eval.rules.run import add_rules_options, refuse_without_rules, run_with_rules
from llava.generation import fingerprint
from llava.generation.options import engine_of
from llava.generation.protocol import Engine
from llava.imaging.decode import load_image
from llava.imaging.dicom.policy import DEFAULT_POLICY, DicomPolicy
from llava.samples import Sample
from llava.scoring.metrics import METRICS
from llava.utils import log
from llava.utils.cli import Parser, check_folder, run_program
from llava.utils.config_file import config_text, resolved_options, with_config
from llava.utils.files import exclusive_folder
from llava.utils.jsonl import write_atomic, write_json
from llava.utils.plugins import add_plugin_option
from llava.utils.provenance import provenance_fields
from llava.utils.terminal import write_out

MAX_NEW_TOKENS = 128
NUM_RESAMPLES = 500
NUM_EXAMPLES = 500
BLANK_ANSWERS, RESULTS, PAGE = ("answers-blank.jsonl", "results.json", "report.html")
RESOLVED = "resolved.yaml"


def control_answers(name: str) -> str:
    """Return the name of the answer file of a control."""
    return f"answers-{name}.jsonl"


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
        controls: other controls, names in `control_images.CONTROLS`.
        by: field of the rows by which scores are also shown.
        compare: folder of another run on the same questions, whose answers the page shows too.
        task: name of the task.
        metrics: names of the scores that are printed instead of the strict ones; none for those.
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
    controls: tuple[str, ...] = ()
    by: str | None = None
    compare: Path | None = None
    task: str | None = None
    metrics: tuple[str, ...] = ()
    batch_size: int = 64
    resume: bool = True
    defects: frozenset[str] = PUBLISHED
    num_resamples: int = 500
    seed: int = 0
    num_examples: int = NUM_EXAMPLES
    facts: Mapping[str, Any] | None = None
    title: str = "Evaluation"
    note: str = ""
    dicom: DicomPolicy = DEFAULT_POLICY


def main(argv: Sequence[str] | None = None) -> None:
    """Run `llava eval`."""
    parser = make_parser()
    given = with_config(parser, argv)
    early, _ = task_parser().parse_known_args(given)
    tasks = {} if early.tasks is None else task_files.read_tasks(early.tasks_dir)
    if early.metrics == task_files.LIST:
        write_out(metrics_text())
        return
    if early.tasks == task_files.LIST:
        write_out(task_files.tasks_text(tasks, early.data_root))
        return
    parser = make_parser(with_data=early.tasks is None)
    args = parser.parse_args(given)
    log.setup_logging()
    args = model_options.connected_model(args)
    model_options.warn_no_effect(args)
    words = list(sys.argv[1:] if argv is None else argv)
    if args.rules:
        if args.metrics is not None:
            raise ConfigError("--metrics chooses scores of answers; conversations with --rules have their own, omit it")
        run_with_rules(args, words)
        return
    refuse_without_rules(args)
    text = config_text(resolved_options(parser, args), comment="options of this run of `llava eval`")
    if early.tasks is None:
        _evaluate(args, plan_of(args, words), lambda: engine_of(args), text)
        return
    engine = cache(lambda: engine_of(args))  # shared by all tasks
    for plan in [task_plan(args, words, task) for task in task_files.chosen_tasks(early.tasks, tasks)]:
        write_out(f"\n{plan.title}\n")
        _evaluate(args, plan, engine, text)


def _evaluate(args: Namespace, plan: EvaluationPlan, open_engine: Callable[[], Engine], options: str) -> None:
    """Evaluate, then print the tables and file names; `options` is the text of the resolved options."""
    with exclusive_folder(plan.out, option="--out"):
        write_atomic(plan.out / RESOLVED, options)
        report = evaluate_model(plan, open_engine)
    print_report(report)
    if plan.compare is not None:
        print_comparison(report["comparison"])
    write_out(f"\nresults: {plan.out / RESULTS}\npage: {plan.out / PAGE}\n")


def task_parser() -> Parser:
    """Return the parser of the options of tasks, which are read before those that need a model."""
    parser = Parser(add_help=False, allow_abbrev=False)
    _add_task_options(parser)
    add_plugin_option(parser)
    return parser


def _add_task_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("tasks and metrics")
    group.add_argument("--tasks", metavar="LIST", help="tasks by name instead of --data, e.g. vqa-rad,slake; or list")
    group.add_argument("--tasks-dir", metavar="DIR", help="folder with a YAML file for each further task")
    group.add_argument("--data-root", default="data", metavar="DIR", help="folder that the paths of tasks begin in")
    group.add_argument("--metrics", metavar="LIST", help="metrics by name, e.g. 'open f1,ROUGE-L'; or list")


def task_plan(args: Namespace, words: Sequence[str], task: task_files.EvaluationTask) -> EvaluationPlan:
    """Return the plan of a task; its output is the folder of its name.

    Raises:
        DataError: the rows are missing, or not those of the expected split.
    """
    root = Path(args.data_root)
    if not (root / task.rows).is_file():
        raise DataError(f"task {task.name}: {root / task.rows} does not exist; name the folder with --data-root")
    train = None if task.train is None or not (root / task.train).is_file() else str(root / task.train)
    own = {
        "data": str(root / task.rows),
        "image_folder": str(root / task.images),
        "out": args.out / task.name,
        "train_data": args.train_data or train,
        "max_new_tokens": args.max_new_tokens or task.max_new_tokens,
        "by": args.by or task.by,
        "loader": task.loader,
        "limit": None,
    }
    plan = plan_of(Namespace(**{**vars(args), **own}), words)
    samples = task.prepared(plan.samples)  # all rows: the split's hash covers them
    facts = {**(plan.facts or {}), "task": task.name, "split_sha256": task_files.split_sha256(plan.samples)}
    return replace(
        plan,
        samples=samples[: args.limit],
        task=task.name,
        compare=None if plan.compare is None else plan.compare / task.name,
        metrics=plan.metrics or task.metrics,
        facts={**facts, "limit": args.limit},
        title=f"{plan.options.model_id} on {task.name}",
        note=plan.note or task.description,
    )


def make_parser(*, with_data: bool = True) -> Parser:
    """Return the parser of `llava eval`; without `with_data`, tasks name the rows."""
    parser = Parser(prog="llava eval", description="Answer and score questions about images.")
    model_options.add_model_options(parser, compat=("answers", "scores"))
    data = parser.add_argument_group("data")
    data.add_argument("--data", "--question-file", dest="data", required=with_data, help="questions with answers")
    data.add_argument("--image-folder", required=with_data, help="folder of the images")
    data.add_argument("--out", "--output-dir", dest="out", required=True, type=Path, help="output folder")
    data.add_argument("--train-data", help="training rows, for the majority baseline and the candidate answers")
    data.add_argument("--limit", type=int, help="use only the first N rows")
    data.add_argument("--compare", help="output folder of another run on the same data: print the paired difference")
    data.add_argument("--loader", default="default", help=f"layout of the data: {', '.join(LOADERS)}")
    _add_task_options(parser)
    how = parser.add_argument_group("evaluation")
    how.add_argument("--batch-size", type=int, default=64, help="questions passed to the engine at once")
    how.add_argument("--num-resamples", type=int, help=f"resamples of the intervals; default: {NUM_RESAMPLES}")
    how.add_argument("--num-examples", type=int, default=NUM_EXAMPLES, help="largest number of answers on the page")
    how.add_argument("--fix", nargs="+", default=[], metavar="NAME", help="alias of --compat published,-NAME")
    how.add_argument("--note", default="", help="a sentence on the page, such as a description of the data")
    how.add_argument(
        "--controls", default="blank", metavar="LIST", help=f"of {', '.join(CONTROLS)}, or none: the images asked again"
    )
    how.add_argument("--by", metavar="FIELD", help="also show the scores by a field of the rows")
    parser.add_switch("--no-blank-control", help="leave blank out of --controls")
    parser.add_switch("--resume", default=True, help="keep answers of an interrupted run in the same folder")
    parser.add_switch("--with-options", help="append the two options to closed yes/no questions")
    add_rules_options(parser)
    parser.show_first(model_options.FIRST_HELP)
    return parser


def plan_of(args: Namespace, words: Sequence[str]) -> EvaluationPlan:
    """Return the plan that the options describe.

    Raises:
        ConfigError: `--limit` is below 1.
        DataError: the data cannot be used.
    """
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit must be at least 1, got {args.limit}")
    check_folder(args.image_folder, "--image-folder")
    samples = load_samples(args.data, image_folder=args.image_folder, loader=args.loader)[: args.limit]
    train = load_samples(args.train_data) if args.train_data else None
    options = AnswerOptions(
        image_folder=args.image_folder,
        sampling=model_options.sampling_of(args, max_new_tokens=MAX_NEW_TOKENS),
        model_id=model_options.model_id_of(args),
        choices=args.with_options,
        settings=fingerprint.model_settings(args),
    )
    controls = parse_controls(args.controls)
    files = {"questions": args.data} | ({"train": args.train_data} if args.train_data else {})
    facts = model_options.facts_of(args, words, options.sampling, files)
    return EvaluationPlan(
        samples=samples,
        out=args.out,
        options=options,
        train_samples=None if train is None else [sample for sample in train if len(sample.conversation.turns) > 1],
        blank_control="blank" in controls and not args.no_blank_control,
        controls=tuple(name for name in controls if name != "blank"),
        by=args.by,
        metrics=chosen_metrics(args.metrics),
        compare=None if args.compare is None else Path(args.compare),
        batch_size=args.batch_size,
        resume=args.resume,
        defects=_score_defects(args),
        num_resamples=NUM_RESAMPLES if args.num_resamples is None else args.num_resamples,
        seed=args.seed,
        num_examples=args.num_examples,
        facts=facts,
        title=f"{options.model_id} on {Path(args.data).name}",
        note=args.note,
        dicom=model_options.dicom_policy_of(args),
    )


def _score_defects(args: Namespace) -> frozenset[str]:
    """Return the defects of the published scores that remain after `--compat` and `--fix`."""
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
    field_values(plan.samples, plan.by)
    other = _other_run(plan)
    runs = _runs(plan)
    engine = open_engine() if any(run.pending for run in runs) else None
    summaries = [run.finish(engine, batch_size=plan.batch_size) for run in runs]
    items, *controls = (read_items(plan.samples, summary.path) for summary in summaries)
    blank = controls.pop(0) if plan.blank_control else None
    own = plan.train_samples is None
    report = full_report(
        items,
        blank=blank,
        baseline=majority_answers(
            plan.train_samples or plan.samples, source="test answers" if own else "training answers"
        ),
        candidates=None if plan.train_samples is None else open_answers(plan.train_samples),
        defects=plan.defects,
        metrics=plan.metrics,
        num_resamples=plan.num_resamples,
        seed=plan.seed,
    )
    report["verdicts"] = control_verdicts(report["scores"]["strict"])
    report["control_image"] = {"color": GRAY} if blank is not None else None
    report |= _more_tables(plan, items, controls, other)
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
        other=other,
    )
    return report


def _other_run(plan: EvaluationPlan) -> tuple[str, list[ScoredItem]] | None:
    """Return the name and the answers of the run that this one is compared with.

    Raises:
        ConfigError: the folder has no answers.
    """
    if plan.compare is None:
        return None
    folder = plan.compare if plan.compare.is_dir() else plan.compare.parent
    if not (folder / ANSWERS).is_file():
        raise ConfigError(f"--compare {plan.compare}: no {ANSWERS} there; expected the output folder of `llava eval`")
    return folder.name, read_items(plan.samples, folder / ANSWERS)


def _runs(plan: EvaluationPlan) -> list[AnswerRun]:
    """Return the runs of the questions, then of their controls."""
    runs = [AnswerRun(plan.samples, plan.out / ANSWERS, resume=plan.resume, options=plan.options)]
    for name in (*(["blank"] if plan.blank_control else []), *plan.controls):
        shown = shuffled_images(plan.samples, seed=plan.seed) if name == "shuffle" else plan.samples
        options = replace(plan.options, control=name)
        runs.append(AnswerRun(shown, plan.out / control_answers(name), resume=plan.resume, options=options))
    return runs


def _more_tables(
    plan: EvaluationPlan,
    items: Sequence[ScoredItem],
    controls: Sequence[Sequence[ScoredItem]],
    other: tuple[str, list[ScoredItem]] | None,
) -> dict[str, Any]:
    """Return the tables of further controls, of row fields and of another run, and the plan's notes."""
    named = dict(zip(plan.controls, controls, strict=True))
    options: dict[str, Any] = {"metrics": plan.metrics, "num_resamples": plan.num_resamples, "seed": plan.seed}
    rows = None
    if plan.by is not None:
        rows = field_table(plan.samples, items, plan.by, num_resamples=plan.num_resamples, seed=plan.seed)
    return {
        "task": plan.task,
        "metrics": [METRICS[name].title for name in plan.metrics] or None,
        "controls": control_tables(items, named, **options),
        "comparison": None
        if other is None
        else {"name": other[0], "scores": control_tables(items, dict([other]), **options)[other[0]]},
        "by": None if rows is None else {"field": plan.by, "rows": rows},
    }


def _provenance(plan: EvaluationPlan, summaries: Sequence[AnswerSummary]) -> dict[str, Any]:
    """Return the facts of the plan with the precisions that the answers were computed in."""
    precisions = sorted({name for summary in summaries for name in summary.precisions})
    return {**(plan.facts or provenance_fields(seed=plan.seed)), "precision": ", ".join(precisions) or None}


if __name__ == "__main__":
    run_program(main)
