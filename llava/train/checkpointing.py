"""Run folder: arguments, provenance, saved weights, and resuming from a checkpoint."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import set_peft_model_state_dict
from torch import Tensor, nn

from llava.constants import ARGUMENTS_FILE
from llava.data.mixture import data_sha256
from llava.errors import CheckpointError, ConfigError
from llava.model.builder import LoadedModel
from llava.model.checkpoint.finite import check_finite
from llava.model.checkpoint.formats import ADAPTER_FILE, PROVENANCE_FILE, read_json
from llava.model.checkpoint.load_parts import check_adapter_names, load_extra, load_projector, read_tensors
from llava.model.checkpoint.save import save_adapter, save_model, save_projector
from llava.model.modeling import LlavaMedForConditionalGeneration
from llava.model.multimodal_encoder.towers import UNREADABLE, first_line
from llava.model.torch_files.archive import check_torch_weights
from llava.model.value_head import restore_value, save_value
from llava.train.specs import ProvenanceSpec, ResumeSpec
from llava.train.state_files import HOW_ON, STATE_FILE, check_state_files, checkpoints_of, drop_incomplete, is_whole
from llava.train.trainer import TrainerHooks
from llava.train.trust import has_mark
from llava.utils.cli import flag
from llava.utils.jsonl import write_json
from llava.utils.plugins import loaded_plugins
from llava.utils.provenance import git_commit, weights_sha256

logger = logging.getLogger(__name__)

DEFAULT_OUTPUT = "trainer_output"
"""Default output folder of transformers' `TrainingArguments`."""

DECISIVE = (
    "data_sha256", "model_sha256", "global_batch", "seed", "image_grouping", "order", "trains", "loss_normalization",
    "options", "plugins",
)  # fmt: skip
"""Provenance keys that must be equal to resume a run; the number of ranks may differ if the order allows it."""


def run_provenance(spec: ProvenanceSpec, *, layout: str, grouping: str, order: str, trains: str) -> dict[str, Any]:
    """Return the provenance of a run: data, order of rows, trained part, options and code."""
    return {
        "data_path": spec.data_path,
        "data_sha256": data_sha256(spec.data_path),
        "model": spec.model,
        "global_batch": spec.global_batch,
        "seed": spec.seed,
        "image_grouping": grouping,
        "order": order,
        "trains": trains,
        "loss_normalization": spec.loss_normalization,
        "precision": spec.precision,
        "model_sha256": weights_sha256(spec.model),
        "options": spec.options,
        "layout": layout,
        "plugins": loaded_plugins(),
        "git_commit": git_commit(),
    }


def write_start(
    resume: ResumeSpec,
    facts: ProvenanceSpec,
    *,
    arguments: Mapping[str, Any],
    provenance: Mapping[str, Any],
    report: str,
) -> None:
    """Write arguments, provenance and the table of trained parameters into the run folder."""
    folder = resume.folder
    if resume.starts_over:  # otherwise a later resume would continue the earlier run
        for checkpoint in checkpoints_of(folder).values():
            shutil.rmtree(checkpoint)
    drop_incomplete(folder)
    write_json(folder / ARGUMENTS_FILE, arguments)
    held_out = {"eval_data_sha256": data_sha256(facts.eval_data_path)} if facts.eval_data_path else {}
    write_json(folder / PROVENANCE_FILE, {**provenance, **held_out, "command": shlex.join(sys.argv)})
    (folder / "trainable_parameters.txt").write_text(report, encoding="utf-8")


def write_end(folder: Path) -> None:
    """Add the hash of the saved weights to the provenance."""
    provenance = json.loads((folder / PROVENANCE_FILE).read_text(encoding="utf-8"))
    write_json(folder / PROVENANCE_FILE, {**provenance, "weights_sha256": weights_sha256(folder)})


