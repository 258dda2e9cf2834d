"""Trainer state files of a checkpoint: checked, restored with one-line errors, written atomically."""

from __future__ import annotations

import pickle
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainerState
from transformers.trainer_utils import rotate_checkpoints

from llava.errors import CheckpointError, LlavaError
from llava.model.checkpoint.formats import read_json
from llava.model.torch_files.archive import check_torch_file
from llava.model.torch_files.loading import MORE_THAN_TENSORS, load_torch_file
from llava.train.trust import write_mark

STATE_FILE = "trainer_state.json"
OPTIMIZER_FILES = ("optimizer.pt", "scheduler.pt")
SCALER_FILE = "scaler.pt"
RANDOM_PATTERN = "rng_state*.pth"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
HOW_ON = "remove this checkpoint to resume from an earlier one, or start over with --overwrite-output-dir"


def is_whole(checkpoint: Path) -> bool:
    """Return whether the state file, which is written last, exists and is complete."""
    try:
        return isinstance(read_json(checkpoint / STATE_FILE).get("global_step"), int)
    except CheckpointError:
        return False


def checkpoints_of(folder: Path) -> dict[int, Path]:
    """Return the folders `checkpoint-N` of a run by step, complete or not."""
    found = folder.glob("checkpoint-*") if folder.is_dir() else ()
    return {int(match[1]): path for path in sorted(found) if (match := CHECKPOINT_NAME.fullmatch(path.name))}


def check_state_files(checkpoint: Path) -> None:
    """Check the files that transformers reads when it resumes, before anything is written or trained.

    Raises:
        CheckpointError: a file is broken, or exceeds a bound of torch files.
    """
    try:
        TrainerState.load_from_json(str(checkpoint / STATE_FILE))
    except Exception as error:  # an unknown key, a value of another type
        reason = _reason(error)
        raise CheckpointError(f"{checkpoint / STATE_FILE} cannot be restored ({reason}); {HOW_ON}") from error
    names = (*OPTIMIZER_FILES, SCALER_FILE)
    for file in (*(checkpoint / name for name in names), *sorted(checkpoint.glob(RANDOM_PATTERN))):
        if file.is_file():
            try:
                check_torch_file(file)
            except CheckpointError as error:
                raise CheckpointError(f"{error}; {HOW_ON}") from error


@contextmanager
def restoring(checkpoint: str | None, what: str, names: Sequence[str]) -> Iterator[None]:
    """Turn every error of the block into one line.

    Args:
        checkpoint: the folder that is read.
        what: what is restored.
        names: the files that are read, to name the one at fault.

    Raises:
        CheckpointError: `what` cannot be restored.
    """
    try:
        yield
    except LlavaError:
        raise
    except Exception as error:
        folder = Path(checkpoint or "")
        files = [folder / name for name in names if (folder / name).is_file()]
        broken = [file.name for file in files if not _is_readable(file)] or names
        raise CheckpointError(
            f"{folder}: {what} ({', '.join(broken)}) cannot be restored ({_reason(error)}); {HOW_ON}"
        ) from error


def _is_readable(file: Path) -> bool:
    try:
        load_torch_file(file, mmap=True)
    except CheckpointError:
        return False
    return True


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):  # torch's message advises to run the code in the file
        return f"it {MORE_THAN_TENSORS}"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


@contextmanager
def whole_or_removed(checkpoint: Path) -> Iterator[None]:
    """Remove a checkpoint left incomplete by an error in the block, such as a full disk."""
    try:
        yield
    except BaseException:
        if not is_whole(checkpoint):
            shutil.rmtree(checkpoint, ignore_errors=True)
        raise


def drop_incomplete(folder: Path) -> None:
    """Remove what a killed run left in its folder: incomplete checkpoints and temporary files."""
    for checkpoint in checkpoints_of(folder).values():
        if not is_whole(checkpoint):
            shutil.rmtree(checkpoint)
    for place in (folder, *checkpoints_of(folder).values()):
        for left in place.glob(".saving-*"):
            shutil.rmtree(left)
        for left in place.glob(".*.tmp"):
            left.unlink()


class CheckpointTrainer(Trainer):
    """transformers' Trainer whose checkpoints are whole or not there, and restored or refused in one line."""

    @property
    def is_sharded(self) -> bool:
        """Whether weights or optimizer state are sharded, so that all ranks must run the same modules."""
        return bool(self.is_deepspeed_enabled or self.is_fsdp_enabled)

    @property
    def leaves_shards(self) -> bool:
        """Whether transformers would save shards, but no weights that a model can be loaded from."""
        if self.is_fsdp_enabled:
            return "FULL" not in str(self.accelerator.state.fsdp_plugin.state_dict_type)
        if not self.is_deepspeed_enabled or isinstance(self.model, PeftModel):  # adapters are always gathered
            return False
        engine: Any = self.model_wrapped
        return bool(engine.zero_optimization_stage() == 3 and not engine.zero_gather_16bit_weights_on_model_save())

    def whole_weights(self) -> dict[str, Tensor]:
        """Return the weights gathered from all ranks; empty on ranks that do not save.

        This is a collective operation.
        """
        if self.is_fsdp_enabled:
            return dict(self.accelerator.get_state_dict(self.model))
        engine: Any = self.model_wrapped
        return dict(engine._zero3_consolidated_16bit_state_dict() or {})

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint in place of an earlier one of this step; mark one that sharded loaders will read."""
        args: Any = self.args
        folder = Path(self._get_output_dir(trial))
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        if (
            args.should_save and checkpoint.is_dir()
        ):  # otherwise a kill would leave a mix of two checkpoints that looks complete
            shutil.rmtree(checkpoint)
        self.accelerator.wait_for_everyone()
        if self.is_sharded:
            self.args = args.changed(save_total_limit=None)
        try:
            with whole_or_removed(checkpoint) if args.should_save else nullcontext():
                super()._save_checkpoint(model, trial)
        finally:
            self.args = args
        if self.is_sharded:
            self._mark(checkpoint)

    def _mark(self, checkpoint: Path) -> None:
        """Mark a checkpoint that all ranks have written, then remove the earlier ones that are too many."""
        # In this order a kill at any moment leaves a marked checkpoint.
        self.accelerator.wait_for_everyone()
        if self.args.local_process_index == 0:
            write_mark(checkpoint)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            best, limit = self.state.best_model_checkpoint, self.args.save_total_limit
            rotate_checkpoints(str(checkpoint.parent), limit, best, use_mtime=True)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with restoring(checkpoint, "the optimizer state", OPTIMIZER_FILES):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with restoring(checkpoint, "the state of the loss scaler", [SCALER_FILE]):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with restoring(checkpoint, "the random state", [RANDOM_PATTERN]):
            super()._load_rng_state(checkpoint)
