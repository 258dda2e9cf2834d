"""Start of a run: defaults of a new model, claim on its folder, records, and whether it has ended."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from llava.data.loader import Loader
from llava.errors import CheckpointError
from llava.model import lora
from llava.model.projector_types import find_type
from llava.train import checkpointing
from llava.train.args import LlavaTrainingArguments
from llava.train.defaults import Defaults
from llava.train.model import find_checkpoint
from llava.train.parsed import Parsed
from llava.train.ranks import checked_together
from llava.train.specs import FoundModel
from llava.train.trust import check_mark
from llava.utils.config_file import config_text
from llava.utils.files import Claim, exclusive_folder
from llava.utils.jsonl import write_atomic
from llava.utils.plugins import recorded_names

logger = logging.getLogger(__name__)

RESOLVED_FILE = "resolved.yaml"
"""Options of a run that was started with `llava train`; the file is a configuration file of that command."""


def with_new_model(parsed: Parsed, defaults: Defaults) -> Parsed:
    """Return the arguments with a new model's defaults if `--model-name-or-path` is no llava checkpoint.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    model, data = parsed.model, parsed.data
    found = FoundModel(find_checkpoint(model.model_name_or_path))
    is_new = found.checkpoint is None
    kind = model.mm_projector_type or (defaults.projector_type if is_new else "linear")
    fits = defaults.calibrates and is_new and not model.pretrain_mm_mlp_adapter and can_calibrate(kind)
    mode = data.image_aspect_ratio or (defaults.image_mode if is_new else None)
    by_default = model.calibrate_mm_projector is None and fits
    model = replace(
        model,
        mm_projector_type=kind,
        version=model.version or (defaults.template if is_new else None),
        calibrate_mm_projector=by_default or bool(model.calibrate_mm_projector),
    )
    training = parsed.training.changed(calibrates_by_default=by_default)
    return parsed._replace(model=model, data=replace(data, image_aspect_ratio=mode), training=training, found=found)


def can_calibrate(projector: str) -> bool:
    """Return whether a projector type is a sequence of linear layers."""
    kind = find_type(projector)
    return kind is not None and kind.fits_calibration


@contextmanager
def own_folder(args: LlavaTrainingArguments) -> Iterator[Claim | None]:
    """Claim the output folder inside the block, on ranks that write into it.

    Raises:
        ConfigError: another run writes into it; every rank raises.
    """
    with ExitStack() as stack:
        taken: list[Claim] = []

        def take() -> None:
            taken.append(stack.enter_context(exclusive_folder(args.run_folder, option="--output-dir")))

        checked_together(take, here=args.should_save and not args.dry_run)
        yield taken[0] if taken else None


def check_trusted(args: LlavaTrainingArguments, checkpoint: str) -> None:
    """Check that this user wrote a checkpoint on this machine, since its loaders unpickle.

    Raises:
        LlavaError: it was written elsewhere, has changed since, or was not written with DeepSpeed; every rank raises.
    """
    if args.deepspeed and not any(Path(checkpoint).glob("global_step*")):
        raise CheckpointError(
            f"{checkpoint} was written without --deepspeed; resume it without, or choose another --output-dir"
        )
    here = args.local_process_index == 0 and not args.trust_checkpoint
    checked_together(lambda: check_mark(Path(checkpoint)), here=here)


def num_steps(args: LlavaTrainingArguments, loader: Loader) -> int:
    """Return the number of optimizer steps of a whole run."""
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * len(loader))


def write_start(
    parsed: Parsed, provenance: Mapping[str, Any], network: nn.Module, given: Mapping[str, Any] | None
) -> None:
    """Log what the run will do and write it to the run folder; `given` are the options of `llava train`."""
    report = lora.trainable_report(network)
    facts = [provenance[name] for name in ("order", "layout", "image_grouping")]
    logger.info("%s, layout %s, image grouping %s\n%s", *facts, report)
    checkpointing.write_start(
        parsed.training.resume_spec(),
        parsed.provenance_spec(),
        arguments=parsed.resolved(),
        provenance=provenance,
        report=report,
    )
    if given is not None:
        write_atomic(parsed.training.run_folder / RESOLVED_FILE, resolved_text(parsed, given))


def resolved_text(parsed: Parsed, given: Mapping[str, Any]) -> str:
    """Return the given options, and the values of those that a default decided, as a configuration file."""
    model = parsed.model
    decided = {
        "version": model.version,
        "mm_projector_type": model.mm_projector_type,
        "image_aspect_ratio": parsed.data.image_aspect_ratio,
        "bf16": parsed.training.bf16,
    }
    values = {name: value for name, value in {**decided, **given}.items() if value is not None and value != "auto"}
    if model.plugin:
        values["plugin"] = recorded_names(model.plugin)
    values |= {"bf16": parsed.training.bf16} if not parsed.training.fp16 else {}
    return config_text(values, comment="options of this run; `llava train resolved.yaml` repeats it")


def is_finished(args: LlavaTrainingArguments, provenance: Mapping[str, Any], *, total_steps: int) -> bool:
    """Return whether the same run has ended in the output folder; log it if so."""
    patience = args.early_stopping_patience
    step = checkpointing.finished_step(args.resume_spec(), provenance, total_steps=total_steps, patience=patience)
    if step is not None:
        logger.info(
            "%s: the run is finished (step %d of %d), so nothing is trained or written; to continue, raise "
            "--num-train-epochs or --max-steps, and to start over, use --overwrite-output-dir",
            args.run_folder,
            step,
            total_steps,
        )
    return step is not None
