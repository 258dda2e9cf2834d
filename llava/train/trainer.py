"""The one trainer: transformers' loop, our rows, any objective.

    StepLoader -> StepBatch -> row by row: objective(model, row) -> backward -> one optimiser step

One batch of the loop is a whole optimiser step, so accumulation happens here: the loss of a step is the sum over its
rows, on all ranks, divided by the global number of supervised tokens. Batch size, accumulation and world size therefore
never move the loss (tests/invariants).
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import Trainer

from llava.data.collator import Collator, StepBatch, matched_rows
from llava.data.flat_batch import FlatBatch
from llava.data.loader import StepLoader, StreamLoader
from llava.errors import ConfigError
from llava.train.args import LlavaTrainingArguments
from llava.train.objectives.base import Objective
from llava.train.optimizer import parameter_groups
from llava.utils.jsonl import write_json

logger = logging.getLogger(__name__)

WINDOW_FILE = "loss_window-{}.json"
"""Beside a checkpoint's random state: what this rank has added up since the last log."""

Save = Callable[[str, "dict[str, Tensor] | None"], None]
"""Writes what is trained into a folder, given gathered weights when they are sharded."""

Restore = Callable[[str], None]
"""Reads it back into the model."""


@dataclass(slots=True)
class Counts:
    """What was computed since the last log."""

    sequences: int = 0
    supervised: float = 0.0
    tokens: int = 0
    unshared: int = 0
    skipped: int = 0
    """Rows of a stream that were left out: since the beginning of the run, not since the last log."""

    by_source: Tensor | None = None
    """[2, sources] losses and weights of each source of a mixture, summed over edges."""

    def add(self, step: StepBatch) -> None:
        """Count one step of this rank."""
        self.sequences += len(step.sequences)
        self.supervised += step.num_edges
        self.tokens += step.num_tokens
        self.unshared += step.num_unshared_tokens

    def add_sources(self, sums: Tensor) -> None:
        """Add the losses and weights of the sources of one row."""
        self.by_source = sums.double() if self.by_source is None else self.by_source + sums

    def over_ranks(self, device: torch.device, num_sources: int = 0) -> Counts:
        """Sums over all ranks."""
        by_source = torch.zeros(2, num_sources) if self.by_source is None else self.by_source.cpu()
        counted = [self.sequences, self.supervised, self.tokens, self.unshared, self.skipped]
        own = torch.tensor(counted, dtype=torch.float64)
        numbers = torch.cat([own, by_source.double().flatten()])
        if dist.is_initialized():
            numbers = numbers.to(device)
            dist.all_reduce(numbers)
        sequences, supervised, tokens, unshared, skipped, *rest = numbers.tolist()
        sums = torch.tensor(rest, dtype=torch.float64).view(2, num_sources) if num_sources else None
        return Counts(int(sequences), supervised, int(tokens), int(unshared), int(skipped), sums)


@dataclass(slots=True)
class Hooks:
    """How a kind of run (projector, adapter, whole model) is written, read back and validated."""

    save: Save
    restore: Restore
    validate: Callable[[nn.Module], dict[str, float]] | None = None
    on_step: Callable[[StepBatch, int], None] | None = None


@dataclass(slots=True)
class _Limits:
    max_tokens_per_row: int | None
    was_halved: bool = field(default=False)


