"""Dialogues about figures, written by a language model from captions; LLaVA-Med's instruction data.

    captions --messages_for--> requests, some at once --> answers.jsonl, answers.failed.jsonl, row by row
                               ^ ceiling of tokens and money

The same line again continues: rows that are answered are never asked for twice.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.errors import ConfigError, GenerationError
from llava.instruct.budget import Budget, Prices, estimate_tokens
from llava.instruct.instruct_few_shot_examples import FEW_SHOT_EXAMPLES
from llava.instruct.prompts import CaptionRow, dialogue_text, messages_for, read_captions
from llava.instruct.results import Results
from llava.openai_api import ApiFailure, ChatClient, Reply, Requests, add_api_flags, settings_of
from llava.utils import log
from llava.utils.cli import ExampleFormatter, Parser
from llava.utils.files import hold
from llava.utils.log import progress_bar

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Options:
    """How to ask.

    Attributes:
        use_inline_mentions: tell the sentences that refer to the figure, too.
        temperature: None leaves it to the endpoint.
        max_failures_in_a_row: so many, and the run stops: the endpoint is probably down.
    """

    use_inline_mentions: bool = False
    temperature: float | None = 0.0
    max_failures_in_a_row: int = 20

    def __post_init__(self) -> None:
        if self.max_failures_in_a_row < 1:
            raise ConfigError(f"--max-failures must be at least 1, got {self.max_failures_in_a_row}")


@dataclass(slots=True)
class Outcome:
    """What a run came to: rows it answered, rows that failed, and why it stopped early, if it did."""

    num_answered: int = 0
    num_failed: int = 0
    stopped: str = ""
    fatal: ApiFailure | None = None


@dataclass(frozen=True, slots=True)
class Forecast:
    """What the rows that are left will take: tokens of prompts, of answers as expected, of answers at most."""

    num_prompt: int
    num_answer: int
    num_answer_at_most: int


def pending(rows: Sequence[Row], results: Results, *, retry_failed: bool) -> list[Row]:
    """Return the rows that are to be asked for: not answered, and not failed unless `retry_failed`."""
    left = [row for row in rows if row["pair_id"] not in results.answered]
    return left if retry_failed else [row for row in left if row["pair_id"] not in results.failed]


def forecast(rows: Sequence[Row], options: Options, budget: Budget, results: Results) -> Forecast:
    """Estimate what `rows` will take.

    An answer is expected to be as long as those that are there, or else as the worked examples.
    """
    counted = [line.num_answer for line in results.answered.values() if line.num_answer]
    examples = [
        estimate_tokens([{"content": dialogue_text(example["conversations"])}]) for example in FEW_SHOT_EXAMPLES
    ]
    known = counted or examples
    expected = min(sum(known) / len(known), budget.max_answer_tokens)
    prompt = sum(estimate_tokens(messages_for(row, use_inline_mentions=options.use_inline_mentions)) for row in rows)
    return Forecast(prompt, round(len(rows) * expected), len(rows) * budget.max_answer_tokens)


class Generation:
    """One run over rows that are to be asked for.

    Args:
        client: who is asked.
        results: where it is written.
        budget: of tokens and money.
        options: how to ask.
    """

    def __init__(self, client: ChatClient, results: Results, *, budget: Budget, options: Options) -> None:
        self._client, self._results, self._budget, self._options = client, results, budget, options
        self._outcome = Outcome()
        self._failures_in_a_row = 0

    def run(self, rows: Sequence[Row]) -> Outcome:
        """Ask for all rows, or until a ceiling, a fatal failure or too many failures; what is under way is awaited."""
        left = deque(rows)
        options = {"temperature": self._options.temperature, "max_tokens": self._budget.max_answer_tokens}
        bar = progress_bar(len(rows), title="dialogues", unit="row")
        with bar, Requests(self._client, **options) as requests:
            while True:
                blocked = not self._submit(left, requests)
                if not requests.num_running:
                    if blocked and left and not self._outcome.stopped:
                        self._outcome.stopped = "the next request could pass the ceiling of tokens or cost"
                    return self._outcome
                row, found = requests.next()
                self._take(row, found)
                bar.update()

    def _submit(self, left: deque[Row], requests: Requests) -> bool:
        """Start as many requests as may run; False when the budget refuses one."""
        while left and not self._outcome.stopped and requests.num_running < self._client.max_concurrency:
            messages = messages_for(left[0], use_inline_mentions=self._options.use_inline_mentions)
            if not self._budget.reserve(left[0]["pair_id"], estimate_tokens(messages)):
                return False
            requests.submit(left.popleft(), messages)
        return True

    def _take(self, row: Row, found: Reply | ApiFailure) -> None:
        """Write one outcome down."""
        key = row["pair_id"]
        if isinstance(found, Reply):
            self._budget.spend(*found.wasted_tokens)
            tokens = self._budget.settle(key, found.num_prompt_tokens, found.num_answer_tokens, answer=found.text)
            self._results.append_answer(row, found.text, model=found.model, tokens=tokens, wasted=found.wasted_tokens)
            self._outcome.num_answered += 1
            self._failures_in_a_row = 0
            return
        self._budget.release(key, found.num_prompt_tokens, found.num_answer_tokens)
        if found.fatal:  # says nothing about the row, which stays to be asked for
            self._outcome.fatal = found
            self._outcome.stopped = str(found)
            return
        self._results.append_failure(row, found)
        self._outcome.num_failed += 1
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= self._options.max_failures_in_a_row and not self._outcome.stopped:
            self._outcome.stopped = f"{self._failures_in_a_row} rows failed in a row, the last with {found}"


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


def _plan(rows: list[CaptionRow], left: list[CaptionRow], results: Results, *, options: Options, budget: Budget) -> str:
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


def _prompts(rows: list[CaptionRow], options: Options) -> str:
    """Return requests as text."""
    parts = []
    for row in rows:
        parts.append(f"\n===== {row['pair_id']}")
        messages = messages_for(row, use_inline_mentions=options.use_inline_mentions)
        parts += [f"--- {message['role']}\n{message['content']}" for message in messages]
    return "".join(part + "\n" for part in parts)


def _end(rows: list[CaptionRow], results: Results, outcome: Outcome, *, budget: Budget) -> str:
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
