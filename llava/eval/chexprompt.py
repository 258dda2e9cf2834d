"""Count the errors of predicted findings with a language model as judge.

python llava/eval/chexprompt.py --rating_name first --output_dir ratings --input_fpath predictions.jsonl --engine gpt-4t

    rows --judge_messages--> Judge (stored replies, endpoint) --parse_rating--> rating | reason --> rows, summary

Every reply is stored before the next is requested; a killed run resumes, and a second run sends no requests. Filtered
and empty replies are stored too, under texts that stand for them; requests that failed otherwise are sent again.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.errors import ConfigError, DataError
from llava.eval.reports.error_counts import JudgedReport, error_summary, judge_agreement
from llava.eval.reports.error_prompt import PROMPT_SHA256, PROMPT_VERSION, judge_messages, messages_after_unread
from llava.eval.reports.error_replies import Rating, Unread, parse_rating
from llava.eval.reports.rows import read_pairs
from llava.eval.reports.score import CLUSTERS, finite, patients
from llava.judging.asking import ask_endpoint
from llava.judging.store import Ask, CountedReply, Judge, JudgeReply, Messages, NoReply, Store, reply_not_stored
from llava.openai_api import ApiSettings, add_api_flags, settings_of
from llava.utils import log
from llava.utils.cli import Parser, run_program
from llava.utils.files import refuse_overwriting
from llava.utils.json_rows import read_records
from llava.utils.jsonl import write_json, write_records
from llava.utils.provenance import provenance_fields
from llava.utils.reporting import text_table

MINUTE = 60.0

FINAL_FAILURES = {"filtered": "[content_filter]", "empty": ""}
"""Texts that stand for replies without text which another request would not change."""


def paced(ask: Ask, per_minute: int, *, sleep: Callable[[float], None] = time.sleep) -> Ask:
    """Return an `Ask` that starts at most `per_minute` requests a minute; 0 means no limit."""

    def run(requests: Sequence[Messages]) -> Iterator[tuple[int, JudgeReply | CountedReply]]:
        step = per_minute or max(len(requests), 1)
        for start in range(0, len(requests), step):
            began = time.monotonic()
            for place, reply in ask(requests[start : start + step]):
                yield start + place, reply
            if start + step < len(requests):
                sleep(max(0.0, MINUTE - (time.monotonic() - began)))

    return run


def with_final_failures(ask: Ask) -> Ask:
    """Return an `Ask` that yields filtered and empty replies as texts, so that they are stored too."""

    def run(requests: Sequence[Messages]) -> Iterator[tuple[int, JudgeReply | CountedReply]]:
        for place, reply in ask(requests):
            kind = reply.reason.partition(",")[0] if isinstance(reply, NoReply) else ""
            yield place, FINAL_FAILURES.get(kind, reply)

    return run


def rate_pairs(
    pairs: Sequence[tuple[str, str]], judge: Judge, *, num_rounds: int = 2
) -> list[tuple[Rating | None, str, str | None]]:
    """Return rating, reason and last reply for each pair of reference and candidate.

    Without a readable reply the rating is None and the reason says why; an unreadable reply is asked for again, with a
    reminder, up to `num_rounds` replies.
    """
    messages = [judge_messages(reference, candidate) for reference, candidate in pairs]
    found: list[tuple[Rating | None, str, str | None]] = [(None, "not asked", None)] * len(pairs)
    left = list(range(len(pairs)))
    for number in range(num_rounds):
        again = []
        with log.progress_bar(len(left), title="judging" if number == 0 else f"retry {number}", unit="reply") as bar:
            for place, reply in judge.replies([messages[row] for row in left]):
                row = left[place]
                found[row] = _read(reply)
                if found[row][0] is None and isinstance(reply, str) and reply not in FINAL_FAILURES.values():
                    messages[row] = messages_after_unread(messages[row], reply)
                    again.append(row)
                bar.update()
        left = sorted(again)
        if not left:
            break
    return found


def _read(reply: JudgeReply) -> tuple[Rating | None, str, str | None]:
    if not isinstance(reply, str):
        return None, reply.reason, None
    rating = parse_rating(reply)
    return (None, rating.reason, reply) if isinstance(rating, Unread) else (rating, "", reply)


class ReportEvaluator:
    """Evaluator of candidate findings, with the interface of the published package.

    Args:
        engine: name of the model or deployment.
        temperature: sampling temperature.
        max_tokens: limit of a reply in tokens.
        top_p: share of probability that tokens are drawn from.
        requests_per_minute: limit of requests; 0 for none.
        frequency_penalty: penalty of the endpoint for frequent tokens.
        presence_penalty: penalty of the endpoint for repeated tokens.
        stop: texts that end a reply.
        max_retries: replies that are asked for again if they cannot be read.
        use_async: send several requests at once.
        store: file of replies; None keeps them in memory.
        ask: sends the requests; None uses the endpoint of the environment variables.

    Example::

        ReportEvaluator(engine="gpt-4t").evaluate("No effusion.", "Small effusion.")
    """

    def __init__(  # noqa: PLR0917 - the published order of arguments
        self,
        engine: str = "gpt-4-1106-preview",
        temperature: float | None = 0.0,
        max_tokens: int = 128,
        top_p: float = 0.9,
        requests_per_minute: int = 30,
        frequency_penalty: float = 0,
        presence_penalty: float = 0,
        stop: str | Sequence[str] | None = None,
        max_retries: int = 1,
        use_async: bool = False,
        *,
        store: str | Path | None = None,
        ask: Ask | None = None,
    ) -> None:
        extra = {"frequency_penalty": frequency_penalty, "presence_penalty": presence_penalty, "stop": stop}
        sampling = sampling_of(temperature, max_tokens, top_p, **{name: x for name, x in extra.items() if x})
        if ask is None:
            settings = ApiSettings.from_env(deployment=engine)
            ask = ask_endpoint(settings, sampling=sampling, max_concurrency=8 if use_async else 1)
        ask = with_final_failures(paced(ask, requests_per_minute))
        self.judge = Judge(engine, ask, Store(store), sampling=sampling)
        self.num_rounds = 1 + max_retries

    def evaluate(self, references: str | Sequence[str], candidates: str | Sequence[str]) -> list[Rating]:
        """Return the error counts of each candidate; a severity without a readable reply is None.

        Raises:
            DataError: the numbers of references and candidates differ.
        """
        one = [references] if isinstance(references, str) else list(references)
        other = [candidates] if isinstance(candidates, str) else list(candidates)
        if len(one) != len(other):
            raise DataError(f"got {len(one)} references and {len(other)} candidates; expected one of each per report")
        rated = rate_pairs(list(zip(one, other, strict=True)), self.judge, num_rounds=self.num_rounds)
        return [_partial(reply) if rating is None else rating for rating, _, reply in rated]


def _partial(reply: str | None) -> Rating:
    """Return what an unreadable reply contains: a severity without counts is None."""
    read = parse_rating(reply or "")
    return read.rating if isinstance(read, Unread) else read


def sampling_of(temperature: float | None, max_tokens: int, top_p: float | None, **other: Any) -> dict[str, Any]:
    """Return sampling parameters as `ask_endpoint` takes them, which are also part of the key of a reply."""
    extra = {**({} if top_p is None else {"top_p": top_p}), **other}
    return {"temperature": temperature, "max_tokens": max_tokens, "sampling": extra}


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        description="Count errors of predicted findings with a language model, in six categories and two severities.",
        epilog="example: python llava/eval/chexprompt.py --rating-name first --output-dir ratings "
        "--input-fpath reports.jsonl --engine NAME",
    )
    parser.add_argument("file", nargs="?", metavar="FILE", help="rows with id, reference, candidate (or prediction)")
    parser.add_argument("--input-fpath", metavar="FILE", help="the same as FILE")
    parser.add_argument("--rating-name", default="ratings", help="name of the files in --output-dir")
    parser.add_argument("--output-dir", required=True, type=Path, help="folder of ratings, replies and summary")
    judge = parser.add_argument_group("judge")
    judge.add_argument("--engine", help="name of the model or deployment; the same as --model")
    judge.add_argument("--temperature", type=_number_or_none, default=0.4, help="none: the endpoint's own")
    judge.add_argument("--max-tokens", type=int, default=128, help="limit of a reply; models that reason need 1024")
    judge.add_argument("--top-p", type=_number_or_none, default=0.95, help="none: the endpoint's own")
    judge.add_argument("--max-request-per-min", type=int, default=30, help="limit of requests; 0: none")
    parser.add_switch("--use-async", default=True, help="send several requests at once")
    judge.add_argument("--num-rounds", type=int, default=2, help="maximum number of replies until one is readable")
    judge.add_argument("--store", type=Path, help="file of replies; default: RATING_NAME.replies.jsonl")
    parser.add_switch("--offline", help="send no request; use only the replies in the store")
    parser.add_argument("--against", type=Path, metavar="FILE", help="ratings of the same reports by another judge")
    parser.add_argument("--cluster", choices=CLUSTERS, default="patient", help="what the intervals resample")
    add_api_flags(parser)
    return parser


def _number_or_none(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


def judge_main(argv: Sequence[str] | None = None, *, prog: str = "llava reports judge") -> None:
    """Judge a file of reports, write ratings and summary, and print the summary.

    Raises:
        SystemExit: with status 1 if no report has a rating.
    """
    args = _parser(prog).parse_args(argv)
    log.setup_logging()
    file = _input(args)
    base = args.output_dir / args.rating_name
    replies = args.store or base.with_name(f"{base.name}.replies.jsonl")
    written = {"output-dir": base.with_name(f"{base.name}.jsonl"), "store": replies}
    refuse_overwriting([file, args.against], written)
    pairs = read_pairs(file)
    judge = _judge(args, replies)
    rated = rate_pairs([(p.reference, p.prediction) for p in pairs], judge, num_rounds=args.num_rounds)
    facts = {"prompt": PROMPT_VERSION, "prompt_sha256": PROMPT_SHA256, "engine": judge.name, **_sampling(judge)}
    rows = [
        {"id": pair.id, "reference": pair.reference, "candidate": pair.prediction, "rating": rating}
        | {"failure": reason, "reply": reply, "judge": facts}
        for pair, (rating, reason, reply) in zip(pairs, rated, strict=True)
    ]
    write_records(written["output-dir"], rows)
    names = patients(pairs, by=args.cluster)
    judged = [JudgedReport(i, str(names[i]), rating, reason) for i, (rating, reason, _) in enumerate(rated)]
    summary: dict[str, Any] = {"judge": facts, **error_summary(judged)}
    if args.against is not None:
        summary["agreement"] = judge_agreement(judged, _other(args.against, rows, names))
    command = [prog, *(sys.argv[1:] if argv is None else argv)]
    summary["provenance"] = provenance_fields(data={"reports": file}, command=command, cluster=args.cluster)
    write_json(base.with_name(f"{base.name}.summary.json"), finite(summary))
    num_sent = 0 if args.offline else judge.num_asked
    sys.stdout.write(_text(summary) + f"{num_sent} requests sent; all other replies were in the store\n")
    if not summary["num_read"]:
        sys.exit("no report has a rating; the reasons are listed above")


def _input(args: Namespace) -> str:
    given = {name for name in (args.file, args.input_fpath) if name is not None}
    if len(given) != 1:
        raise ConfigError("expected one input: FILE or --input-fpath FILE")
    return str(given.pop())


def _judge(args: Namespace, replies: Path) -> Judge:
    """Return the judge that the options describe, with its store."""
    if args.engine and args.model and args.engine != args.model:
        raise ConfigError(f"--engine {args.engine} and --model {args.model} name two judges; pass one")
    if args.max_request_per_min < 0 or args.num_rounds < 1:
        raise ConfigError("--max-request-per-min must be at least 0 and --num-rounds at least 1")
    args = Namespace(**{**vars(args), "model": args.model or args.engine or ""})
    sampling = sampling_of(args.temperature, args.max_tokens, args.top_p)
    if args.offline:
        return Judge(args.model or settings_of(args).deployment, reply_not_stored, Store(replies), sampling=sampling)
    settings = settings_of(args)
    at_once = 8 if args.use_async else 1
    ask = ask_endpoint(settings, sampling=sampling, max_concurrency=at_once, max_retries=args.max_retries)
    ask = with_final_failures(paced(ask, args.max_request_per_min))
    return Judge(settings.deployment, ask, Store(replies), sampling=sampling)


def _sampling(judge: Judge) -> dict[str, Any]:
    values = dict(judge.sampling)
    return {**values.pop("sampling", {}), **values}


def _other(path: Path, rows: Sequence[Mapping[str, Any]], names: Sequence[Any]) -> list[JudgedReport]:
    """Return the ratings of another judge of the same reports.

    Raises:
        DataError: the file holds other reports.
    """
    others = list(read_records(path))
    same = [
        all(one.get(key) == other[key] for key in ("id", "reference", "candidate"))
        for one, other in zip(others, rows, strict=False)
    ]
    if len(others) != len(rows) or not all(same):
        row = same.index(False) if False in same else min(len(others), len(rows))
        raise DataError(f"{path}, row {row}: not the same reports; it has {len(others)} rows, expected {len(rows)}")
    judged = []
    for index, given in enumerate(others):
        failure = str(given.get("failure", ""))
        judged.append(JudgedReport(index, str(names[index]), given.get("rating") or None, failure))
    return judged


def _text(summary: Mapping[str, Any]) -> str:
    parts = [f"Total reports: {summary['num_reports']}, rated: {summary['num_read']}"]
    if summary["unread"]:
        parts.append("without a rating: " + ", ".join(f"{name} {number}" for name, number in summary["unread"].items()))
    rows = [
        [name, f"{cell['value']:.3f}", f"{cell['ci_l']:.3f} to {cell['ci_h']:.3f}"]
        for name, cell in summary["metrics"].items()
    ]
    if rows:
        parts.append(text_table(["figure", "mean", "95 % interval"], rows))
    if "agreement" in summary:
        agreement = summary["agreement"]
        names = [name for name in agreement if name not in ("num_reports", "unread")]
        rows = [[m, *(_cell(agreement[name][m]) for name in names)] for m in (agreement[names[0]] if names else ())]
        parts.append(f"\nagreement of two judges, {agreement['num_reports']} reports")
        parts.append(text_table(["measure", *names], rows))
    return "\n".join(parts) + "\n"


def _cell(cell: Mapping[str, float | None]) -> str:
    return "-" if cell["value"] is None else f"{cell['value']:.3f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    judge_main(argv, prog="chexprompt.py")


if __name__ == "__main__":
    run_program(main)
