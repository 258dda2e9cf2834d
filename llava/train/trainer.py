"""Trainer for any objective: the loop of transformers with batches that are whole optimizer steps.

    StepLoader -> StepBatch -> row by row: objective(model, row) -> backward -> one optimizer step

Gradients are accumulated here: the loss of a step is the sum over its rows on all ranks, divided by what the objective
counts (supervised tokens, pairs). Batch size, accumulation and world size do not change the loss (tests/invariants).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, TrainingArguments

from llava.data.collator import Collator, StepBatch, matched_rows
from llava.data.flat_batch import FlatBatch
from llava.data.loader import Loader
from llava.errors import ConfigError, LlavaError
from llava.train.counts import TrainingCounts
from llava.train.objectives.base import Objective, StepObjective
from llava.train.optimizer import parameter_groups
from llava.train.ranks import check_finite, check_finite_weights
from llava.train.specs import OptimizerSpec
from llava.train.state_files import CheckpointTrainer, restoring
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


@dataclass(frozen=True, slots=True)
class TrainerHooks:
    """Functions that save, restore and validate the trained part of a run.

    Attributes:
        save: saves the trained part (projector, adapter or whole model).
        restore: loads it back.
        validate: returns validation metrics; None without held-out rows.
        on_step: called with each computed step and the number of optimizer steps before it.
        before_write: called before files are written, on ranks that write; raises if the run folder was removed.
        may_load: called with a checkpoint before sharded weights are loaded, on every rank; raises if it is not safe.
    """

    save: Save
    restore: Restore
    validate: Validate | None = None
    on_step: WatchStep | None = None
    before_write: Callable[[], None] | None = None
    may_load: Callable[[str], None] | None = None


def _held(rate: Callable[[int], float], every: int, step: int) -> float:
    """Return a schedule's factor of the learning rate, which changes after `every` steps."""
    return rate(step // every)


@dataclass(slots=True)
class _Limits:
    max_tokens_per_row: int | None
    was_halved: bool = False


@dataclass(slots=True)
class _StepResult:
    """Loss of a step on this rank, and the metrics of each row."""

    loss: Tensor
    metrics: list[Mapping[str, Tensor]] = field(default_factory=list)


class LlavaTrainer(CheckpointTrainer):
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
        loader: Loader,
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
        for printer in (ProgressCallback, PrinterCallback):  # they print raw Python dictionaries
            self.remove_callback(printer)
        self.loader = loader
        self.collator = collator
        self.objective: Objective = objective
        self.rates = rates
        self.hooks = hooks
        self.counts = TrainingCounts() if counts is None else counts
        self._limits = _Limits(collator.max_tokens_per_row)
        self._step_loss = torch.zeros((), device=args.device)
        self._step_rows: list[int] = []

    def get_train_dataloader(self) -> Loader:  # type: ignore[override]
        """Return the loader unwrapped, since it shards rows over ranks itself."""
        return self.loader

    def _get_num_items_in_batch(self, batch_samples: list[StepBatch], device: torch.device) -> Tensor:
        """Return what the loss of the optimizer step is divided by on all ranks, [D], each at least 1."""
        counts = [self.objective.count(row) for batch in batch_samples for row in batch.rows]
        local = sum(counts, torch.zeros(len(self.objective.denominators), dtype=torch.float64))
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
        self._step_rows = inputs.row_ids
        if inputs.units and self._limits.max_tokens_per_row != self.collator.max_tokens_per_row:
            inputs = self._laid_out_again(inputs)
        if isinstance(self.objective, StepObjective):
            self.objective.begin_step(self._step_sums(self.objective, inputs))
        result = self._run_rows(model, inputs, num_items_in_batch)
        if result is None:
            inputs, result = self._retry_smaller(model, inputs, num_items_in_batch)
        if isinstance(self.objective, StepObjective):
            self.objective.begin_step(None)  # validation has no step
        self._fill_gradients(model)
        self._step_loss = result.loss
        for metrics in result.metrics:
            self.counts.add_metrics(metrics)
        self.counts.add(inputs)
        self.counts.skipped = self.loader.num_bad
        if self.hooks.on_step is not None:
            self.hooks.on_step(inputs, self.state.global_step)
        return result.loss

    def _step_sums(self, objective: StepObjective, batch: StepBatch) -> Tensor:
        """Return the sums of an objective over the step on all ranks, before its losses are computed."""
        network = self.model_wrapped if self.is_sharded else self.model
        shares = []
        for row, _ in self._rows(batch):
            with self.compute_loss_context_manager():
                shares.append(objective.step_share(cast(nn.Module, network), row.to(self.args.device)))
        total: Tensor = self.accelerator.reduce(torch.stack(shares).sum(0), reduction="sum")
        return total

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
            if self.args.world_size > 1 or self._limits.was_halved or not batch.units:
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
                loss = self._anchored(output.loss * self.args.world_size, model, is_last=is_last)
            result.loss += loss.detach()
            if is_deepspeed and is_last:  # its `backward` also takes the optimizer step
                self._check_finite(result.loss, None)
            self.accelerator.backward(loss, **({"scale_wrt_gas": False} if is_deepspeed else {}))
        result.metrics.append(output.metrics)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the gradient norm; transformers calls this just before the optimizer step.

        Raises:
            LlavaError: the loss or the gradient norm is not finite on some rank.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        # In fp16 the loss scaler skips a step whose gradients overflow and lowers its scale; what is not finite at a
        # scale below 1 never will be.
        scaler = self.accelerator.scaler
        skips = self.args.fp16 and (scaler is None or scaler.get_scale() >= 1.0)
        self._check_finite(self._step_loss, None if skips else norm)
        return norm

    def _check_finite(self, loss: Tensor, norm: Any) -> None:
        dataset, rows = self.collator.dataset, self._step_rows
        check_finite(loss, norm, step=self.state.global_step + 1, rows=lambda: dataset.label_rows(rows))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the trained part, for a checkpoint or at the end.

        Raises:
            LlavaError: a trained weight is not finite on some rank; nothing is written or removed.
        """
        check_finite_weights(cast(nn.Module, self.model), f"step {self.state.global_step}")
        if not self.leaves_shards:
            super().save_model(output_dir, _internal_call)
        elif not _internal_call:  # a checkpoint has the shards
            self._save(output_dir, self.whole_weights())

    def _run_epoch(self, *args: Any, **keywords: Any) -> None:
        """Run an epoch unless the run was resumed at its last step; transformers would train one more."""
        self.control.should_training_stop |= self.state.global_step >= self.state.max_steps
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **keywords)  # type: ignore[no-untyped-call]

    def _anchored(self, loss: Tensor, model: nn.Module, *, is_last: bool) -> Tensor:
        """Return the loss, connected to every trained weight where its own graph does not suffice."""
        # A row without images does not reach projector and tower. DDP waits for the gradient of each weight.
        waits = is_last and isinstance(model, nn.parallel.DistributedDataParallel)
        if loss.requires_grad and not waits:
            return loss
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return loss + torch.stack([parameter.sum() for parameter in trained]).sum() * 0.0

    def _fill_gradients(self, model: nn.Module) -> None:
        """Set the gradient of unused trained weights to zero."""
        # Several ranks do so (see `_anchored`), and without gradients the optimizer would not update momentum.
        if self.args.world_size > 1:
            return
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

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
        rows = self.collator.rows(batch.units, batch.images, self._limits.max_tokens_per_row)
        return StepBatch(batch.units, batch.images, rows, batch.row_ids)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer with one group per part and weight decay, each with its learning rate."""
        if self.optimizer is None:
            network = model if model is not None else self.model
            assert network is not None
            decaying = set(self.get_decay_parameter_names(network))
            optimizer_class, keywords = self.get_optimizer_cls_and_kwargs(self.args, None)
            self.optimizer = optimizer_class(parameter_groups(network, decaying, self.rates), **keywords)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the schedule of learning rates, in which `steps_per_rate` optimizer steps count as one."""
        every = self.rates.steps_per_rate
        scheduler: Any = super().create_scheduler(math.ceil(num_training_steps / every), optimizer)
        if every > 1 and hasattr(scheduler, "lr_lambdas"):
            scheduler.lr_lambdas = [partial(_held, rate, every) for rate in scheduler.lr_lambdas]
        return scheduler

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Validate on held-out rows and log the metrics."""
        if self.hooks.validate is None:
            return {}
        assert self.model is not None
        metrics = self.hooks.validate(self.model_wrapped if self.is_sharded else self.model)
        if not math.isfinite(loss := metrics.get("eval_loss", 0.0)):  # equal on all ranks
            raise LlavaError(
                f"step {self.state.global_step}: the validation loss is {loss}; expected a finite value. Saved "
                "checkpoints are kept. Lower --learning-rate, or check the rows of --eval-data-path"
            )
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
            if self.hooks.before_write is not None:
                self.hooks.before_write()
            self.hooks.save(output_dir or self.args.output_dir, state_dict)

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the random state and the losses since the last log."""
        # A run that resumes between two logs then logs the same losses as an uninterrupted one.
        super()._save_rng_state(output_dir)
        since = {
            "sum": self._tr_loss.item(),
            "last_logged": self._globalstep_last_logged,
            "ranks": self.args.world_size,
            "metrics": {name: pair.tolist() for name, pair in self.counts.metrics.items()},
        }
        write_json(Path(output_dir) / WINDOW_FILE.format(self.args.process_index), since)
        self.loader.save(Path(output_dir))
        self.accelerator.wait_for_everyone()  # the state file comes next, and says that every rank has written

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore what `_save_rng_state` saved; with another number of ranks, without the losses."""
        super()._load_rng_state(checkpoint)
        path = Path(checkpoint or "") / WINDOW_FILE.format(self.args.process_index)
        with restoring(checkpoint, "the losses since the last log", [path.name]):
            since = json.loads(path.read_text(encoding="utf-8")) if checkpoint and path.is_file() else {}
            if since.get("ranks") == self.args.world_size:
                self._tr_loss += since["sum"]
                self._globalstep_last_logged = since["last_logged"]
                self.counts.add_metrics({name: torch.tensor(pair) for name, pair in since.get("metrics", {}).items()})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        self.hooks.restore(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_sharded:
            if self.hooks.may_load:
                self.hooks.may_load(str(self.state.best_model_checkpoint))
            super()._load_best_model()
            return
        assert self.state.best_model_checkpoint is not None
        logger.info("loading the best checkpoint, %s", self.state.best_model_checkpoint)
        self._load_from_checkpoint(self.state.best_model_checkpoint, self.model)
