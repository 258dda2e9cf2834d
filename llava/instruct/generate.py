"""Dialogues about figures, written by a language model from captions; LLaVA-Med's instruction data.

    captions --messages_for--> requests, some at once --> answers.jsonl, answers.failed.jsonl, row by row
                               ^ ceiling of tokens and money

The same line again continues: rows that are answered are never asked for twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava.errors import ConfigError
from llava.instruct.budget import Budget, estimate_tokens
from llava.instruct.instruct_few_shot_examples import FEW_SHOT_EXAMPLES
from llava.instruct.prompts import dialogue_text, messages_for
from llava.instruct.results import Results
from llava.openai_api import ApiFailure, ChatClient, Reply, Requests
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
