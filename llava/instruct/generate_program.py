"""`llava/instruct/instruct_generate.py` and `llava instruct generate`: flags, and what is said in the end.

flags --> rows, ChatClient, Budget --Generation--> Outcome --> text, exit status
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from llava.data.file_lock import hold
from llava.errors import ConfigError, GenerationError
from llava.instruct.budget import Budget, Prices
from llava.instruct.captions import Row, read_captions
from llava.instruct.generate import Generation, Options, Outcome, forecast, pending
from llava.instruct.prompts import messages_for
from llava.instruct.results import Results
from llava.openai_api import ChatClient, add_api_flags, settings_of
from llava.utils import log
from llava.utils.cli import ExampleFormatter, Parser

EPILOG = """
example:
  export OPENAI_API_KEY=...  OPENAI_MODEL=...
  python llava/instruct/instruct_generate.py \\
      --input_path data/instruct/llava_med_instruct_fig_captions.json \\
      --output_path data/instruct/llava_med_instruct_60k_inline_mentions_gen.jsonl \\
      --max-size 60000 --use_inline_mentions True --dry_run
exit status: 0 every row is answered; 1 some are not (see NAME.failed.jsonl, or the ceiling); 2 cannot start or go on
"""


def make_parser() -> Parser:
    """Return the parser."""
    parser = Parser(
        prog="instruct_generate.py",
        description="Let a language model write dialogues about figures from captions; continues where it stopped.",
        epilog=EPILOG,
        formatter_class=ExampleFormatter,
    )
    add = parser.add_argument
    add("--input_path", default="data/instruct/llava_med_instruct_fig_captions.json", help="captions, by domain")
    add("--output_path", required=True, help="answers, one JSON object a line; failed rows go to NAME.failed.jsonl")
    parser.add_switch("--use_inline_mentions", help="tell the model the sentences that refer to the figure, too")
    add("--max_size", type=int, default=60000, help="take the first so many rows, one of each domain in turn")
    add("--batch_size", type=int, default=8, help="requests under way at once")
    parser.add_switch("--retry_failed", help="ask again for rows that failed in an earlier run")
    parser.add_switch("--skip_bad", help="leave caption rows out that cannot be used")
    add("--max_failures", type=int, default=20, help="stop after so many failures in a row")
    add("--temperature", type=temperature, default=0.0, help="of the answers; 'default' leaves it to the endpoint")
    budget = parser.add_argument_group("budget", "ceilings hold over all runs into one output file")
    parser.add_switch("--dry-run", help="say what it would take, and ask nobody")
    budget.add_argument("--show-prompts", type=int, default=0, metavar="N", help="with --dry-run: the first N requests")
    budget.add_argument("--max-answer-tokens", type=int, default=1024, help="limit of one answer")
    budget.add_argument("--max-total-tokens", type=int, help="ceiling of all tokens, prompts and answers")
    budget.add_argument("--max-cost", type=float, help="ceiling in money; needs both prices")
    budget.add_argument("--price-prompt", type=float, help="price of a million prompt tokens, in any currency")
    budget.add_argument("--price-answer", type=float, help="price of a million answer tokens")
    add_api_flags(parser)
    return parser


def temperature(word: str) -> float | None:
    """Read --temperature."""
    return None if word == "default" else float(word)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    log.setup()
    args = make_parser().parse_args(argv)
    if args.max_size < 1:
        raise ConfigError(f"--max-size must be at least 1, got {args.max_size}")
    budget = Budget(
        Prices(args.price_prompt, args.price_answer), args.max_answer_tokens, args.max_total_tokens, args.max_cost
    )
    options = Options(args.use_inline_mentions, args.temperature, args.max_failures)
    client = None
    if not args.dry_run:  # what is wrong with the settings is said before files are read
        client = ChatClient(settings_of(args), max_concurrency=args.batch_size, max_retries=args.max_retries)
    rows = read_captions(args.input_path, max_size=args.max_size, skip_bad=args.skip_bad)
    output = Path(args.output_path)
    if client is None:
        results = Results(output)
        left = pending(rows, results, retry_failed=args.retry_failed)
        sys.stdout.write(_plan(rows, left, results, options=options, budget=budget))
        sys.stdout.write(_prompts(left[: args.show_prompts], options))
        return
    with hold(output.with_name(f".{output.name}.lock"), purpose="writing dialogues into the same file"):
        results = Results(output)
        budget.spend(*results.spent())
        left = pending(rows, results, retry_failed=args.retry_failed)
        sys.stdout.write(_plan(rows, left, results, options=options, budget=budget))
        sys.stdout.flush()
        order = {row["pair_id"]: place for place, row in enumerate(rows)}
        results.repair()
        try:
            outcome = Generation(client, results, budget=budget, options=options).run(left)
        finally:
            results.settle(order)
    sys.stdout.write(_end(rows, results, outcome, budget=budget))
    if outcome.fatal is not None:
        raise GenerationError(f"{outcome.stopped}; what was answered is kept, the same command goes on")
    if any(row["pair_id"] not in results.answered for row in rows):
        raise SystemExit(1)


def _plan(rows: list[Row], left: list[Row], results: Results, *, options: Options, budget: Budget) -> str:
    """Say what is there and what the rest is expected to take."""
    asked = {row["pair_id"] for row in rows}
    answered, failed = (len(asked & found.keys()) for found in (results.answered, results.failed))
    seen = forecast(left, options, budget, results)
    expected = budget.prices.cost(seen.num_prompt, seen.num_answer)
    at_most = budget.prices.cost(seen.num_prompt, seen.num_answer_at_most)
    lines = [
        f"rows      {len(rows)} asked for: {answered} answered, {failed} failed before, {len(left)} to ask now",
        f"estimate  {seen.num_prompt:,} prompt tokens, {seen.num_answer:,} answer tokens "
        f"(at most {seen.num_answer_at_most:,}), without retries",
    ]
    if expected is not None and at_most is not None:
        lines.append(f"cost      {expected:.2f} expected, {at_most:.2f} at most, at the prices given")
    return "\n".join(lines) + "\n"


def _prompts(rows: list[Row], options: Options) -> str:
    """Return requests as text."""
    parts = []
    for row in rows:
        parts.append(f"\n===== {row['pair_id']}")
        messages = messages_for(row, use_inline_mentions=options.use_inline_mentions)
        parts += [f"--- {message['role']}\n{message['content']}" for message in messages]
    return "".join(part + "\n" for part in parts)


def _end(rows: list[Row], results: Results, outcome: Outcome, *, budget: Budget) -> str:
    """Say what a run came to."""
    num_open = sum(row["pair_id"] not in results.answered and row["pair_id"] not in results.failed for row in rows)
    spent = budget.prices.cost(budget.num_prompt, budget.num_answer)
    lines = [
        f"now       {outcome.num_answered} answered, {outcome.num_failed} failed, {num_open} not asked",
        f"spent     {budget.num_prompt:,} prompt tokens, {budget.num_answer:,} answer tokens, all runs together"
        + (f"; {spent:.4f} at the prices given" if spent is not None else ""),
    ]
    if outcome.num_answered:
        lines.append(f"estimate  the endpoint counted {budget.scale:.2f} times the prompt tokens that were estimated")
    if outcome.stopped:
        lines.append(f"stopped   {outcome.stopped}")
    if results.failed:
        reasons = [line.reason for line in results.failed.values()]
        counts = ", ".join(f"{reasons.count(reason)} {reason}" for reason in sorted(set(reasons)))
        lines.append(f"failed    {counts}: {results.failed_path} (--retry-failed asks again)")
    lines.append(f"answers   {len(results.answered)} in {results.path}")
    return "\n".join(lines) + "\n"