def last_checkpoint(folder: Path, *, needs_mark: bool = False) -> Path | None:
    """Return the newest complete `checkpoint-N`, or None.

    With `needs_mark` those without a mark come last: a sharded run that was killed while saving leaves one.
    """
    found = {step: path for step, path in checkpoints_of(folder).items() if is_whole(path)}
    marked = [step for step, path in found.items() if needs_mark and has_mark(path)]
    return found[max(marked or found)] if found else None


def bf16_to_resume(resume: ResumeSpec) -> bool | None:
    """Return whether the run to resume, or the finished one, trains in bfloat16; None without one."""
    if resume.starts_over:
        return None
    checkpoint = _named_checkpoint(resume)
    folder = resume.folder if checkpoint is None else checkpoint.parent
    if checkpoint is None and "weights_sha256" not in read_json(folder / PROVENANCE_FILE):
        return None
    training = read_json(folder / ARGUMENTS_FILE).get("training")
    chosen = training.get("bf16") if isinstance(training, dict) else None
    return chosen if isinstance(chosen, bool) else None


def _named_checkpoint(resume: ResumeSpec) -> Path | None:
    """Return the checkpoint that `--resume-from-checkpoint` names, else the last one of the output folder."""
    return _explicit_checkpoint(resume) or last_checkpoint(resume.folder, needs_mark=resume.needs_mark)


def _explicit_checkpoint(resume: ResumeSpec) -> Path | None:
    wanted = resume.checkpoint
    return Path(wanted) if isinstance(wanted, str) and wanted.lower() != "true" else None


def checkpoint_to_resume(resume: ResumeSpec, provenance: Mapping[str, Any]) -> str | None:
    """Return the checkpoint to resume from, or None.

    Raises:
        ConfigError: the checkpoint is incomplete, or its run had another model, other data or other options.
        CheckpointError: a file of it is broken.
    """
    path = None if resume.starts_over else _named_checkpoint(resume)
    if path is None:
        return None
    if not is_whole(path):
        raise ConfigError(f"{path} cannot be resumed: {STATE_FILE} is missing or incomplete; choose another checkpoint")
    earlier = path.parent / PROVENANCE_FILE
    if earlier.is_file():
        _refuse_another_run(path, json.loads(earlier.read_text(encoding="utf-8")), provenance)
    check_state_files(path)
    if (newer := last_checkpoint(resume.folder)) not in (None, path) and _explicit_checkpoint(resume) is None:
        logger.warning("%s is skipped: it has no mark, so it was probably killed while being written", newer)
    logger.info("resuming from %s", path)
    return str(path)


