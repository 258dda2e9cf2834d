"""Resumable answering of a question file; the only loop that runs an engine during evaluation.

    questions --chunk--> own part --minus answered--> pending --by image--> batches --engine--> rows --sort--> file

Every row is written as soon as its batch is finished. Questions about one image are batched together, so the engine
encodes the image once; the finished file is in the order of the questions.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from llava.data.records import load_samples
from llava.errors import ConfigError, DataError, GenerationError, LlavaError
from llava.eval.control_images import control_image
from llava.eval.questions import (
    FOLLOW_UP_JOINT,
    PromptForm,
    Question,
    follow_up,
    question_of,
)
from llava.eval.row_forms import AnswerRows, RowForm
from llava.generation import fingerprint
from llava.generation.protocol import Completion, Engine, Prompt, Sampling
from llava.imaging.decode import resolve_image_path
from llava.samples import Sample
from llava.utils import jsonl, log
from llava.utils.cli import chunk_of
from llava.utils.json_rows import read_records

logger = logging.getLogger(__name__)

NUM_FOLLOW_UP_TOKENS = 64
"""Limit of the short answer that `--answer-prompter` asks for."""


@dataclass(frozen=True, slots=True)
class AnswerSummary:
    """Counts of one answered file.

    Attributes:
        path: the answer file.
        num_questions: number of its rows.
        num_resumed: number of rows kept from an earlier run.
        num_failed: number of rows that hold an error instead of an answer.
        seconds: duration of this run.
        precisions: precisions that the answers were computed in, as far as the engines know.
        num_truncated: number of answers of this run that reached the token limit.
    """

    path: Path
    num_questions: int
    num_resumed: int
    num_failed: int
    seconds: float
    precisions: tuple[str, ...] = ()
    num_truncated: int = 0


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """Options of answering a question file.

    Attributes:
        image_folder: folder of the images; with None, image names are paths.
        sampling: sampling parameters; greedy by default.
        model_id: name of the model in the answer rows.
        form: how the answer rows repeat the question.
        choices: append the two options to closed yes/no questions.
        answer_prompter: ask for a short answer after the long one, and write both.
        blank_images: replace every image by a gray square; the same as control `blank`.
        control: name in `control_images.CONTROLS` of the images that are shown; empty for the questions' own.
        by_length: ask short questions first, instead of those about one image together.
        settings: other settings that answers depend on: weights, template, precision (`fingerprint.model_settings`).
    """

    image_folder: str | Path | None = None
    sampling: Sampling = field(default_factory=Sampling)
    model_id: str = ""
    form: PromptForm = "tagged"
    choices: bool = False
    answer_prompter: bool = False
    blank_images: bool = False
    control: str = ""
    by_length: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


class AnswerRun:
    """Run that fills one answer file; the pending questions are known before a model is loaded."""

    def __init__(
        self,
        questions: str | Path | Sequence[Sample],
        out: str | Path,
        *,
        num_chunks: int = 1,
        chunk_idx: int = 0,
        resume: bool = True,
        options: AnswerOptions,
        row_form: RowForm | None = None,
    ) -> None:
        """Read the questions, and the existing answers of the file.

        Args:
            questions: question file, or its samples.
            out: answer file.
            num_chunks: number of chunks that the questions are divided into.
            chunk_idx: index of the chunk to answer.
            resume: keep the answers of an earlier run.
            options: options of answering.
            row_form: form of the rows; default: the published six keys.

        Raises:
            DataError: the questions cannot be used, or the file holds answers of another run.
        """
        samples = load_samples(questions) if isinstance(questions, str | Path) else questions
        asked = [question_of(sample, form=options.form, options=options.choices) for sample in samples]
        _check_unique(asked)
        self.options = options
        self.control = "blank" if options.blank_images else options.control
        self.form = row_form or AnswerRows(options.model_id, {"image": self.control} if self.control else {})
        self.shown = control_image(self.control)
        self.out = Path(out)
        self.num_chunks = num_chunks
        self.questions = chunk_of(asked, num_chunks, chunk_idx)
        self.rows: dict[str, dict[str, Any]] = self._resumed() if resume else {}
        self.num_resumed = len(self.rows)
        self.num_truncated = 0
        if not resume or not self.out.exists():
            jsonl.write_records(self.out, [])
        self.precisions = set(fingerprint.read_precisions(self.out)) if self.rows else set()
        fingerprint.write_settings(self.out, self._settings(), precisions=self.precisions)

    @property
    def pending(self) -> list[Question]:
        """Questions without an answer, grouped by image, or by length with `by_length`."""
        left = [asked for asked in self.questions if asked.id not in self.rows]
        if self.options.by_length:
            return sorted(left, key=lambda asked: len(asked.prompt))
        groups: dict[tuple[str, ...], list[Question]] = {}
        for asked in left:
            groups.setdefault(asked.images, []).append(asked)
        return [asked for group in groups.values() for asked in group]

    def finish(self, engine: Engine | None, *, batch_size: int = 64) -> AnswerSummary:
        """Answer the pending questions, then rewrite the file in the order of the questions.

        Args:
            engine: the engine; may be None if no question is pending.
            batch_size: number of questions passed to the engine at once.

        Raises:
            ConfigError: questions are pending and `engine` is None, or `batch_size` is below 1.
            GenerationError: every answer failed, so that there is nothing to score; states the first reason.
        """
        if batch_size < 1:
            raise ConfigError(f"--batch-size must be at least 1, got {batch_size}")
        start = time.monotonic()
        pending = self.pending
        title = f"{self.control} image" if self.control else "answering"
        if pending and engine is None:
            raise ConfigError(f"{len(pending)} questions are pending, but engine is None; pass an engine")
        if engine is not None and pending:
            if precision := getattr(engine, "precision", None):  # unknown to a remote engine
                self.precisions.add(precision)
                fingerprint.write_settings(self.out, self._settings(), precisions=self.precisions)
            with log.progress_bar(len(self.questions), title=title, unit="question") as bar:
                bar.update(self.num_resumed)
                for first in range(0, len(pending), batch_size):
                    batch = pending[first : first + batch_size]
                    self._answer(engine, batch)
                    bar.update(len(batch))
        rows = [self.rows[asked.id] for asked in self.questions]
        jsonl.write_records(self.out, rows)
        errors = [error for row in rows if (error := self.form.error_of(row)) is not None]
        if errors and len(errors) == len(rows):
            reason = f"all {len(rows)} answers failed, the first with: {errors[0]}"
            raise GenerationError(f"{self.out}: {reason}. Once that is corrected, the same command asks again")
        if errors:
            logger.warning("%d of %d answers failed; the error of each row has the reason", len(errors), len(rows))
        return AnswerSummary(
            self.out,
            len(rows),
            self.num_resumed,
            len(errors),
            time.monotonic() - start,
            tuple(sorted(self.precisions)),
            self.num_truncated,
        )

    def _resumed(self) -> dict[str, dict[str, Any]]:
        """Return the answered rows of an earlier run, after checking that they belong to this run."""
        if not self.out.exists():
            return {}
        jsonl.drop_incomplete_line(self.out)
        known = {asked.id: asked for asked in self.questions}
        kept = {}
        for index, row in enumerate(read_records(self.out)):
            identity = self.form.id_of(row)
            if identity in known:
                problem = self.form.difference(known[identity], row)
            else:
                problem = f"question {identity!r} is not a question of this run"
            if problem:
                raise DataError(
                    f"{self.out}, row {index}: {problem}; the row belongs to another run. Name another file, or start "
                    f"over with --resume False"
                )
            if self.form.error_of(row) is None:
                kept[identity] = row
        if kept:
            fingerprint.check_settings(self.out, self._settings())
        return kept

    def _settings(self) -> dict[str, Any]:
        """Return all settings that the answers depend on."""
        options = self.options
        asked = [(question.id, asdict(question.conversation), question.images) for question in self.questions]
        return {
            **options.settings,
            "sampling": asdict(options.sampling),
            "choices": options.choices,
            "answer prompter": options.answer_prompter,
            "blank images": self.control == "blank",
            **({"control": self.control} if self.control not in ("", "blank") else {}),
            "image folder": None if self.shown is not None else fingerprint.folder_name(options.image_folder),
            "questions": fingerprint.json_sha256(asked),
            "num chunks": self.num_chunks,
        }

    def _answer(self, engine: Engine, batch: Sequence[Question]) -> None:
        """Answer a batch of questions and append the rows to the file."""
        prompts: list[Prompt] = []
        completions: dict[int, Completion] = {}
        for index, asked in enumerate(batch):
            try:
                prompts.append(self._prompt(asked))
            except DataError as error:
                completions[index] = _failed(error)
        answered = self._complete(engine, prompts)
        for index, asked in enumerate(batch):
            self._write(asked, completions[index] if index in completions else answered.pop(0))

    def _complete(self, engine: Engine, prompts: Sequence[Prompt]) -> list[Completion]:
        """Return the completions of prompts; with `answer_prompter`, each is extended by a short answer."""
        completions = _generate(engine, prompts, self.options.sampling)
        if not self.options.answer_prompter:
            return completions
        good = [index for index, completion in enumerate(completions) if completion.finish != "error"]
        again = [
            replace(
                prompts[index],
                conversation=follow_up(prompts[index].conversation, completions[index].text.strip()),
            )
            for index in good
        ]
        sampling = replace(self.options.sampling, max_new_tokens=NUM_FOLLOW_UP_TOKENS)
        for index, short in zip(good, _generate(engine, again, sampling), strict=True):
            text = f"{completions[index].text.strip()}{FOLLOW_UP_JOINT}{short.text.strip()}"
            completions[index] = replace(short, text=text)
        return completions

    def _write(self, asked: Question, completion: Completion) -> None:
        self.num_truncated += completion.finish == "length"
        row = self.form.row(asked, completion)
        self.rows[asked.id] = row
        jsonl.append_record(self.out, row)

    def _prompt(self, asked: Question) -> Prompt:
        """Return the prompt of a question.

        Raises:
            DataError: an image is missing or outside the image folder.
        """
        if self.shown is not None:
            return Prompt(asked.conversation, (self.shown,) * len(asked.images))
        paths = [resolve_image_path(name, self.options.image_folder) for name in asked.images]
        for path in paths:
            if not path.is_file():
                raise DataError(f"image {path.name!r} is not in the image folder")
        return Prompt(asked.conversation, tuple(map(str, paths)))


def _generate(engine: Engine, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
    """Return one completion per prompt; if a batch fails, every prompt of it is retried alone."""
    if not prompts:
        return []
    try:
        return [answers[0] for answers in engine.generate(prompts, sampling)]
    except LlavaError as error:
        if len(prompts) == 1:
            return [_failed(error)]
    return [completion for prompt in prompts for completion in _generate(engine, [prompt], sampling)]


def _failed(error: LlavaError) -> Completion:
    """Return the completion that records an error."""
    return Completion(text="", token_ids=(), finish="error", error=str(error))


def _check_unique(questions: Sequence[Question]) -> None:
    seen: set[str] = set()
    for asked in questions:
        if asked.id in seen:
            raise DataError(f"question id {asked.id!r} occurs twice; ids must be unique")
        seen.add(asked.id)
