"""Trainer for any objective: the loop of transformers with batches that are whole optimizer steps.

    StepLoader -> StepBatch -> row by row: objective(model, row) -> backward -> one optimizer step

Gradients are accumulated here: the loss of a step is the sum over its rows on all ranks, divided by the global number
of supervised tokens. Batch size, accumulation and world size therefore do not change the loss (tests/invariants).
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from llava.data.collator import Collator, StepBatch, matched_rows
from llava.data.flat_batch import FlatBatch
from llava.data.loader import StepLoader, StreamLoader
from llava.errors import ConfigError
from llava.train.objectives.base import Objective
from llava.train.optimizer import parameter_groups
from llava.train.ranks import check_finite
from llava.train.specs import OptimizerSpec
from llava.utils.jsonl import write_json

logger = logging.getLogger(__name__)

WINDOW_FILE = "loss_window-{}.json"
"""File in a checkpoint with the losses that a rank has summed since the last log."""

Save = Callable[[str, "dict[str, Tensor] | None"], None]
"""Function that saves the trained part into a folder, from gathered weights if they are sharded."""

Restore = Callable[[str], None]
"""Function that loads a saved checkpoint into the model."""

Validate = Callable[[nn.Module], dict[str, float]]
"""Function that returns validation metrics of the model."""

WatchStep = Callable[[StepBatch, int], None]
"""Function called with each computed step and the number of optimizer steps before it."""


@dataclass(slots=True)
class TrainingCounts:
    """Numbers of sequences and tokens since the last log."""

    sequences: int = 0
    supervised: float = 0.0
    tokens: int = 0
    unshared: int = 0
    skipped: int = 0
    """Skipped rows of a stream, since the start of the run."""

    by_source: Tensor | None = None
    """[2, sources] sums of losses and of weights over the edges of each source of a mixture."""

    def add(self, step: StepBatch) -> None:
        """Add one step of this rank."""
        self.sequences += len(step.sequences)
        self.supervised += step.num_edges
        self.tokens += step.num_tokens
        self.unshared += step.num_unshared_tokens

    def add_sources(self, sums: Tensor) -> None:
        """Add sums of losses and weights by source, [2, sources]."""
        self.by_source = sums.double() if self.by_source is None else self.by_source + sums

    def clear(self) -> None:
        """Set all counts to zero."""
        self.sequences, self.supervised, self.tokens, self.unshared, self.skipped = 0, 0.0, 0, 0, 0
        self.by_source = None

    def over_ranks(self, device: torch.device, num_sources: int = 0) -> TrainingCounts:
        """Return the sums over all ranks."""
        by_source = torch.zeros(2, num_sources) if self.by_source is None else self.by_source.cpu()
        counted = [self.sequences, self.supervised, self.tokens, self.unshared, self.skipped]
        own = torch.tensor(counted, dtype=torch.float64)
        numbers = torch.cat([own, by_source.double().flatten()])
        if dist.is_initialized():
            numbers = numbers.to(device)
            dist.all_reduce(numbers)
        sequences, supervised, tokens, unshared, skipped, *rest = numbers.tolist()
        sums = torch.tensor(rest, dtype=torch.float64).view(2, num_sources) if num_sources else None
        return TrainingCounts(int(sequences), supervised, int(tokens), int(unshared), int(skipped), sums)


@dataclass(frozen=True, slots=True)
class TrainerHooks:
    """Functions that save, restore and validate the trained part of a run.

    Attributes:
        save: saves the trained part (projector, adapter or whole model).
        restore: loads it back.
        validate: returns validation metrics; None without held-out rows.
        on_step: called with each computed step and the number of optimizer steps before it.
    """

    save: Save
    restore: Restore
    validate: Validate | None = None
    on_step: WatchStep | None = None


@dataclass(slots=True)
class _Limits:
    max_tokens_per_row: int | None
    was_halved: bool = False


@dataclass(slots=True)
class _StepResult:
    """Loss of a step on this rank, and for each row its sums by source, [2, sources]."""

    loss: Tensor
    by_source: list[Tensor] = field(default_factory=list)


class LlavaTrainer(Trainer):
    """transformers' Trainer with an objective and a loader of whole steps.

    Args:
        model: the model, or a peft model around it.
        args: arguments of transformers' Trainer.
        loader: yields one `StepBatch` per optimizer step of this rank.
        collator: lays out a step again after an out-of-memory error, and makes idle rows.
        objective: computes the loss of a row.
        rates: learning rates and weight decay.
        hooks: functions that save, restore and validate.
        counts: counts since the last log, which a callback reads and clears; None for new ones.
        keywords: arguments of `Trainer`, for example `callbacks`.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        loader: StepLoader | StreamLoader,
        collator: Collator,
        objective: Objective,
        rates: OptimizerSpec,
        hooks: TrainerHooks,
        counts: TrainingCounts | None = None,
        **keywords: Any,
    ) -> None:
        # transformers requires an eval dataset before it calls `evaluate`, which uses `hooks` here.
        held_out = collator.dataset if hooks.validate is not None else None
        super().__init__(model=model, args=args, train_dataset=collator.dataset, eval_dataset=held_out, **keywords)
        self.loader = loader
        self.collator = collator
        self.objective: Objective = objective
        self.rates = rates
        self.hooks = hooks
        self.counts = TrainingCounts() if counts is None else counts
        self._limits = _Limits(collator.max_tokens_per_row)
        self._step_loss = torch.zeros((), device=args.device)

    def get_train_dataloader(self) -> StepLoader | StreamLoader:
        """Return the loader unwrapped, since its sampler shards rows over ranks."""
        return self.loader

    def _get_num_items_in_batch(self, batch_samples: list[StepBatch], device: torch.device) -> Tensor:
        """Return the number of supervised tokens of the optimizer step on all ranks, at least 1."""
        local = torch.tensor(sum(batch.num_supervised for batch in batch_samples), dtype=torch.float64)
        total: Tensor = self.accelerator.reduce(local.to(device, torch.float32), reduction="sum")
        return total.clamp(min=1.0)

    def training_step(  # type: ignore[override]
        self, model: nn.Module, inputs: StepBatch, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward for every row of the step; only the last row synchronizes gradients.

        Returns:
            The loss of this rank times the number of ranks; its mean over ranks is the loss of the step.
        """
        assert isinstance(num_items_in_batch, Tensor)
        model.train()
        if inputs.sequences and self._limits.max_tokens_per_row != self.collator.max_tokens_per_row:
            inputs = self._laid_out_again(inputs)
        result = self._run_rows(model, inputs, num_items_in_batch)
        if result is None:
            inputs, result = self._retry_smaller(model, inputs, num_items_in_batch)
        self._fill_gradients(model)
        self._step_loss = result.loss
        for sums in result.by_source:
            self.counts.add_sources(sums)
        self.counts.add(inputs)
        self.counts.skipped = self.loader.num_bad if isinstance(self.loader, StreamLoader) else 0
        if self.hooks.on_step is not None:
            self.hooks.on_step(inputs, self.state.global_step)
        return result.loss

    def _run_rows(self, model: nn.Module, batch: StepBatch, num_items: Tensor) -> _StepResult | None:
        """Run all rows of a step; return None after the first out-of-memory error of the run.

        Raises:
            ConfigError: out of memory with halved rows, or on one of several ranks.
        """
        result = _StepResult(torch.zeros((), device=self.args.device))
        try:
            for row, is_last in self._rows(batch):
                self._run_row(model, row, num_items, result, is_last=is_last)
        except torch.OutOfMemoryError as error:
            if self.args.world_size > 1 or self._limits.was_halved or not batch.sequences:
                raise ConfigError(
                    f"out of memory with rows of at most {self._limits.max_tokens_per_row} tokens; "
                    "lower --max-tokens-per-row or --per-device-train-batch-size, or use --gradient-checkpointing True"
                ) from error
            return None
        return result

    def _retry_smaller(self, model: nn.Module, batch: StepBatch, num_items: Tensor) -> tuple[StepBatch, _StepResult]:
        """Run a step again with rows of half the size; return its new layout and its result."""
        # Called after the handler has ended, since its traceback references all activations of the failed row.
        self._halve_rows(batch)
        model.zero_grad()
        batch = self._laid_out_again(batch)
        result = self._run_rows(model, batch, num_items)
        assert result is not None  # halved rows raise instead
        return batch, result

    def _run_row(
        self, model: nn.Module, row: FlatBatch, num_items: Tensor, result: _StepResult, *, is_last: bool
    ) -> None:
        """Run forward and backward for one row, and add its loss and sums to `result`."""
        is_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        self.accelerator.gradient_state._set_sync_gradients(is_last)
        waits = not is_last and not is_deepspeed
        with self.accelerator.no_sync(model) if waits else contextlib.nullcontext():
            with self.compute_loss_context_manager():
                output = self.objective(model, row.to(self.args.device), num_items=num_items)
                # Gradients are averaged over ranks, but the loss is a global sum divided by a global count.
                loss = output.loss * self.args.world_size + (self._anchor(model) if is_last else 0.0)
            result.loss += loss.detach()
            if is_deepspeed and is_last:  # its `backward` also takes the optimizer step
                check_finite(result.loss, None, step=self.state.global_step + 1)
            self.accelerator.backward(loss, **({"scale_wrt_gas": False} if is_deepspeed else {}))
        if "by_source" in output.metrics:
            result.by_source.append(output.metrics["by_source"])

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the gradient norm; transformers calls this just before the optimizer step.

        Raises:
            LlavaError: the loss or the gradient norm is not finite on some rank.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        # In fp16 the loss scaler skips steps whose gradients overflow, so that only the loss is checked.
        check_finite(self._step_loss, None if self.args.fp16 else norm, step=self.state.global_step + 1)
        return norm

    def _anchor(self, model: nn.Module) -> Tensor | float:
        """Return zero, connected to every trained weight."""
        # DDP waits for the gradient of each weight, also if a row has no images.
        if not isinstance(model, nn.parallel.DistributedDataParallel):
            return 0.0
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.stack([parameter.sum() for parameter in trained]).sum() * 0.0

    def _fill_gradients(self, model: nn.Module) -> None:
        """Set the gradient of unused trained weights to zero."""
        # Several ranks do so (see `_anchor`), and without gradients the optimizer would not update momentum.
        if self.args.world_size > 1:
            return
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    @property
    def is_sharded(self) -> bool:
        """Whether weights or optimizer state are sharded, so that all ranks must run the same modules."""
        return bool(self.is_deepspeed_enabled or self.is_fsdp_enabled)

    def _rows(self, batch: StepBatch) -> Iterator[tuple[FlatBatch, bool]]:
        """Yield each row of a step and whether it is the last; all ranks have the same number of rows."""
        rows = matched_rows(batch.rows, self.collator, device=self.args.device, with_images=self.is_sharded)
        for index, row in enumerate(rows):
            yield row, index == len(rows) - 1

    def _halve_rows(self, batch: StepBatch) -> None:
        largest = max(row.num_tokens for row in batch.rows)
        limit = min(self._limits.max_tokens_per_row or largest, largest) // 2
        self._limits = _Limits(max(1, limit), was_halved=True)
        logger.warning(
            "out of memory; continuing with rows of at most %d tokens, which does not change the loss", limit
        )

    def _laid_out_again(self, batch: StepBatch) -> StepBatch:
        rows = self.collator.rows(batch.sequences, batch.images, self._limits.max_tokens_per_row)
        return StepBatch(batch.sequences, batch.images, rows, batch.row_ids)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer with one group per part and weight decay, each with its learning rate."""
        if self.optimizer is None:
            network = model if model is not None else self.model
            assert network is not None
            decaying = set(self.get_decay_parameter_names(network))
            optimizer_class, keywords = self.get_optimizer_cls_and_kwargs(self.args, None)
            self.optimizer = optimizer_class(parameter_groups(network, decaying, self.rates), **keywords)
        return self.optimizer

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Validate on held-out rows and log the metrics."""
        if self.hooks.validate is None:
            return {}
        assert self.model is not None
        metrics = self.hooks.validate(self.model_wrapped if self.is_sharded else self.model)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def floating_point_ops(self, inputs: StepBatch) -> int:  # type: ignore[override]
        """Return six operations per parameter and token."""
        assert self.model is not None
        return 6 * inputs.num_tokens * sum(p.numel() for p in self.model.parameters())

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            assert self.args.output_dir is not None
            self.hooks.save(output_dir or self.args.output_dir, state_dict)

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the random state and the losses since the last log."""
        # A run that resumes between two logs then logs the same losses as an uninterrupted one.
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
        """Restore what `_save_rng_state` saved; with another number of ranks, without the losses."""
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
        logger.info("loading the best checkpoint, %s", self.state.best_model_checkpoint)
        self._load_from_checkpoint(self.state.best_model_checkpoint, self.model)
