"""Engine that runs a model in this process: offline batches, streams, and scoring on flat batches.

>>> engine = LocalEngine(model, processor)
>>> [[completion]] = engine.generate([prompt], Sampling(max_new_tokens=8))
>>> completion.finish in ("stop", "length")
True
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from llava.constants import TREE_ATTENTION
from llava.data.encode import Encoded, follow_up
from llava.data.flat_batch import FlatBatch, Layout, flatten, target_logits
from llava.errors import ConfigError, DataError, GenerationError, LlavaError
from llava.generation.beam_search import BeamSearch, answer_of, run_beams
from llava.generation.chunked_prefill import ChunkedScheduler
from llava.generation.driver import Driver
from llava.generation.episode import Episode, check_dialogue
from llava.generation.failures import MEGABYTE
from llava.generation.handle import Handle
from llava.generation.held import check_history
from llava.generation.kv_buffers import context_length, quarter_of_free_memory
from llava.generation.layout_check import choose_layout
from llava.generation.pixel_cache import PixelCache
from llava.generation.prefix_cache import PrefixCache
from llava.generation.prompt_encoder import EncodedPrompt, PromptReader, image_group
from llava.generation.protocol import (
    Completion,
    Dialogue,
    History,
    Prompt,
    Sampling,
    Script,
    num_distinct,
    repeated,
    sampling_of_each,
)
from llava.generation.request import PromptSource, Request
from llava.generation.runners import PaddedRunner, Runner, SlotRunner
from llava.generation.sampling import TokenDraw
from llava.generation.scheduler import Scheduler
from llava.generation.stopping import AnswerText, StopRule
from llava.model.attention import use_tree_attention
from llava.model.precision import weights_precision
from llava.model.rope import shared_context
from llava.processing import LlavaMedProcessor

logger = logging.getLogger(__name__)


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


def _check_caches(prefill_chunk: int | None, prefix_cache_mb: int, kv_cache_mb: int | None) -> None:
    if (prefill_chunk is not None and prefill_chunk < 1) or prefix_cache_mb < 0 or (kv_cache_mb or 1) < 1:
        raise ConfigError(
            f"prefill_chunk={prefill_chunk} and kv_cache_mb={kv_cache_mb} must be at least 1, "
            f"prefix_cache_mb={prefix_cache_mb} at least 0"
        )
    if prefix_cache_mb and prefill_chunk is None:
        raise ConfigError(f"prefix_cache_mb={prefix_cache_mb} needs prefill_chunk, such as 512")


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
        reader: PromptReader | None = None,
        beams_count_prompt: bool = False,
        prefill_chunk: int | None = None,
        prefix_cache_mb: int = 0,
        share_prefix_cache: bool = False,
        kv_cache_mb: int | None = None,
        is_fixed: bool = False,
    ) -> None:
        """Choose the layout and allocate the scheduler; the model changes its mode only while it computes.

        Args:
            model: a `LlavaMedForConditionalGeneration`, with or without adapter.
            processor: its processor.
            max_slots: largest number of sequences decoded at a time.
            max_tokens: largest number of tokens of a prompt with its answer; default: the model's context length.
            max_prefill_tokens: largest number of tokens prefilled at a time (one prompt may be longer).
            layout: layout of prompts; None selects the cheapest one that this model computes exactly.
            reader: encoder of prompts, instead of a `PromptReader` for `max_tokens`.
            beams_count_prompt: divide a beam's score by the length of prompt and answer, as transformers before 4.36.
            prefill_chunk: read prompts in pieces of this many tokens between decoding steps, as a server should; None
                reads many prompts at a time, which is faster for batches.
            prefix_cache_mb: megabytes of keys and values that are kept of prompts and answers for prompts that begin
                in the same way, and at most an eighth of it for preprocessed images; needs `prefill_chunk`.
            share_prefix_cache: let callers with different keys use what is kept of each other's prompts.
            kv_cache_mb: megabytes of keys and values that running sequences may need; None: with `prefill_chunk`, a
                quarter of the memory that is free now, else no limit.
            is_fixed: the model's modules never change, so that what is prepared for them is kept while nothing runs.

        Raises:
            ConfigError: a number is out of range.
        """
        _check_caches(prefill_chunk, prefix_cache_mb, kv_cache_mb)
        if max_slots < 1 or max_prefill_tokens < 1 or (max_tokens is not None and max_tokens < 2):
            raise ConfigError(
                f"max_slots={max_slots} and max_prefill_tokens={max_prefill_tokens} must be at least 1, "
                f"max_tokens={max_tokens} at least 2"
            )
        self.model = model
        self.processor = processor
        self.layout = choose_layout(model.config, decodes=True) if layout is None else layout
        self.max_prefill_tokens = max_prefill_tokens
        self.reader = reader or PromptReader(processor, max_tokens=max_tokens or context_length(model))
        max_kv_bytes = None if kv_cache_mb is None else kv_cache_mb * MEGABYTE
        if max_kv_bytes is None and prefill_chunk is not None:
            max_kv_bytes = quarter_of_free_memory(model)
        # Random padding is drawn for each question.
        keeps_pixels = prefix_cache_mb and not processor.random_padding
        self.pixel_cache = PixelCache(prefix_cache_mb * MEGABYTE // 8) if keeps_pixels else None
        runner = self._runner(max_slots, max_kv_bytes, is_fixed=is_fixed)
        self.context = shared_context(model.config)
        self.share_prefix_cache = share_prefix_cache
        self.scheduler = self._scheduler(
            runner,
            self.reader,
            settings=(prefill_chunk, prefix_cache_mb),
            max_slots=max_slots,
            max_prefill_tokens=max_prefill_tokens,
            context=self.context,
            never=(processor.image_token_id,),
            max_kv_bytes=max_kv_bytes,
        )
        self.beams_count_prompt = beams_count_prompt
        # A weak reference, so that an engine's memory is freed when its last user drops it.
        self.driver = Driver(self.scheduler, model, partial(_submit_to, weakref.ref(self)), is_fixed=is_fixed)

    @property
    def precision(self) -> str:
        """Precision of the weights, such as `float32`."""
        return weights_precision(self.model)

    @property
    def prefix_cache_bytes(self) -> int:
        """Bytes of all that is kept of earlier prompts and answers."""
        return self.driver.prefix_cache_bytes + (self.pixel_cache.num_bytes if self.pixel_cache else 0)

    def _scheduler(self, runner: Runner, *args: Any, settings: tuple[int | None, int], **options: Any) -> Scheduler:
        chunk, megabytes = settings
        if chunk is None:
            return Scheduler(runner, *args, **options)
        # In other layouts sequences depend on each other, or prompts cannot be prefilled in pieces.
        if not isinstance(runner, SlotRunner) or self.layout != "tree" or self.context is not None:
            logger.warning("this model reads whole prompts and keeps none of them: its layout is %s", self.layout)
            return Scheduler(runner, *args, **options)
        cache = PrefixCache(megabytes * MEGABYTE - (self.pixel_cache.max_bytes if self.pixel_cache else 0))
        return ChunkedScheduler(runner, *args, cache=cache, chunk=chunk, **options)

    def _runner(self, max_slots: int, max_bytes: int | None = None, *, is_fixed: bool = False) -> Runner:
        if self.layout == "padded":
            return PaddedRunner(self.model, pad_token_id=self.processor.pad_token_id)
        if self.model.config.get_text_config()._attn_implementation != TREE_ATTENTION:
            use_tree_attention(self.model)
        return SlotRunner(
            self.model,
            image_token_id=self.processor.image_token_id,
            max_slots=max_slots,
            max_length=self.reader.max_tokens,
            max_bytes=float("inf") if max_bytes is None else max_bytes,
            layout=self.layout,
            is_fixed=is_fixed,
        )

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling | Sequence[Sampling]) -> list[list[Completion]]:
        """Answer prompts; see `protocol.Engine`."""
        each = sampling_of_each(prompts, sampling)
        requests = [
            self._requests(PromptSource(prompt), own) if own.num_beams == 1 else []
            for prompt, own in zip(prompts, each, strict=True)
        ]
        self._run_by_image(prompts, requests)
        return [
            repeated([_completion_of(request) for request in copies], own.n)
            if copies
            else self._beam_answers(prompt, own)
            for prompt, own, copies in zip(prompts, each, requests, strict=True)
        ]

    def converse(self, scripts: Sequence[Script], sampling: Sampling | Sequence[Sampling]) -> list[list[Dialogue]]:
        """Hold dialogues; see `protocol.Engine`."""
        each = sampling_of_each(scripts, sampling)
        episodes = [self._episodes(script, own) for script, own in zip(scripts, each, strict=True)]
        self._run_by_image(scripts, episodes)
        return [
            repeated([episode.dialogue() for episode in copies], own.n)
            for own, copies in zip(each, episodes, strict=True)
        ]

    def _run_by_image(self, prompts: Sequence[Prompt | Script], requests: Sequence[Sequence[Request]]) -> None:
        """Answer the requests of each prompt; those about the same images are adjacent."""
        groups: dict[Any, list[Request]] = {}
        for prompt, copies in zip(prompts, requests, strict=True):
            groups.setdefault(image_group(prompt.images), []).extend(copies)
        self.driver.run([request for group in groups.values() for request in group])

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
        return self._stream(prompt, sampling)

    def submit(
        self, prompt: Prompt, sampling: Sampling, *, key: str = "", notify: Callable[[], None] | None = None
    ) -> Handle:
        """Queue a prompt for the driver; see `Driver.submit`."""
        return self.driver.submit(prompt, sampling, key=key, notify=notify)

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
                never=self.scheduler.never,
            )
            runner = self._runner(sampling.num_beams)
            self.driver.call(lambda: run_beams(search, runner, reading.encoded, images))
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
        for members in self._rows(readings):
            row = [readings[index] for index in members]
            scores.update(zip(members, self.driver.call(partial(self._score_row, row)), strict=True))
        return [scores[index] for index in range(len(readings))]

    def _submitted(self, prompt: Prompt, sampling: Sampling, key: str) -> list[Request]:
        """Read a prompt with its images and return its requests."""
        if prompt.history is not None:
            check_dialogue(sampling)
            check_history(prompt.history, self.model, never=self.scheduler.never, max_tokens=self.reader.max_tokens)
        ends = StopRule.of(self.processor, sampling).token_ids
        tree = "" if self.share_prefix_cache else key
        known = None if self.pixel_cache is None else partial(self.pixel_cache.made, tree)
        reading, pixels = self.reader.read_whole(prompt, ends=ends, known=known)
        requests = self._requests(PromptSource(Prompt(prompt.conversation), reading, pixels), sampling, prompt.history)
        for request in requests:
            request.tree = tree
        return requests

    def _requests(self, source: PromptSource, sampling: Sampling, held: History | None = None) -> list[Request]:
        source.num_users, before = num_distinct(sampling), held or History()
        text = AnswerText(StopRule.of(self.processor, sampling), self.processor.decode)
        draws = (TokenDraw(sampling, before.sample + i, num_drawn=before.num_tokens) for i in range(source.num_users))
        return [Request(source, sampling, draw, text, is_dialogue=held is not None) for draw in draws]

    def _episodes(self, script: Script, sampling: Sampling) -> list[Episode]:
        check_dialogue(sampling)
        sampling = sampling if script.seed is None else replace(sampling, seed=script.seed)
        # All questions are tokenized before the first answer.
        follow_ups = tuple(follow_up(question, self.processor) for question in script.follow_ups)
        max_tokens = self.reader.max_tokens
        source = PromptSource(Prompt(script.conversation, script.images), num_users=num_distinct(sampling))
        text = AnswerText(StopRule.of(self.processor, sampling), self.processor.decode)
        return [
            Episode(source, sampling, TokenDraw(sampling, index), text, follow_ups=follow_ups, max_tokens=max_tokens)
            for index in range(source.num_users)
        ]

    def _stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[str]:
        handle, shown = self.driver.submit(prompt, sampling), ""
        try:
            for event in handle:
                if event.error is not None:
                    raise GenerationError(event.error)
                if event.answer != shown:
                    shown = event.answer
                    yield shown
        finally:
            if not handle.is_over:
                handle.cancel()
                self.driver.cancel(handle.requests)

    def _rows(self, readings: Sequence[EncodedPrompt]) -> list[list[int]]:
        """Return the indices of the conversations of each row; those with the same images are adjacent."""
        order: dict[tuple[str, ...], list[int]] = {}
        for index, reading in enumerate(readings):
            order.setdefault(reading.encoded.images, []).append(index)
        rows: list[list[int]] = []
        num_tokens = 0
        for index in (index for group in order.values() for index in group):
            length = len(readings[index].encoded.input_ids)
            is_alone = self.context is not None and length > self.context.length
            if not rows or is_alone or num_tokens + length > self.max_prefill_tokens:
                rows.append([])
                num_tokens = 0
            rows[-1].append(index)
            num_tokens = self.max_prefill_tokens if is_alone else num_tokens + length
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


def _submit_to(engine: weakref.ref[LocalEngine], *prompt: Any) -> list[Request]:
    found = engine()
    if found is None:
        raise GenerationError("the engine was dropped before it read this prompt")
    return found._submitted(*prompt)


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
