"""Checkpoint on SIGTERM (`--save-on-signal`): clusters send it some time before they end a job."""

from __future__ import annotations

import logging
import signal
import threading
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

STOPPED = 143
"""Exit status of a run that saved a checkpoint and stopped because of SIGTERM, as shells report that signal."""


class StoppedBySignal(Exception):
    """End of training after SIGTERM; the checkpoint of this step is complete.

    Attributes:
        step: number of finished optimizer steps.
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step


class SaveOnSignal(TrainerCallback):
    """Callback that saves a checkpoint after the step in which a rank received SIGTERM, then stops."""

    def __init__(self) -> None:
        self._received = False
        self._is_saving = False
        self._before: Any = signal.SIG_DFL

    def _receive(self, number: int, frame: Any) -> None:
        self._received = True

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start to listen."""
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            self._before = signal.signal(signal.SIGTERM, self._receive)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Request a checkpoint, without a validation first, if any rank has received the signal."""
        self._request(args, state, control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Request a checkpoint if the signal came during a validation."""
        self._request(args, state, control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Request a checkpoint if the signal came at the end of an epoch."""
        self._request(args, state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop after the checkpoint.

        Raises:
            StoppedBySignal: always, if the checkpoint was requested by the signal.
        """
        if self._is_saving:
            self._stop_listening()
            raise StoppedBySignal(state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop listening."""
        self._stop_listening()

    def _request(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """Ask all ranks whether one has received the signal; a collective operation."""
        received = torch.tensor(float(self._received), device=args.device)
        if dist.is_initialized():
            dist.all_reduce(received, op=dist.ReduceOp.MAX)
        if received.item() and not self._is_saving:
            logger.warning("SIGTERM: saving a checkpoint at step %d", state.global_step)
            self._is_saving = True
        if self._is_saving:
            control.should_save, control.should_evaluate = True, False

    def _stop_listening(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before)
