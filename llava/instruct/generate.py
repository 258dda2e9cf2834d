"""Generation of dialogues about figures from captions with a language model, as in LLaVA-Med.

    captions --messages_for--> concurrent requests --> answers.jsonl, answers.failed.jsonl, row by row
                               ^ limits of tokens and cost

Rerunning the same command resumes; no request is sent for answered rows.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.errors import ConfigError, GenerationError
from llava.instruct.instruct_few_shot_examples import FEW_SHOT_EXAMPLES
from llava.instruct.prompts import CaptionRow, dialogue_text, messages_for, read_captions
from llava.instruct.results import Results
from llava.openai_api import ApiFailure, ChatClient, Reply, Requests, add_api_flags, settings_of
from llava.utils import log
from llava.utils.budget import Budget, Prices, estimate_tokens
from llava.utils.cli import ExampleFormatter, Parser
from llava.utils.files import hold_lock
from llava.utils.log import progress_bar
from llava.utils.terminal import write_out

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """Options of generation.

    Attributes:
        use_inline_mentions: include the sentences that mention the figure in the prompt.
        temperature: sampling temperature; None for the endpoint's default.
        max_failures_in_a_row: consecutive failures after which the run stops, since the endpoint is probably down.
    """

    use_inline_mentions: bool = False
    temperature: float | None = 0.0
    max_failures_in_a_row: int = 20

    def __post_init__(self) -> None:
        if self.max_failures_in_a_row < 1:
            raise ConfigError(f"--max-failures must be at least 1, got {self.max_failures_in_a_row}")


@dataclass(slots=True)
class GenerationOutcome:
    """Counts of a run, and the reason if it stopped early."""

    num_answered: int = 0
    num_failed: int = 0
    stopped: str = ""
    fatal: ApiFailure | None = None


@dataclass(frozen=True, slots=True)
class Forecast:
    """Estimated tokens of pending rows: prompts, expected answers, and answers of maximum length."""

    num_prompt: int
    num_answer: int
    num_answer_at_most: int


def pending(rows: Sequence[Row], results: Results, *, retry_failed: bool) -> list[Row]:
    """Return the rows that are not answered; without `retry_failed`, also without failed ones."""
    left = [row for row in rows if row["pair_id"] not in results.answered]
    return left if retry_failed else [row for row in left if row["pair_id"] not in results.failed]


def forecast(rows: Sequence[Row], options: GenerateOptions, budget: Budget, results: Results) -> Forecast:
    """Return the estimated tokens of `rows`.

    The expected length of an answer is the mean of the existing answers, or of the few-shot examples.
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
    """Run that generates the dialogues of rows.

    Args:
        client: client of the endpoint.
        results: files of the results.
        budget: limits of tokens and cost.
        options: options of generation.
    """

    def __init__(self, client: ChatClient, results: Results, *, budget: Budget, options: GenerateOptions) -> None:
        self._client, self._results, self._budget, self._options = client, results, budget, options
        self._outcome = GenerationOutcome()
        self._failures_in_a_row = 0

    def run(self, rows: Sequence[Row]) -> GenerationOutcome:
        """Generate all rows, or stop at a limit, a fatal failure or too many failures; return the outcome.

        Requests in flight are finished before the run stops.
        """
        left = deque(rows)
        options = {"temperature": self._options.temperature, "max_tokens": self._budget.max_answer_tokens}
        bar = progress_bar(len(rows), title="dialogues", unit="row")
        with bar, Requests(self._client, **options) as requests:
            while True:
                blocked = not self._submit(left, requests)
                if not requests.num_running:
                    if blocked and left and not self._outcome.stopped:
                        self._outcome.stopped = "the next request could exceed the limit of tokens or cost"
                    return self._outcome
                row, found = requests.next()
                self._take(row, found)
                bar.update()

    def _submit(self, left: deque[Row], requests: Requests) -> bool:
        """Start as many requests as may run; return False if the budget refuses one."""
        while left and not self._outcome.stopped and requests.num_running < self._client.max_concurrency:
            messages = messages_for(left[0], use_inline_mentions=self._options.use_inline_mentions)
            if not self._budget.reserve(left[0]["pair_id"], estimate_tokens(messages)):
                return False
            requests.submit(left.popleft(), messages)
        return True

    def _take(self, row: Row, found: Reply | ApiFailure) -> None:
        """Write the outcome of one row."""
        key = row["pair_id"]
        if isinstance(found, Reply):
            self._budget.spend(*found.wasted_tokens)
            tokens = self._budget.settle(key, found.num_prompt_tokens, found.num_answer_tokens, answer=found.text)
            self._results.append_answer(row, found.text, model=found.model, tokens=tokens, wasted=found.wasted_tokens)
            self._outcome.num_answered += 1
            self._failures_in_a_row = 0
            return
        self._budget.release(key, found.num_prompt_tokens, found.num_answer_tokens)
        if found.fatal:  # not a failure of the row, which stays pending
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
      --input-path data/instruct/llava_med_instruct_fig_captions.json \\
      --output-path data/instruct/llava_med_instruct_60k_inline_mentions_gen.jsonl \\
      --max-size 60000 --use-inline-mentions True --dry-run
