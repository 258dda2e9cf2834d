"""The run folder: what was asked, what was trained, and whether an earlier run can go on."""

from __future__ import annotations

import json
import logging
import re
import shlex
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from llava.errors import ConfigError
from llava.train.parsing import Parsed
from llava.utils.jsonl import write_json
from llava.utils.provenance import file_sha256, git_commit, weights_sha256

logger = logging.getLogger(__name__)

ARGUMENTS_FILE = "resolved_arguments.json"
PROVENANCE_FILE = "provenance.json"
STATE_FILE = "trainer_state.json"

DECISIVE = ("data_sha256", "global_batch", "seed", "image_grouping", "order", "trains", "loss_normalization")
"""Facts that a run must share with the one it goes on from; another number of ranks is fine where the order allows."""


def describe(parsed: Parsed, layout: str, grouping: str, order: str, trains: str) -> dict[str, Any]:
    """Provenance of a run: data, what decides the order of rows, what is trained (projector, adapter, model), code."""
    model, data, training = parsed
    return {
        "data_path": data.data_path,
        "data_sha256": file_sha256(Path(data.data_path)),
        "model": model.model_name_or_path,
        "global_batch": training.global_batch,
        "seed": training.seed,
        "image_grouping": grouping,
        "order": order,
        "trains": trains,
        "loss_normalization": training.loss_normalization,
        "layout": layout,
        "git_commit": git_commit(),
    }


def write_start(parsed: Parsed, provenance: dict[str, Any], report: str) -> None:
    """Write arguments, provenance and the table of trained parameters."""
    model, data, training = parsed
    folder = training.run_folder
    if training.overwrite_output_dir:  # else a later resume would go on from the earlier run
        for checkpoint in folder.glob("checkpoint-*"):
            if re.fullmatch(r"checkpoint-\d+", checkpoint.name):
                shutil.rmtree(checkpoint)
    arguments = {
        "model": asdict(model),
        "data": asdict(data),
        "training": {**cast(Any, training).to_dict(), "gradient_accumulation_steps": training.requested_accumulation},
    }
    write_json(folder / ARGUMENTS_FILE, json.loads(json.dumps(arguments, default=str)))
    held_out = {"eval_data_sha256": file_sha256(data.eval_data_path)} if data.eval_data_path else {}
    start = {"model_sha256": weights_sha256(model.model_name_or_path), "command": shlex.join(sys.argv)}
    write_json(folder / PROVENANCE_FILE, {**provenance, **held_out, **start})
    (folder / "trainable_parameters.txt").write_text(report, encoding="utf-8")


def write_end(folder: Path) -> None:
    """Add the hash of the written weights to the provenance."""
    provenance = json.loads((folder / PROVENANCE_FILE).read_text(encoding="utf-8"))
    write_json(folder / PROVENANCE_FILE, {**provenance, "weights_sha256": weights_sha256(folder)})


def last_checkpoint(folder: Path) -> Path | None:
    """The newest `checkpoint-N` that was written to its end (its state file comes last), or None."""
    found = [
        (int(match[1]), path)
        for path in (folder.glob("checkpoint-*") if folder.is_dir() else [])
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and _is_whole(path)
    ]
    return max(found)[1] if found else None


def _is_whole(checkpoint: Path) -> bool:
    """The state file, which is written last, is there and not torn."""
    try:
        return bool(json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False


def checkpoint_to_resume(parsed: Parsed, provenance: dict[str, Any]) -> str | None:
    """The checkpoint this run goes on from.

    Raises:
        ConfigError: it was trained on other data or with another global batch, so its position in the data means
            nothing here.
    """
    training = parsed[2]
    wanted = training.resume_from_checkpoint
    if training.overwrite_output_dir or wanted in ("False", "false", False):
        return None
    explicit = Path(wanted) if isinstance(wanted, str) and wanted.lower() != "true" else None
    path = explicit or last_checkpoint(training.run_folder)
    if path is None:
        return None
    if not _is_whole(path):
        raise ConfigError(f"{path} cannot be resumed: it has no whole {STATE_FILE}, so it was not written to its end")
    earlier = path.parent / PROVENANCE_FILE
    if earlier.is_file():
        before = json.loads(earlier.read_text(encoding="utf-8"))
        for name in DECISIVE:
            if name in before and before[name] != provenance[name]:
                raise ConfigError(
                    f"{path} cannot be resumed: its run had {name} {before[name]!r}, "
                    f"this one {provenance[name]!r}; change it back, "
                    "choose another --output_dir, or start anew with --overwrite_output_dir"
                )
    logger.info("resuming from %s", path)
    return str(path)
