"""Report what is wrong with a checkpoint, and how to fix it (`llava checkpoint doctor`).

Names, shapes and settings are checked without torch; `--weights` also reads every value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llava.errors import CheckpointError
from llava.model.checkpoint.formats import KINDS, Checkpoint, our_name
from llava.model.checkpoint.legacy.checks import legacy_refusals
from llava.model.checkpoint.legacy_keys import unknown_keys
from llava.model.checkpoint.peft_files import hf_adapter_refusals
from llava.model.checkpoint.plugged import absent_plugins, absent_text
from llava.model.checkpoint.tools.adapter_notes import adapter_notes, base_problems
from llava.model.checkpoint.tools.inspection import PROBLEMS, Inspection, added_tokens, inspect_checkpoint
from llava.model.checkpoint.weight_names import EMBEDDINGS, PROJECTOR
from llava.utils.cli import Parser
from llava.utils.faults import sensible
from llava.utils.plugins import add_plugin_option
from llava.utils.terminal import visible, write_out


@dataclass(frozen=True, slots=True)
class DoctorFinding:
    """Result of a check: an `error` keeps the checkpoint from loading as trained, a `note` does not."""

    level: str
    text: str


def find_problems(inspection: Inspection) -> Iterator[DoctorFinding]:
    """Yield the findings from names, shapes and settings."""
    checkpoint = inspection.checkpoint
    missing = absent_plugins(checkpoint)
    if missing:
        yield DoctorFinding("error", absent_text(missing))
    for status in PROBLEMS:
        rows = [row for row in inspection.rows if row.status == status]
        if rows:
            some = ", ".join((row.name or row.ours) + f" {row.shape}" for row in rows[:3])
            yield DoctorFinding("error", f"{len(rows)} tensors are {status}: {some}; see `llava checkpoint inspect`")
    if checkpoint.kind in ("vision_tower", "language_model", "tower_adapter"):
        yield DoctorFinding("note", f"this is {KINDS[checkpoint.kind]}, only a part of a model")
    if checkpoint.kind.startswith("legacy"):
        yield from _legacy_findings(checkpoint)
    if checkpoint.kind == "hf_adapter":
        yield from _hf_adapter_findings(checkpoint)


def _hf_adapter_findings(checkpoint: Checkpoint) -> Iterator[DoctorFinding]:
    yield from (DoctorFinding("error", reason) for reason in hf_adapter_refusals(checkpoint))
    yield from (DoctorFinding("error", reason) for reason in base_problems(checkpoint))
    yield from (DoctorFinding("note", text) for text in adapter_notes(checkpoint))
    base = checkpoint.adapter.get("base_model_name_or_path")
    place = "pass it with --model-base" if base is None or not Path(base).is_dir() else "which is a folder here"
    yield DoctorFinding("note", f"builds on the transformers' Llava {base!r}; {place}")


def _legacy_findings(checkpoint: Checkpoint) -> Iterator[DoctorFinding]:
    config = checkpoint.config
    yield from (DoctorFinding("error", reason) for reason in legacy_refusals(checkpoint))
    yield from _projector_findings(checkpoint)
    yield from _token_findings(checkpoint)
    if checkpoint.has_tower:
        yield DoctorFinding(
            "note", "its vision tower is inside and is used; the original loaders download a stock one instead"
        )
    elif checkpoint.kind == "legacy":
        tower = config.get("mm_vision_tower")
        known = tower is not None and (Path(tower).is_dir() or (checkpoint.folder / tower).is_dir() or "/" in tower)
        if not known and not config.get("mm_vision_tower_checkpoint"):
            yield DoctorFinding(
                "error", f"its vision tower {tower!r} is not inside and not a folder here; pass it with --vision-tower"
            )
    if checkpoint.kind != "legacy":
        base = checkpoint.adapter.get("base_model_name_or_path") or config.get("_name_or_path")
        yield DoctorFinding(
            "note", f"builds on the language model {base!r}; if that is not a folder here, pass it with --model-base"
        )
    elif not checkpoint.has_tokenizer:
        yield DoctorFinding("error", "it has no tokenizer; pass the model it was trained from with --model-base")
    if checkpoint.kind == "legacy_adapter" and not checkpoint.extra:
        yield DoctorFinding("error", "it has no non_lora_trainables.bin: the projector it was trained with is missing")
    if config.get("model_type") == "llama":
        yield DoctorFinding(
            "note", "config.json says 'llama', though this is a LLaVA model; it is recognized by its mm_ keys"
        )
    if unknown := unknown_keys(config):
        yield DoctorFinding("note", f"unknown keys, kept: {', '.join(unknown)}")


def _projector_findings(checkpoint: Checkpoint) -> Iterator[DoctorFinding]:
    try:
        by_weights = checkpoint.projector_type
    except CheckpointError:  # `legacy_refusals` reports it
        return
    written = checkpoint.config.get("mm_projector_type")
    if written and by_weights and written != by_weights:
        yield DoctorFinding(
            "note", f"config.json says projector {written!r}, the weights are {by_weights!r}; the weights are used"
        )
    width = checkpoint.config.get("mm_hidden_size")
    first = next((e for n, e in checkpoint.tensors.items() if _is_first(checkpoint, n) and len(e.shape) == 2), None)
    if width and first and first.shape[1] != width:
        yield DoctorFinding(
            "error", f"the projector takes features of width {first.shape[1]}, mm_hidden_size is {width}"
        )


def _is_first(checkpoint: Checkpoint, name: str) -> bool:
    return (our_name(checkpoint, name) or "") in (f"{PROJECTOR}weight", f"{PROJECTOR}0.weight")


def _token_findings(checkpoint: Checkpoint) -> Iterator[DoctorFinding]:
    table = next((e for n, e in checkpoint.tensors.items() if our_name(checkpoint, n) == EMBEDDINGS), None)
    if table is None:
        return
    rows = table.shape[0]
    if beyond := [f"{word} ({row})" for word, row in added_tokens(checkpoint).items() if row >= rows]:
        yield DoctorFinding(
            "note", f"{rows} embedding rows, but tokens beyond: {', '.join(beyond)}; rows are added, each the mean"
        )
    size = checkpoint.config.get("vocab_size")
    if size not in (None, rows):
        yield DoctorFinding("note", f"vocab_size is {size}, but the table has {rows} rows; the table is used")


def check_weights(checkpoint: Checkpoint) -> Iterator[DoctorFinding]:
    """Read every tensor, and yield findings for values that are not finite and for tensors of zeros."""
    from llava.model.checkpoint.finite import is_finite, stored_tensors

    for name, tensor in stored_tensors(checkpoint):
        if tensor.is_floating_point() and not is_finite(tensor):
            yield DoctorFinding("error", f"{name} holds values that are not finite")
        elif tensor.numel() and not bool(tensor.any()) and not name.endswith((".bias", "lora_B.weight", "sim_beta")):
            yield DoctorFinding("note", f"{name} is all zeros")


def main(argv: Sequence[str] | None = None) -> None:
    """Run `llava checkpoint doctor`; the exit status is 1 if a finding is an error."""
    parser = Parser(
        prog="llava checkpoint doctor", description="Check a checkpoint for errors; exit status 1 if it has any."
    )
    parser.add_argument("path", help="checkpoint folder, weight file or hub name")
    parser.add_switch("--weights", help="also read every weight, for values that are not finite")
    add_plugin_option(parser)
    args = parser.parse_args(argv)
    with sensible(args.path, "inspected"):
        inspection = inspect_checkpoint(args.path)
        found = [*find_problems(inspection), *(check_weights(inspection.checkpoint) if args.weights else ())]
    lines = [f"{args.path}: {KINDS[inspection.checkpoint.kind]}", *(f"{one.level}: {one.text}" for one in found)]
    write_out("".join(f"{visible(line)}\n" for line in lines))
    if any(finding.level == "error" for finding in found):
        raise SystemExit(1)
    write_out("nothing keeps it from loading\n")
