"""Validation during training: loss per supervised token, and scores of answers, on held-out rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from llava.data.collator import Collator, matched_rows
from llava.data.flat_batch import Layout
from llava.data.samplers import SequentialSampler
from llava.generation.engine import LocalEngine
from llava.generation.protocol import Prompt, Sampling
from llava.imaging.decode import resolve_image_path
from llava.processing import LlavaMedProcessor
from llava.samples import Sample, with_placeholders
from llava.scoring.choices import choices_of
from llava.scoring.decisions import is_closed, words_of
from llava.scoring.metrics import METRICS, AnsweredText
from llava.train.counts import TrainingCounts
from llava.train.held_out_page import write_cases
from llava.train.objectives.base import Objective


@contextmanager
def dropout_off(model: nn.Module) -> Iterator[None]:
    """Context in which all modules except quantized layers are in evaluation mode."""
    # A 4-bit layer on the CPU that runs in evaluation mode without gradients never computes gradients again.
    # All other modules are switched, since attention dropout and stochastic depth read the mode of their own module.
    switched = [m for m in model.modules() if m.training and not type(m).__module__.startswith("bitsandbytes")]
    for module in switched:
        module.training = False
    try:
        yield
    finally:
        for module in switched:
            module.training = True


class HeldOutLoss:
    """Callable that returns `eval_loss`, and `eval_NAME` of each metric, over the rows of all ranks.

    Args:
        collator: collator of the held-out dataset.
        objective: computes the loss of a row.
        batch_size: units per forward pass and rank.
        rank: rank of this process.
        world_size: number of processes; each takes a share of the rows.
        sharded: whether weights are sharded, so that all ranks must run the vision tower if one does.
    """

    def __init__(
        self,
        collator: Collator,
        objective: Objective,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        sharded: bool = False,
    ) -> None:
        self.collator = collator
        self.objective = objective
        self.sharded = sharded
        self.sampler = SequentialSampler(len(collator.dataset), batch_size, rank=rank, world_size=world_size)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return the loss; runs every held-out row once."""
        device = next(model.parameters()).device
        num = len(self.objective.denominators)
        ones = torch.ones(num, device=device)
        sums = torch.zeros(2, num, dtype=torch.float64, device=device)  # numerators and denominators
        counts = TrainingCounts()
        with dropout_off(model):
            for rows in self.sampler:
                step = self.collator([(row, self.collator.dataset[row]) for row in rows])
                for batch in matched_rows(step.rows, self.collator, device=device, with_images=self.sharded):
                    output = self.objective(model, batch.to(device), num_items=ones)
                    assert output.sums is not None
                    sums += torch.stack([output.sums.double(), self.objective.count(batch).to(device)])
                    counts.add_metrics(output.metrics)
        if dist.is_initialized():
            dist.all_reduce(sums)
        loss = float((sums[0] / sums[1].clamp(min=1.0)).sum())
        metrics = counts.over_ranks(device, self.objective.metric_names).means()
        return {"eval_loss": loss, **{f"eval_{name}": value for name, value in metrics.items()}}


MAX_NEW_TOKENS = 24
MAX_SLOTS = 8


def reference_of(sample: Sample) -> str:
    """Return the last answer of a row."""
    return sample.conversation.turns[-1].text


def answer_score(reference: str, answer: str, *, closed: bool, choices: Sequence[str] = (), label: str = "") -> float:
    """Return the score of an answer, 0 to 1: by the metrics `closed accuracy` and `open word recall`."""
    item = AnsweredText(reference, answer, closed, tuple(choices), label)
    return METRICS["closed accuracy" if closed else "open word recall"].values([item])[0]


class HeldOutAnswers:
    """Callable that returns `eval_closed_accuracy` and `eval_open_recall` over evenly spaced rows.

    With `watches_length` the names begin with `eval_vqa_`, and `eval_vqa_words` is the mean number of words.

    Args:
        samples: held-out rows; rows that do not end with an answer are skipped.
        processor: processor of the model.
        image_folder: folder that image names are relative to.
        num_rows: number of questions to answer.
        layout: layout of prompts.
        max_length: longest prompt in tokens.
        watches_length: report the length of the answers too.
        page_folder: folder of the run, for whose page the first process keeps a few answers; None keeps none.
        rank: rank of this process.
        world_size: number of processes; each answers a share of the questions.

    Raises:
        DataError: the `answer_type` of a row is unknown.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        processor: LlavaMedProcessor,
        *,
        image_folder: str | Path | None,
        num_rows: int,
        layout: Layout = "tree",
        max_length: int = 2048,
        watches_length: bool = False,
        page_folder: Path | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        usable = [s for s in samples if len(s.conversation.turns) > 1 and s.conversation.turns[-1].role == "gpt"]
        stride = max(1, len(usable) // max(num_rows, 1))
        self.samples = usable[::stride][:num_rows][rank::world_size]
        self.closed = [is_closed(sample.meta.get("answer_type"), reference_of(sample)) for sample in self.samples]
        self.processor = processor
        self.image_folder = image_folder
        self.layout = layout
        self.max_length = max_length
        self.watches_length = watches_length
        self.page_folder = page_folder if rank == 0 else None

    def __call__(self, model: Any) -> dict[str, float]:
        """Return the mean scores over all ranks."""
        engine = LocalEngine(
            model,
            self.processor,
            # A layout that is exact for whole sequences may not decode in slots, so the engine tries that itself.
            layout="padded" if self.layout == "padded" else None,
            max_slots=MAX_SLOTS,
            max_tokens=self.max_length + MAX_NEW_TOKENS,
        )
        answers = engine.generate([self._prompt(s) for s in self.samples], Sampling(max_new_tokens=MAX_NEW_TOKENS))
        sums = torch.zeros(3, 2, dtype=torch.float64)
        texts, values = [], []
        for sample, closed, [completion] in zip(self.samples, self.closed, answers, strict=True):
            choices, label = choices_of(sample.meta)
            value = answer_score(reference_of(sample), completion.text, closed=closed, choices=choices, label=label)
            texts.append(completion.text)
            values.append(value)
            sums[int(closed)] += torch.tensor([value, 1.0], dtype=torch.float64)
            sums[2] += torch.tensor([len(words_of(completion.text)), 1.0], dtype=torch.float64)
        if self.page_folder is not None:
            where: dict[str, Any] = {"image_folder": self.image_folder, "dicom": self.processor.dicom}
            write_cases(self.page_folder, self.samples, texts, values, **where)
        if dist.is_initialized() and dist.get_world_size() > 1:
            sums = sums.to(model.device)
            dist.all_reduce(sums)
        means = {
            name: float(total / count)
            for name, (total, count) in zip(("open_recall", "closed_accuracy", "words"), sums.tolist(), strict=True)
            if count
        }
        if self.watches_length:
            return {f"eval_vqa_{name}": value for name, value in means.items()}
        return {f"eval_{name}": value for name, value in means.items() if name != "words"}

    def _prompt(self, sample: Sample) -> Prompt:
        conversation = with_placeholders(sample)
        asked = replace(conversation, turns=conversation.turns[:-1])
        return Prompt(asked, tuple(str(resolve_image_path(name, self.image_folder)) for name in sample.images))
