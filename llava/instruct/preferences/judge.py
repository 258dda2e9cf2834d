"""`llava preferences judge`: decide which answer is preferred, with one of five judges.

answers.jsonl --usable answers--> judge --scores--> verdict --> judgments.jsonl, row by row; report

Command:
    llava preferences judge answers.jsonl --by reference --out judgments.jsonl
    llava preferences judge answers.jsonl --by endpoint --model NAME --api-base URL --out judgments.jsonl
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.compat import compat_help, parse_compat
from llava.errors import ConfigError
from llava.generation import fingerprint
from llava.generation.options import add_engine_options, local_engine_of
from llava.instruct.preferences.agreement import judged_report, report_text
from llava.instruct.preferences.endpoint import PairJudge, wasted_tokens
from llava.instruct.preferences.judges import DEFAULT_MARGINS, ImageGain, ScoreAll, by_majority, by_reference, each
from llava.instruct.preferences.prompts import PairPrompt, instruction_of, remind
from llava.instruct.preferences.rows import Answered, KeyedFile, answered_of, read_answered
from llava.instruct.preferences.usable import left_out
from llava.instruct.preferences.verdicts import Thresholds, verdict_of
from llava.judging.asking import ask_endpoint
from llava.judging.orders import ORDERS, AskSettings
from llava.judging.parsing import PARSERS
from llava.judging.store import Judge, Store, reply_not_stored
from llava.openai_api import add_api_flags, settings_of
from llava.utils import log
from llava.utils.budget import Budget, Prices
from llava.utils.cli import Parser, check_folder
from llava.utils.config_file import config_of, read_config, with_config
from llava.utils.files import exclusive_file, refuse_overwriting
from llava.utils.jsonl import write_json
from llava.utils.terminal import write_out

ENDPOINTS = ("endpoint", "replay")
"""Judges that are language models, asked in both orders."""

TOO_FEW = "fewer than two usable answers"

JudgeAll = Callable[[Sequence[tuple[Answered, Sequence[int]]]], list["dict[str, Any] | None"]]
"""Judge of questions with the places of their usable answers; None for a question that was not asked about."""


@dataclass(frozen=True, slots=True)
class Judging:
    """Judge, and the facts that identify it.

    Attributes:
        judge_all: judges a batch of questions.
        facts: fields of every judgment: `by`, `judge`, and the hash of the prompt.
        settings: other settings that judgments depend on.
        limits: what a preference needs.
        store: replies of a language model, or None.
        budget: its limits, or None.
    """

    judge_all: JudgeAll
    facts: Mapping[str, Any]
    settings: Mapping[str, Any]
    limits: Thresholds
    store: Store | None = None
    budget: Budget | None = None


def make_parser(by: str | None) -> Parser:
    """Return the parser, with the options of judge `by`."""
    parser = Parser(
        prog="llava preferences judge",
        description="Judge which of the answers to each question is preferred; rerun to resume. The options below "
        "`--by` depend on it: `llava preferences judge --by endpoint --help`.",
    )
    parser.add_argument("answers", type=Path, help="rows of `llava preferences answer`")
    parser.add_argument("--out", type=Path, required=True, help="judgments as JSON lines, one line a question")
    parser.add_argument("--report", type=Path, help="write the numbers of the report to this JSON file")
    parser.add_switch("--resume", default=True, help="keep the judgments that the file already has")
    parser.add_switch("--retry-failed", help="judge rows again that have no preference")
    parser.add_argument("--image-folder", help="folder that image names are relative to")
    parser.add_argument("--batch-size", type=int, default=64, help="questions judged at once")
    parser.add_argument("--by", choices=list(DEFAULT_MARGINS), required=True, help="the judge")
    parser.add_argument("--min-margin", type=float, help="smallest difference of scores that is a preference; default: "
                        + ", ".join(f"{margin:g} ({name})" for name, margin in DEFAULT_MARGINS.items()))  # fmt: skip
    parser.add_argument("--min-score", type=float, help="smallest score of a preferred answer")
    if by in ENDPOINTS:
        _add_endpoint_options(parser)
    if by == "image_gain":
        add_engine_options(parser.add_argument_group("model"))
    return parser


def _add_endpoint_options(parser: Parser) -> None:
    group = parser.add_argument_group("language model")
    group.add_argument("--store", type=Path, help="file of the replies; default: OUT.replies.jsonl")
    group.add_argument("--rule", type=Path, help="file with another instruction: text, or JSON preference.prompt")
    parser.add_switch(
        "--send-images", help="send the images to the endpoint, as data URLs; else none leaves this machine"
    )
    parser.add_switch("--both-orders", default=True, help="judge in both orders, which must agree")
    group.add_argument("--num-rounds", type=int, default=3, help="maximum number of replies until one is readable")
    group.add_argument("--temperature", type=_temperature, default=0.0, help="of the judge; none: the endpoint's own")
    group.add_argument("--max-tokens", type=int, default=1024, help="limit of a reply in tokens")
    group.add_argument("--max-concurrency", type=int, default=8, help="requests in flight at once")
    group.add_argument("--max-total-tokens", type=int, help="limit of all tokens, images included, over all runs")
    group.add_argument("--max-cost", type=float, help="limit of the cost; requires both prices")
    group.add_argument("--price-prompt", type=float, help="price of a million prompt tokens, in any currency")
    group.add_argument("--price-answer", type=float, help="price of a million answer tokens")
    group.add_argument("--compat", default="none", metavar="LIST", help=compat_help("preferences"))
    add_api_flags(parser)


def _temperature(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


def main(argv: Sequence[str] | None = None) -> None:
    """Run `llava preferences judge`.

    Raises:
        LlavaError: options or rows cannot be used, or the endpoint fails for a reason that all requests share.
        SystemExit: with status 1 if a limit of tokens or cost left questions without a judgment.
    """
    log.setup_logging()
    words = sys.argv[1:] if argv is None else list(argv)
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--by")
    path, _ = config_of(words)
    by = first.parse_known_args(words)[0].by or (read_config(path).get("--by") if path else None)
    parser = make_parser(by)
    args = parser.parse_args(with_config(parser, words))
    if args.batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, got {args.batch_size}")
    check_folder(getattr(args, "image_folder", None), "--image-folder")
    outputs = {"out": args.out, "report": args.report, "store": _store_file(args)}
    refuse_overwriting([args.answers], outputs)
    answered = read_answered(args.answers)
    with exclusive_file(args.out, option="--out"):
        judging = open_judge(args, answered)
        num_open = judge_rows(answered, judging, args)
    if num_open:
        write_out(f"stopped: the next request could exceed the limit; {num_open} questions are pending\n")
        raise SystemExit(1)


def _store_file(args: Namespace) -> Path | None:
    if args.by not in ENDPOINTS:
        return None
    store: Path = args.store or args.out.with_name(f"{args.out.name}.replies.jsonl")
    return store


def open_judge(args: Namespace, answered: Sequence[Answered]) -> Judging:
    """Return the judge that the options describe."""
    margin = DEFAULT_MARGINS[args.by] if args.min_margin is None else args.min_margin
    defects = parse_compat(args.compat, "preferences") if args.by in ENDPOINTS else frozenset()
    limits = Thresholds(margin, args.min_score, "second_wins_ties" in defects)
    if args.by in ENDPOINTS:
        return _language_model(args, limits, defects)
    if args.by == "image_gain":
        gain = ImageGain(local_engine_of(args), args.image_folder)
        facts = {"by": args.by, "judge": Path(args.model).name}
        return Judging(_scored(gain), facts, fingerprint.model_settings(args), limits)
    scores = {"reference": by_reference, "majority": by_majority}[args.by]
    return Judging(_scored(each(scores)), {"by": args.by, "judge": args.by}, {}, limits)


def _scored(judge: ScoreAll) -> JudgeAll:
    """Return a judge that gives scores, as one of questions with the places of usable answers."""

    def judge_all(batch: Sequence[tuple[Answered, Sequence[int]]]) -> list[dict[str, Any] | None]:
        found: list[dict[str, Any] | None] = []
        for (_, usable), scores in zip(batch, judge([one for one, _ in batch]), strict=True):
            if isinstance(scores, str):
                found.append({"failure": scores})
            else:
                found.append({"scores": [score if place in usable else None for place, score in enumerate(scores)]})
        return found

    return judge_all


def _language_model(args: Namespace, limits: Thresholds, defects: frozenset[str]) -> Judging:
    sampling = {"temperature": args.temperature, "max_tokens": args.max_tokens}
    prices = Prices(args.price_prompt, args.price_answer)
    budget = Budget(prices, args.max_tokens, args.max_total_tokens, args.max_cost)
    store = Store(_store_file(args))
    budget.spend(*store.spent)
    if args.by == "replay":
        judge = Judge(args.model or _only_judge(store), reply_not_stored, store, sampling=sampling)
    else:
        settings = settings_of(args)
        ask = ask_endpoint(
            settings,
            sampling=sampling,
            max_concurrency=args.max_concurrency,
            max_retries=args.max_retries,
            budget=budget,
        )
        judge = Judge(settings.deployment, ask, store, sampling=sampling)
    prompt = PairPrompt(instruction_of(args.rule, send_images=args.send_images), args.image_folder, args.send_images)
    parser = "first_line" if "first_line_scores" in defects else "strict"
    orders = ORDERS if args.both_orders else ORDERS[:1]
    how = AskSettings(remind, orders, args.num_rounds, PARSERS[parser])
    facts = {"by": args.by, "judge": judge.name, "prompt_sha256": prompt.sha256}
    settings_used = {
        "sampling": sampling,
        "send images": args.send_images,
        "orders": list(orders),
        "num rounds": args.num_rounds,
        "parser": parser,
    }
    return Judging(PairJudge(judge, prompt, how), facts, settings_used, limits, store, budget)


def _only_judge(store: Store) -> str:
    """Return the name of the judge whose replies a store holds.

    Raises:
        ConfigError: it holds none, or those of several judges.
    """
    if len(store.judges) != 1:
        names = ", ".join(sorted(store.judges)) or "none"
        raise ConfigError(f"--by replay: {store.path} holds replies of {names}; name one judge with --model")
    return next(iter(store.judges))


def judge_rows(answered: Sequence[Answered], judging: Judging, args: Namespace) -> int:
    """Judge what is pending, write the report, and return the number of questions that stay pending."""
    limits = judging.limits
    thresholds = {"min margin": limits.min_margin, "min score": limits.min_score, "ties": limits.second_wins_ties}
    settings = {**judging.facts, **judging.settings, **thresholds}
    out = KeyedFile(args.out, settings, resume=args.resume)
    if judging.budget is not None:
        judging.budget.spend(*wasted_tokens(list(out.rows.values())))
    if args.retry_failed:
        out.forget(lambda row: bool(row["judgment"]["failure"]))
    pending = [one for one in answered if one.asked.key not in out.rows]
    pending.sort(key=lambda one: one.asked.images)
    with log.progress_bar(len(pending), title="judging", unit="question") as bar:
        for start in range(0, len(pending), args.batch_size):
            batch = pending[start : start + args.batch_size]
            judged = _judge_batch(batch, judging)
            for row in judged:
                out.append(row)
            bar.update(len(batch))
            if len(judged) < len(batch):
                break
    if judging.store is not None:
        judging.store.settle()
    out.settle([one.asked.key for one in answered])
    rows = [out.rows[one.asked.key] for one in answered if one.asked.key in out.rows]
    if rows:
        report = {**judging.facts, **judged_report([answered_of(row, "") for row in rows])}
        write_out(report_text(report) + _spent(judging.budget))
        if args.report is not None:
            write_json(args.report, report)
    return len(answered) - len(rows)


def _spent(budget: Budget | None) -> str:
    if budget is None or not budget.num_prompt:
        return ""
    cost = budget.prices.cost(budget.num_prompt, budget.num_answer)
    price = "" if cost is None else f"; {cost:.4f} at the given prices"
    return f"spent         {budget.num_prompt:,} prompt tokens, {budget.num_answer:,} answer tokens, all runs{price}\n"


def _judge_batch(batch: Sequence[Answered], judging: Judging) -> list[dict[str, Any]]:
    """Return the judged rows of a batch, without those that a limit left out."""
    reasons = [left_out(one) for one in batch]
    usable = [
        [place for place in range(len(one.answers)) if place not in out]
        for one, out in zip(batch, reasons, strict=True)
    ]
    asked = [(one, places) for one, places in zip(batch, usable, strict=True) if len(places) > 1]
    found = iter(judging.judge_all(asked) if asked else ())
    rows = []
    for one, places, out in zip(batch, usable, reasons, strict=True):
        judged = next(found) if len(places) > 1 else {"failure": str(one.row.get("error") or TOO_FEW)}
        if judged is None:
            continue
        verdict = verdict_of(judged, judging.limits)
        extra = {"left_out": {str(place): reason for place, reason in out.items()}} if out else {}
        rows.append(
            {**one.row, **one.asked.fields(), "judgment": {**judging.facts, **judged, **extra, **verdict.fields()}}
        )
    return rows
