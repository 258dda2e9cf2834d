"""Engine that runs a model in this process: offline batches, streams, and scoring on flat batches.

>>> engine = LocalEngine(model, processor)
>>> [[completion]] = engine.generate([prompt], Sampling(max_new_tokens=8))
>>> completion.finish in ("stop", "length")
True
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llava.constants import TREE_ATTENTION
from llava.data.encode import Encoded
from llava.data.flat_batch import FlatBatch, Layout, flatten, target_logits
from llava.errors import ConfigError, DataError, GenerationError, LlavaError
from llava.generation.beam_search import BeamSearch, answer_of, run_beams
from llava.generation.layout_check import choose_layout
from llava.generation.prompt_encoder import EncodedPrompt, PromptReader, image_group
from llava.generation.protocol import Completion, Prompt, Sampling
from llava.generation.runners import AnsweringMode, PaddedRunner, Runner, SlotRunner
from llava.generation.sampling import TokenDraw
from llava.generation.scheduler import PromptSource, Request, Scheduler
from llava.generation.stopping import AnswerText, StopRule
from llava.model.attention import use_tree_attention
from llava.model.precision import weights_precision
from llava.processing import LlavaMedProcessor

DEFAULT_CONTEXT = 2048
"""Context length of a model whose configuration does not name one."""

STEPS_AT_A_TIME = 16
"""Steps of a batch before the lock is released to other threads."""


@dataclass(frozen=True, slots=True)
class SequenceScore:
    """Log-probability of the trained tokens of a conversation (its answers and end tokens).

    Attributes:
        logprob: natural log-probability of all of them.
        turns: the same for each turn that has any, by index of the turn.
        num_tokens: their number.
    """

    logprob: float
    turns: Mapping[int, float]
    num_tokens: int


class LocalEngine:
    """Engine for a model in this process. Threads may share it."""

    def __init__(
        self,
        model: Any,
        processor: LlavaMedProcessor,
        *,
        max_slots: int = 32,
        max_tokens: int | None = None,
        max_prefill_tokens: int = 4096,
        layout: Layout | None = None,
    ) -> None:
        """Choose the layout and allocate the scheduler; the model changes its mode only while it computes.

        Args:
            model: a `LlavaMedForConditionalGeneration`, with or without adapter.
            processor: its processor.
            max_slots: largest number of sequences decoded at a time.
            max_tokens: largest number of tokens of a prompt with its answer; default: the model's context length.
            max_prefill_tokens: largest number of tokens prefilled at a time (one prompt may be longer).
            layout: layout of prompts; None selects the cheapest one that this model computes exactly.

        Raises:
            ConfigError: a number is out of range.
        """
        if max_slots < 1 or max_prefill_tokens < 1 or (max_tokens is not None and max_tokens < 2):
            raise ConfigError(
                f"max_slots={max_slots} and max_prefill_tokens={max_prefill_tokens} must be at least 1, "
                f"max_tokens={max_tokens} at least 2"
            )
        text_config = model.config.get_text_config()
        context = int(getattr(text_config, "max_position_embeddings", None) or DEFAULT_CONTEXT)
        self.model = model
        self.processor = processor
        self.layout = choose_layout(model.config) if layout is None else layout
        self.max_prefill_tokens = max_prefill_tokens
        self.reader = PromptReader(processor, max_tokens=context if max_tokens is None else max_tokens)
        runner = self._runner(max_slots, text_config)
        self.scheduler = Scheduler(runner, self.reader, max_slots=max_slots, max_prefill_tokens=max_prefill_tokens)
        self.beams_count_prompt = False
        """Whether a beam's score is divided by the length of prompt and answer, as by transformers before 4.36."""
        self._lock = threading.RLock()

    @property
    def precision(self) -> str:
        """Precision of the weights, such as `float32`."""
        return weights_precision(self.model)

    def _runner(self, max_slots: int, text_config: Any) -> Runner:
        if self.layout == "padded":
            return PaddedRunner(self.model, pad_token_id=self.processor.pad_token_id)
        if text_config._attn_implementation != TREE_ATTENTION:
            use_tree_attention(self.model)
        return SlotRunner(
            self.model,
            image_token_id=self.processor.image_token_id,
            max_slots=max_slots,
            max_length=self.reader.max_tokens,
            layout=self.layout,
        )

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        """Answer prompts; see `protocol.Engine`."""
        if sampling.num_beams > 1:
            return [self._beam_answers(prompt, sampling) for prompt in prompts]
        # Greedy answers are equal, so one is computed and repeated.
        num_copies = 1 if sampling.temperature == 0.0 else sampling.n
        requests = [self._requests(prompt, sampling, num_copies) for prompt in prompts]
        groups: dict[Any, list[Request]] = {}
        for prompt, copies in zip(prompts, requests, strict=True):
            groups.setdefault(image_group(prompt.images), []).extend(copies)
        queue = [request for group in groups.values() for request in group]
        self._run(queue)
        completions = [[_completion_of(request) for request in copies] for copies in requests]
        return [copies * (sampling.n // num_copies) for copies in completions]

    def stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[str]:
        """Yield the answer so far whenever it has grown; see `protocol.Engine`.

        Raises:
            GenerationError: the prompt cannot be answered.
            ConfigError: `sampling` asks for more than one answer or for a beam search.
        """
        if sampling.n != 1 or sampling.num_beams != 1:
            raise ConfigError(
                f"a stream needs n=1 and num_beams=1, got n={sampling.n} and num_beams={sampling.num_beams}; "
                "use generate"
            )
        [request] = self._requests(prompt, sampling, 1)
        return self._stream(request)

    def _beam_answers(self, prompt: Prompt, sampling: Sampling) -> list[Completion]:
        """Return the best answers of a beam search, which uses the model alone."""
        try:
            reading = self.reader.read(prompt)
            images = {image.key: self.reader.pixels(image) for image in reading.images}
            rule = StopRule.of(self.processor, sampling)
            text = AnswerText(rule, self.processor.decode)
            search = BeamSearch(
                sampling.num_beams,
                limit=min(sampling.max_new_tokens, self.reader.max_tokens - len(reading.encoded.input_ids)),
                has_ended=text.has_ended,
                num_end_tokens=len(rule.token_ids),
                repetition_penalty=sampling.repetition_penalty,
                num_counted=self._num_counted(reading.encoded),
            )
            with self._answering():
                runner = self._runner(sampling.num_beams, self.model.config.get_text_config())
                run_beams(search, runner, reading.encoded, images)
        except LlavaError as error:
            return [Completion("", (), "error", error=str(error))] * sampling.n
        return [answer_of(ended, text, logprobs=sampling.logprobs) for ended in search.ended[: sampling.n]]

    def _num_counted(self, prompt: Encoded) -> int:
        """Return the tokens of a prompt that count as length of a beam, one token per image."""
        if not self.beams_count_prompt:
            return 0
        return len(prompt.input_ids) - sum(stop - start - 1 for start, stop in prompt.image_spans)

    def score(self, conversations: Sequence[Prompt]) -> list[SequenceScore]:
        """Return the log-probabilities of the answers in conversations.

        Args:
            conversations: conversations with their answers, and their images.

        Raises:
            DataError: a conversation cannot be read; the message says which.
        """
        readings = []
        for index, prompt in enumerate(conversations):
            try:
                readings.append(self.reader.encode_answered(prompt))
            except DataError as error:
                raise DataError(f"conversation {index}: {error}") from error
        scores: dict[int, SequenceScore] = {}
        with self._answering():
            for members in self._rows(readings):
                scores.update(zip(members, self._score_row([readings[i] for i in members]), strict=True))
        return [scores[index] for index in range(len(readings))]

    def _requests(self, prompt: Prompt, sampling: Sampling, num_copies: int) -> list[Request]:
        source = PromptSource(prompt)
        rule = StopRule.of(self.processor, sampling)
        text = AnswerText(rule, self.processor.decode)
        return [Request(source, sampling, TokenDraw(sampling, index), text) for index in range(num_copies)]

    def _run(self, requests: Sequence[Request]) -> None:
        """Step the scheduler until these requests are over; cancel them after an error."""
        left, mode = deque(requests), AnsweringMode(self.model)
        with self._lock:
            self.scheduler.add(requests)
        try:
            while left:
                with self._answering(mode):
                    for _ in range(STEPS_AT_A_TIME):
                        while left and left[0].is_over:
                            left.popleft()
                        if not left:
                            break
                        self.scheduler.step()
        finally:
            self._cancel(left)

    def _stream(self, request: Request) -> Iterator[str]:
        shown, mode = "", AnsweringMode(self.model)
        with self._lock:
            self.scheduler.add([request])
        try:
            while request.completion is None:
                with self._answering(mode):
                    if request.completion is None:
                        self.scheduler.step()
                text = request.text.so_far(request.token_ids) if request.completion is None else ""
                if len(text) > len(shown) and text.startswith(shown):
                    shown = text
                    yield shown
            if request.completion.error is not None:
                raise GenerationError(request.completion.error)
            if request.completion.text != shown:
                yield request.completion.text
        finally:
            self._cancel([request])

    def _cancel(self, requests: Sequence[Request] | deque[Request]) -> None:
        with self._lock:
            for request in requests:
                if not request.is_over:
                    self.scheduler.cancel(request)

    @contextmanager
    def _answering(self, mode: AnsweringMode | None = None) -> Iterator[None]:
        """Hold the lock and the model in its answering mode; callers that enter repeatedly pass `mode`."""
        with self._lock, (mode or AnsweringMode(self.model)).entered():
            yield

    def _rows(self, readings: Sequence[EncodedPrompt]) -> list[list[int]]:
        """Return the indices of the conversations of each row; those with the same images are adjacent."""
        order: dict[tuple[str, ...], list[int]] = {}
        for index, reading in enumerate(readings):
            order.setdefault(reading.encoded.images, []).append(index)
        rows: list[list[int]] = []
        num_tokens = 0
        for index in (index for group in order.values() for index in group):
            length = len(readings[index].encoded.input_ids)
            if not rows or num_tokens + length > self.max_prefill_tokens:
                rows.append([])
                num_tokens = 0
            rows[-1].append(index)
            num_tokens += length
        return rows

    def _score_row(self, readings: Sequence[EncodedPrompt]) -> list[SequenceScore]:
        images = {image.key: image for reading in readings for image in reading.images}
        batch = flatten(
            [reading.encoded for reading in readings],
            {key: self.reader.pixels(image) for key, image in images.items()},
            image_token_id=self.processor.image_token_id,
            pad_token_id=self.processor.pad_token_id,
            layout=self.layout,
        ).to(self.model.device)
        logits = target_logits(self.model, batch).float()
        logprobs = logits.gather(1, batch.target_ids[:, None])[:, 0] - logits.logsumexp(dim=-1)
        return _scores(batch, logprobs.double()[batch.edge_target].cpu())


def _completion_of(request: Request) -> Completion:
    assert request.completion is not None
    return request.completion


def _scores(batch: FlatBatch, logprobs: Tensor) -> list[SequenceScore]:
    """Return the log-probabilities of edges [E] summed by sequence and turn."""
    turns: list[dict[int, float]] = [{} for _ in range(batch.num_sequences)]
    counts = [0] * batch.num_sequences
    edges = zip(batch.edge_sequence.tolist(), batch.edge_turn.tolist(), logprobs.tolist(), strict=True)
    for sequence, turn, logprob in edges:
        turns[sequence][turn] = turns[sequence].get(turn, 0.0) + logprob
        counts[sequence] += 1
    return [SequenceScore(sum(by_turn.values()), by_turn, count) for by_turn, count in zip(turns, counts, strict=True)]