exit status: 0 all rows are answered; 1 some are not (see NAME.failed.jsonl, or the limits); 2 cannot start or continue
"""

FIRST_HELP = {
    "dialogues": ["--input-path", "--output-path", "--use-inline-mentions", "--max-size", "--temperature"],
    "runs": ["--dry-run", "--show-prompts", "--batch-size", "--retry-failed", "--skip-bad"],
    "budget of all runs with the same output file": [
        "--max-total-tokens", "--max-cost", "--price-prompt", "--price-answer",
    ],
    "endpoint": ["--model", "--api-type", "--api-base", "--api-key-env"],
}  # fmt: skip
"""Options of the short help by topic."""


def make_parser(prog: str = "llava instruct generate") -> Parser:
    """Return the parser; the published script has the name `instruct_generate.py`."""
    parser = Parser(
        prog=prog,
        description="Generate dialogues about figures from captions with a language model; rerun to resume.",
        epilog=EPILOG,
        formatter_class=ExampleFormatter,
    )
    add = parser.add_argument
    add("--input_path", default="data/instruct/llava_med_instruct_fig_captions.json", help="captions, by domain")
    add("--output_path", required=True, help="answers as JSON lines; failed rows go to NAME.failed.jsonl")
    parser.add_switch("--use_inline_mentions", help="include the sentences that mention the figure in the prompt")
    add("--max_size", type=int, default=60000, help="use only the first N rows, which alternate between the domains")
    add("--batch_size", type=int, default=8, help="requests in flight at once")
    parser.add_switch("--retry_failed", help="retry rows that failed in an earlier run")
    parser.add_switch("--skip_bad", help="leave out invalid caption rows")
    add("--max_failures", type=int, default=20, help="stop after this number of consecutive failures")
    add("--temperature", type=temperature, default=0.0, help="of the answers; 'default': the endpoint's own")
    budget = parser.add_argument_group("budget", "limits apply to all runs with the same output file together")
    parser.add_switch("--dry-run", help="print the estimate and send no request")
    budget.add_argument("--show-prompts", type=int, default=0, metavar="N", help="with --dry-run: the first N requests")
    budget.add_argument("--max-answer-tokens", type=int, default=1024, help="limit of one answer in tokens")
    budget.add_argument("--max-total-tokens", type=int, help="limit of all tokens, prompts and answers")
    budget.add_argument("--max-cost", type=float, help="limit of the cost; requires both prices")
    budget.add_argument("--price-prompt", type=float, help="price of a million prompt tokens, in any currency")
    budget.add_argument("--price-answer", type=float, help="price of a million answer tokens")
    add_api_flags(parser)
    parser.show_first(FIRST_HELP)
    return parser


def temperature(word: str) -> float | None:
    """Return the value of `--temperature`; None for `default`."""
    return None if word == "default" else float(word)


def main(argv: Sequence[str] | None = None, *, prog: str = "llava instruct generate") -> None:
    """Run the command, under the name `prog`."""
    log.setup_logging()
    args = make_parser(prog).parse_args(argv)
    if args.max_size < 1:
        raise ConfigError(f"--max-size must be at least 1, got {args.max_size}")
    budget = Budget(
        Prices(args.price_prompt, args.price_answer), args.max_answer_tokens, args.max_total_tokens, args.max_cost
    )
    options = GenerateOptions(args.use_inline_mentions, args.temperature, args.max_failures)
    client = None
    if not args.dry_run:  # invalid settings are reported before files are read
        client = ChatClient(settings_of(args), max_concurrency=args.batch_size, max_retries=args.max_retries)
    rows = read_captions(args.input_path, max_size=args.max_size, skip_bad=args.skip_bad)
    output = Path(args.output_path)
    if client is None:
        results = Results(output)
        left = pending(rows, results, retry_failed=args.retry_failed)
        write_out(_plan(rows, left, results, options=options, budget=budget))
        write_out(_prompts(left[: args.show_prompts], options))
        return
    with hold_lock(output.with_name(f".{output.name}.lock"), purpose="writing dialogues into the same file"):
        results = Results(output)
        budget.spend(*results.spent())
        left = pending(rows, results, retry_failed=args.retry_failed)
        write_out(_plan(rows, left, results, options=options, budget=budget))
        sys.stdout.flush()
        order = {row["pair_id"]: place for place, row in enumerate(rows)}
        results.repair()
        try:
            outcome = Generation(client, results, budget=budget, options=options).run(left)
        finally:
            results.settle(order)
    write_out(_end(rows, results, outcome, budget=budget))
    if outcome.fatal is not None:
        raise GenerationError(f"{outcome.stopped}; finished answers are kept. Fix the error and rerun to resume")
    if any(row["pair_id"] not in results.answered for row in rows):
        raise SystemExit(1)


def _plan(
    rows: list[CaptionRow], left: list[CaptionRow], results: Results, *, options: GenerateOptions, budget: Budget
) -> str:
    """Return the text about existing rows and the estimate of pending ones."""
    asked = {row["pair_id"] for row in rows}
    answered, failed = (len(asked & found.keys()) for found in (results.answered, results.failed))
    seen = forecast(left, options, budget, results)
    expected = budget.prices.cost(seen.num_prompt, seen.num_answer)
    at_most = budget.prices.cost(seen.num_prompt, seen.num_answer_at_most)
    lines = [
        f"rows      {len(rows)} selected: {answered} answered, {failed} failed before, {len(left)} pending",
        f"estimate  {seen.num_prompt:,} prompt tokens, {seen.num_answer:,} answer tokens "
        f"(at most {seen.num_answer_at_most:,}), without retries",
    ]
    if expected is not None and at_most is not None:
        lines.append(f"cost      {expected:.2f} expected, {at_most:.2f} at most, at the given prices")
    return "\n".join(lines) + "\n"


def _prompts(rows: list[CaptionRow], options: GenerateOptions) -> str:
    """Return requests as text."""
    parts = []
    for row in rows:
        parts.append(f"\n===== {row['pair_id']}")
        messages = messages_for(row, use_inline_mentions=options.use_inline_mentions)
        parts += [f"--- {message['role']}\n{message['content']}" for message in messages]
    return "".join(part + "\n" for part in parts)


def _end(rows: list[CaptionRow], results: Results, outcome: GenerationOutcome, *, budget: Budget) -> str:
    """Return the text about the outcome of a run."""
    num_open = sum(row["pair_id"] not in results.answered and row["pair_id"] not in results.failed for row in rows)
    spent = budget.prices.cost(budget.num_prompt, budget.num_answer)
    lines = [
        f"now       {outcome.num_answered} answered, {outcome.num_failed} failed, {num_open} pending",
        f"spent     {budget.num_prompt:,} prompt tokens, {budget.num_answer:,} answer tokens, all runs together"
        + (f"; {spent:.4f} at the given prices" if spent is not None else ""),
    ]
    if outcome.num_answered:
        lines.append(f"estimate  the endpoint counted {budget.scale:.2f} times the estimated prompt tokens")
    if outcome.stopped:
        lines.append(f"stopped   {outcome.stopped}")
    if results.failed:
        reasons = [line.reason for line in results.failed.values()]
        counts = ", ".join(f"{reasons.count(reason)} {reason}" for reason in sorted(set(reasons)))
        lines.append(f"failed    {counts}: {results.failed_path} (--retry-failed retries them)")
    lines.append(f"answers   {len(results.answered)} in {results.path}")
    return "\n".join(lines) + "\n"
