"""`llava eval --rules FILE`: hold conversations about images, score accuracy and consistency.

    rows --orders, hints--> conversations --Engine.converse--> dialogues.jsonl ------+
                                  --gray image--> dialogues-blank.jsonl -------------+--> results.json, report.html

The model's own answers stay in the history.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava.errors import ConfigError, DataError
from llava.eval import options as model_options
from llava.eval.inference import AnswerOptions
from llava.eval.rules.cases import HINTS, STYLES, CasePlan, RuleDialogue, names_of, read_dialogues
from llava.eval.rules.inference import DialogueRun
from llava.eval.rules.page import write_page
from llava.eval.rules.report import estimate_text, full_report, report_text
from llava.eval.rules.scores import DialogueScores, HeldDialogue, read_answers
from llava.generation import fingerprint
from llava.generation.options import engine_of
from llava.generation.protocol import Engine
from llava.imaging.decode import load_image
from llava.imaging.dicom.policy import DEFAULT_POLICY, DicomPolicy
from llava.symbolic.read_settings import STYLES as KNOWN_STYLES
from llava.symbolic.rules import load_rules
from llava.symbolic.structure import SPLITS, RuleSet
from llava.utils.cli import Parser, check_folder
from llava.utils.files import exclusive_folder
from llava.utils.json_rows import read_records
from llava.utils.jsonl import write_json
from llava.utils.terminal import write_out

MAX_NEW_TOKENS = 64
DIALOGUES, BLANK_DIALOGUES, RESULTS, PAGE = ("dialogues.jsonl", "dialogues-blank.jsonl", "results.json", "report.html")


@dataclass(frozen=True, slots=True)
class RulesPlan:
    """Everything that defines an evaluation with rules except the engine.

    Attributes:
        rules: rule set.
        dialogues: conversations to be held.
        out: output folder.
        options: options of answering.
        blank_control: also hold the conversations about a gray image.
        batch_size: conversations passed to the engine at once; a local engine also decodes as many at a time.
        resume: keep the conversations of an interrupted run.
        num_resamples: number of resamples of the intervals.
        seed: seed of the resampling.
        num_examples: number of conversations on the page.
        facts: provenance that the result records.
        title: heading of the page.
        note: sentence under the heading.
        dicom: how the page renders DICOM files.
        compare: folder of another run on the same conversations.
    """

    rules: RuleSet
    dialogues: Sequence[RuleDialogue]
    out: Path
    options: AnswerOptions
    blank_control: bool = True
    batch_size: int = 64
    resume: bool = True
    num_resamples: int = 500
    seed: int = 0
    num_examples: int = 12
    facts: Mapping[str, Any] | None = None
    title: str = "Evaluation"
    note: str = ""
    dicom: DicomPolicy = DEFAULT_POLICY
    compare: Path | None = None


def add_rules_options(parser: Parser) -> None:
    """Add the options of an evaluation with rules."""
    group = parser.add_argument_group("rules", "conversations scored with a rule set; --data is a table or dialogues")
    group.add_argument("--rules", help="rule file, or the name of a shipped rule set")
    group.add_argument("--styles", help=f"orders of the questions, with commas: {', '.join(KNOWN_STYLES)}")
    group.add_argument("--hints", help=f"wrong statements before the questions, or none: {', '.join(HINTS)}")
    group.add_argument("--wordings", choices=SPLITS, default="test", help="wordings of the rule set")


def refuse_without_rules(args: Namespace) -> None:
    """Refuse options that need `--rules`.

    Raises:
        ConfigError: one of them is given.
    """
    for name in ("styles", "hints"):
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name} needs --rules; pass a rule file, or remove it")


def run_with_rules(args: Namespace, words: Sequence[str]) -> None:
    """Run `llava eval --rules`."""
    plan = plan_of(args, words)
    with exclusive_folder(plan.out, option="--out"):
        report = evaluate_rules(plan, lambda: engine_of(args, max_slots=args.batch_size))
    print_rules_report(report)
    write_out(f"\nresults: {plan.out / RESULTS}\npage: {plan.out / PAGE}\n")


def plan_of(args: Namespace, words: Sequence[str]) -> RulesPlan:
    """Return the plan that the options of `llava eval` describe.

    Raises:
        ConfigError: an option contradicts `--rules`.
        DataError: rules or data cannot be used.
    """
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit must be at least 1, got {args.limit}")
    for name in ("train_data", "with_options"):
        if getattr(args, name):
            raise ConfigError(f"--{name.replace('_', '-')} is not for --rules; remove it")
    if args.batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, got {args.batch_size}")
    rules = load_rules(args.rules)
    named = names_of(args.styles, KNOWN_STYLES, "--styles")
    hints = names_of(args.hints, HINTS, "--hints")
    plan = CasePlan(
        styles=named or tuple(rules.evaluation.get("styles", ())) or STYLES,
        hints=HINTS if hints is None else hints,
        split=args.wordings,
        seed=args.seed,
    )
    check_folder(args.image_folder, "--image-folder")
    rows = list(read_records(args.data))[: args.limit]
    options = AnswerOptions(
        image_folder=args.image_folder,
        sampling=model_options.sampling_of(args, max_new_tokens=MAX_NEW_TOKENS),
        model_id=model_options.model_id_of(args),
        settings=fingerprint.model_settings(args),
    )
    facts = model_options.facts_of(args, words, options.sampling, {"questions": args.data, "rules": str(rules.path)})
    return RulesPlan(
        rules=rules,
        dialogues=read_dialogues(rules, rows, plan, source=str(args.data)),
        out=args.out,
        options=options,
        blank_control=not args.no_blank_control,
        batch_size=args.batch_size,
        resume=args.resume,
        num_resamples=rules.evaluation.get("bootstrap", 500) if args.num_resamples is None else args.num_resamples,
        seed=args.seed,
        num_examples=args.num_examples,
        facts=facts,
        title=f"{options.model_id}, rules {rules.id}, {Path(args.data).name}",
        note=args.note,
        dicom=model_options.dicom_policy_of(args),
        compare=Path(args.compare) if args.compare else None,
    )


def evaluate_rules(plan: RulesPlan, open_engine: Callable[[], Engine]) -> dict[str, Any]:
    """Hold the conversations, score them and write the result.

    The engine is opened only if some are pending.

    Returns:
        The report, as written to `results.json`.

    Raises:
        DataError: the folder holds conversations of another run, or the run to compare with has others.
        ConfigError: the template of the model cannot hold conversations, or the run to compare with has none.
    """
    other = None if plan.compare is None else other_run(plan, plan.compare)
    runs = [DialogueRun(plan.dialogues, plan.out / DIALOGUES, resume=plan.resume, options=plan.options)]
    if plan.blank_control:
        gray = replace(plan.options, blank_images=True)
        runs.append(DialogueRun(plan.dialogues, plan.out / BLANK_DIALOGUES, resume=plan.resume, options=gray))
    engine = open_engine() if any(run.pending for run in runs) else None
    held, *controls = (_held(plan, run.finish(engine, batch_size=plan.batch_size)) for run in runs)
    report = full_report(
        plan.rules,
        held,
        blank=controls[0] if controls else None,
        num_resamples=plan.num_resamples,
        seed=plan.seed,
    )
    precisions = sorted({name for run in runs for name in run.precisions})
    report["provenance"] = {**(plan.facts or {}), "precision": ", ".join(precisions) or None}
    if other is not None:
        scores = _scores(plan, held).scores(_scores(plan, other[1]), name="other")
        report["comparison"] = {"name": other[0], "scores": scores}
    write_json(plan.out / RESULTS, report)
    write_page(
        plan.out / PAGE,
        title=plan.title,
        report=report,
        held=held,
        open_image=lambda name: load_image(name, plan.options.image_folder, dicom=plan.dicom),
        num_examples=plan.num_examples,
        note=plan.note,
    )
    return report


def _held(plan: RulesPlan, rows: Sequence[Mapping[str, Any]]) -> list[HeldDialogue]:
    return [read_answers(plan.rules, dialogue, row) for dialogue, row in zip(plan.dialogues, rows, strict=True)]


def other_run(plan: RulesPlan, other: Path) -> tuple[str, list[HeldDialogue]]:
    """Return the name and the conversations of the run whose output folder, or a file in it, is `other`.

    Raises:
        ConfigError: the folder has no conversations.
        DataError: it holds other conversations.
    """
    folder = (other if other.is_dir() else other.parent).resolve()
    path = folder / DIALOGUES
    if not path.is_file():
        raise ConfigError(
            f"--compare {other}: no {DIALOGUES} there; expected the output folder of `llava eval --rules`"
        )
    rows = {str(row.get("id")): row for row in read_records(path)}
    for dialogue in plan.dialogues:
        row = rows.get(dialogue.id)
        if row is None or row.get("questions") != list(dialogue.questions):
            raise DataError(
                f"{path}: no conversation {dialogue.id!r} with these questions; compare runs on the same data"
            )
    return folder.name, _held(plan, [rows[dialogue.id] for dialogue in plan.dialogues])


def _scores(plan: RulesPlan, held: Sequence[HeldDialogue]) -> DialogueScores:
    """Return the scores of conversations without wrong hints."""
    plain = [dialogue for dialogue in held if not dialogue.asked.hint]
    return DialogueScores(plan.rules, plain, num_resamples=plan.num_resamples, seed=plan.seed)


def print_rules_report(report: Mapping[str, Any]) -> None:
    """Print the tables of a report, and the paired differences to another run."""
    write_out(f"\n{report_text(report)}\n")
    if (comparison := report.get("comparison")) is None:
        return
    write_out(f"\nthis run minus {comparison['name']} (same conversations, paired)\n")
    for name, score in comparison["scores"].items():
        if score["difference"]["value"] is not None:
            write_out(f"  {name:<24}{estimate_text(score['difference'], signed=True)}\n")