class LlavaTrainer(Trainer):
    """transformers' Trainer with an objective and a loader of whole steps.

    Args:
        model: the model, or a peft model around it.
        args: training arguments.
        loader: one `StepBatch` per optimiser step of this rank.
        collator: lays a step out again when memory runs out, and makes idle rows.
        objective: what is minimised.
        hooks: writing, reading and validating.
        source_names: of the sources of a mixture; the loss of each is logged.
        keywords: passed on, for example callbacks.
    """

    def __init__(
        self,
        model: nn.Module,
        args: LlavaTrainingArguments,
        *,
        loader: StepLoader | StreamLoader,
        collator: Collator,
        objective: Objective,
        hooks: Hooks,
        source_names: Sequence[str] = (),
        **keywords: Any,
    ) -> None:
        # The library asks for a data set before it calls `evaluate`; ours validates through `hooks`.
        held_out = collator.dataset if hooks.validate is not None else None
        super().__init__(model=model, args=args, train_dataset=collator.dataset, eval_dataset=held_out, **keywords)
        self.loader = loader
        self.collator = collator
        self.objective: Objective = objective
        self.hooks = hooks
        self.source_names = tuple(source_names)
        self.counts = Counts()
        self._limits = _Limits(collator.max_tokens_per_row)

    def get_train_dataloader(self) -> StepLoader | StreamLoader:
        """Our loader as it is; its sampler knows the ranks."""
        return self.loader

    def _get_num_items_in_batch(self, batch_samples: list[StepBatch], device: torch.device) -> Tensor:
        """Supervised tokens of the optimiser step, over all ranks (at least 1)."""
        local = torch.tensor(sum(batch.num_supervised for batch in batch_samples), dtype=torch.float64)
        total: Tensor = self.accelerator.reduce(local.to(device, torch.float32), reduction="sum")
        return total.clamp(min=1.0)

    def training_step(  # type: ignore[override]
        self, model: nn.Module, inputs: StepBatch, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run every row of the step forward and backward; only the last one synchronises gradients.

        Returns:
            This rank's share of the loss times the number of ranks, so that the mean over ranks is the loss.
        """
        assert isinstance(num_items_in_batch, Tensor)
        model.train()
        total = torch.zeros((), device=self.args.device)
        by_source = self.counts.by_source
        if inputs.sequences and self._limits.max_tokens_per_row != self.collator.max_tokens_per_row:
            inputs = self._laid_out_again(inputs)
        try:
            for row, is_last in self._rows(inputs):
                total += self._row_step(model, row, num_items_in_batch, is_last=is_last)
            ran_out = False
        except torch.OutOfMemoryError as error:
            if self.args.world_size > 1 or self._limits.was_halved or not inputs.sequences:
                raise ConfigError(
                    f"out of memory with rows of at most {self._limits.max_tokens_per_row} tokens; "
                    "lower --max_tokens_per_row or --per_device_train_batch_size, or use --gradient_checkpointing True"
                ) from error
            ran_out = True
        if ran_out:  # not inside the handler: its traceback holds every activation of the row that failed
            self._halve_rows(inputs)
            model.zero_grad()
            self.counts.by_source = by_source  # the rows before the one that failed are run again
            return self.training_step(model, self._laid_out_again(inputs), num_items_in_batch)
        self._fill_gradients(model)
        self.counts.add(inputs)
        self.counts.skipped = self.loader.num_bad if isinstance(self.loader, StreamLoader) else 0
        if self.hooks.on_step is not None:
            self.hooks.on_step(inputs, self.state.global_step)
        return total

    def _row_step(self, model: nn.Module, row: FlatBatch, num_items: Tensor, *, is_last: bool) -> Tensor:
        is_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        self.accelerator.gradient_state._set_sync_gradients(is_last)
        waits = not is_last and not is_deepspeed
        with self.accelerator.no_sync(model) if waits else contextlib.nullcontext():
            with self.compute_loss_context_manager():
                output = self.objective(model, row.to(self.args.device), num_items=num_items)
                # Gradients are averaged over ranks, while the loss is a global sum over a global count.
                loss = output.loss * self.args.world_size + (self._anchor(model) if is_last else 0.0)
            self.accelerator.backward(loss, **({"scale_wrt_gas": False} if is_deepspeed else {}))
        if "by_source" in output.metrics:
            self.counts.add_sources(output.metrics["by_source"])
        share: Tensor = loss.detach()
        return share

    def _anchor(self, model: nn.Module) -> Tensor | float:
        """Zero, connected to every trained weight: DDP waits for each, also in rows without images."""
        if not isinstance(model, nn.parallel.DistributedDataParallel):
            return 0.0
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.stack([parameter.sum() for parameter in trained]).sum() * 0.0

    def _fill_gradients(self, model: nn.Module) -> None:
        """Give unused trained weights a zero gradient, as several ranks do: momentum must not depend on it."""
        if self.args.world_size > 1:
            return
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    @property
    def is_sharded(self) -> bool:
        """Ranks share weights or optimizer state, so they must run the same parts of the model."""
        return bool(self.is_deepspeed_enabled or self.is_fsdp_enabled)

    def _rows(self, batch: StepBatch) -> Iterator[tuple[FlatBatch, bool]]:
        """The rows of a step, and whether each is the last; every rank has as many as the one with most."""
        rows = matched_rows(batch.rows, self.collator, device=self.args.device, with_images=self.is_sharded)
        for index, row in enumerate(rows):
            yield row, index == len(rows) - 1

    def _halve_rows(self, batch: StepBatch) -> None:
        largest = max(row.num_tokens for row in batch.rows)
        limit = min(self._limits.max_tokens_per_row or largest, largest) // 2
        self._limits = _Limits(max(1, limit), was_halved=True)
        logger.warning("out of memory: rows now hold at most %d tokens; the loss stays the same", limit)

    def _laid_out_again(self, batch: StepBatch) -> StepBatch:
        rows = self.collator.rows(batch.sequences, batch.images, self._limits.max_tokens_per_row)
        return StepBatch(batch.sequences, batch.images, rows, batch.row_ids)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One group per part and decay, each with its learning rate."""
        if self.optimizer is None:
            network = model if model is not None else self.model
            assert network is not None
            assert isinstance(self.args, LlavaTrainingArguments)
            decaying = set(self.get_decay_parameter_names(network))
            optimizer_class, keywords = self.get_optimizer_cls_and_kwargs(self.args, None)
            self.optimizer = optimizer_class(parameter_groups(network, decaying, self.args), **keywords)
        return self.optimizer

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Validate on held-out rows, and log."""
        if self.hooks.validate is None:
            return {}
        assert self.model is not None
        metrics = self.hooks.validate(self.model_wrapped if self.is_sharded else self.model)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def floating_point_ops(self, inputs: StepBatch) -> int:  # type: ignore[override]
        """Six operations a parameter and token."""
        assert self.model is not None
        return 6 * inputs.num_tokens * sum(p.numel() for p in self.model.parameters())

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            assert self.args.output_dir is not None
            self.hooks.save(output_dir or self.args.output_dir, state_dict)

    def _save_rng_state(self, output_dir: str) -> None:
        """Random state, and the losses since the last log: a resume between two logs repeats the second exactly."""
        super()._save_rng_state(output_dir)
        since = {
            "sum": self._tr_loss.item(),
            "last_logged": self._globalstep_last_logged,
            "ranks": self.args.world_size,
            "by_source": None if self.counts.by_source is None else self.counts.by_source.tolist(),
        }
        write_json(Path(output_dir) / WINDOW_FILE.format(self.args.process_index), since)
        if isinstance(self.loader, StreamLoader):
            self.loader.save(Path(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Counterpart of `_save_rng_state`; another number of ranks begins a new window."""
        super()._load_rng_state(checkpoint)
        path = Path(checkpoint or "") / WINDOW_FILE.format(self.args.process_index)
        since = json.loads(path.read_text(encoding="utf-8")) if checkpoint and path.is_file() else {}
        if since.get("ranks") == self.args.world_size:
            self._tr_loss += since["sum"]
            self._globalstep_last_logged = since["last_logged"]
            if since.get("by_source") is not None:
                self.counts.add_sources(torch.tensor(since["by_source"], dtype=torch.float64, device=self.args.device))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        self.hooks.restore(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_sharded:
            super()._load_best_model()
            return
        assert self.state.best_model_checkpoint is not None
        logger.info("keeping the best checkpoint, %s", self.state.best_model_checkpoint)
        self._load_from_checkpoint(self.state.best_model_checkpoint, self.model)