def _refuse_another_run(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if (found := _difference(before, now)) is not None:
        name, earlier, current = found
        raise ConfigError(
            f"{path} cannot be resumed: its run had {name} {earlier!r}, this run has {current!r}; "
            "change it back, choose another --output-dir, or start over with --overwrite-output-dir"
        )


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the first decisive fact that differs, with both values; None if two runs compute the same."""

    def flat(facts: Mapping[str, Any]) -> dict[str, Any]:
        plain = {name: facts[name] for name in DECISIVE if name in facts and name != "options"}
        return plain | {flag(name): value for name, value in facts.get("options", {}).items()}

    earlier, current = flat(before), flat(now)
    # Models and data first: they are the cause when options differ too.
    differing = (name for name in earlier if name in current and earlier[name] != current[name])
    return next(((name, earlier[name], current[name]) for name in differing), None)


def stopped_early(checkpoint: str | None, patience: int) -> int | None:
    """Return the step at which the run of a checkpoint stopped early, or None."""
    if checkpoint is None or not patience:
        return None
    state = read_json(Path(checkpoint) / STATE_FILE)
    callback = (state.get("stateful_callbacks") or {}).get("EarlyStoppingCallback") or {}
    waited = (callback.get("attributes") or {}).get("early_stopping_patience_counter", 0)
    return int(state["global_step"]) if waited >= patience else None


def finished_step(resume: ResumeSpec, provenance: Mapping[str, Any], *, total_steps: int, patience: int) -> int | None:
    """Return the last step of the output folder's run if this run would train and save nothing more.

    Args:
        resume: output folder, and where to resume from.
        provenance: provenance of this run.
        total_steps: number of optimizer steps that it would train from the start.
        patience: its `--early-stopping-patience`.
    """
    folder = resume.folder
    earlier, step = read_json(folder / PROVENANCE_FILE), read_json(folder / STATE_FILE).get("global_step")
    if resume.starts_over or not isinstance(step, int) or _difference(earlier, provenance) is not None:
        return None
    explicit = _explicit_checkpoint(resume)
    if explicit is not None and explicit.parent.resolve() == folder.resolve():  # an earlier one trains its steps again
        step = read_json(explicit / STATE_FILE).get("global_step", 0)
    is_over = step >= total_steps or stopped_early(str(folder), patience) is not None
    # The hash is written last, and again only if the weights were not changed since.
    return step if is_over and earlier.get("weights_sha256") == weights_sha256(folder) is not None else None


Kind = Literal["projector", "adapter", "model"]

SAVERS: dict[Kind, Callable[..., None]] = {
    "projector": save_projector,
    "adapter": save_adapter,
    "model": save_model,
}


def hooks_for(
    kind: Kind,
    model: nn.Module,
    loaded: LoadedModel,
    **others: Any,
) -> TrainerHooks:
    """Return the hooks for the trained part; `others` are further fields of `TrainerHooks`."""

    def save(path: str, state: dict[str, Tensor] | None) -> None:
        SAVERS[kind](model, loaded.processor, path, state=state, origin=loaded.origin)

    def restore(path: str) -> None:
        if kind == "projector":
            load_projector(model, path)
        elif kind == "adapter":
            restore_adapter(model, Path(path))
        else:
            _restore_model(model, path)
        check_finite(model.named_parameters(), path)

    return TrainerHooks(save=save, restore=restore, **others)


def with_value(hooks: TrainerHooks, weights: Mapping[str, Tensor]) -> TrainerHooks:
    """Return hooks that save and restore the weights of a value model, by name, beside the trained part."""

    def save(path: str, state: dict[str, Tensor] | None) -> None:
        hooks.save(path, state)
        save_value(weights, path)

    def restore(path: str) -> None:
        hooks.restore(path)
        restore_value(weights, path)

    return replace(hooks, save=save, restore=restore)


def restore_adapter(model: nn.Module, path: Path) -> None:
    """Load a saved adapter, and the weights saved with it, into the adapter of `model`.

    Raises:
        CheckpointError: a file is broken, or its weights are not exactly those of this adapter.
    """
    file = path / ADAPTER_FILE
    weights = read_tensors(file)
    check_adapter_names(model, weights, file)
    try:
        result: Any = set_peft_model_state_dict(model, weights)
    except UNREADABLE as error:
        raise CheckpointError(f"{file}: the adapter does not fit the model: {first_line(error)}") from error
    # Weights outside the adapter are always reported missing; weights of the adapter must not be.
    if wrong := sorted({name for name in result.missing_keys if "lora_" in name} | set(result.unexpected_keys)):
        raise CheckpointError(f"{file}: peft could not load {len(wrong)} weights of the adapter, such as {wrong[0]}")
    load_extra(model, path)


def _restore_model(model: nn.Module, path: str) -> None:
    """Load the weights of a saved model into `model`."""
    # transformers maps the names of saved weights to those of the modules.
    dtype = next(model.parameters()).dtype
    check_torch_weights(Path(path))
    try:
        saved = cast(Any, LlavaMedForConditionalGeneration).from_pretrained(path, dtype=dtype)
        with torch.no_grad():
            model.load_state_dict(saved.state_dict())
    except UNREADABLE as error:
        raise CheckpointError(f"{path}: the weights cannot be restored: {first_line(error)}; {HOW_ON}") from error
