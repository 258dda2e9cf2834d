"""Help of `llava train`, from the table of options: a short form by groups, and every option in full."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from llava.train.defaults import PUBLISHED, TODAY, Defaults
from llava.train.option_table import ALIASES, GROUPS, LAUNCHER, OptionRow, read_table

WIDTH = 118
COLUMN = 38
"""Width of a line, and of the column of options."""

NEW_MODEL = ("--version", "--image-aspect-ratio", "--mm-projector-type", "--calibrate-mm-projector")
"""Options whose default applies to a new model; a checkpoint keeps its own values."""

BRIEF = {
    "--version": "conversation template: a name, FILE.jinja, or auto",
    "--mm-projector-type": "linear, mlpKx_gelu, cluster or identity",
    "--calibrate-mm-projector": "start the projector at the scale of the word embeddings",
    "--model-max-length": "longest sequence in tokens, images included",
    "--loader": "layout of the rows, or a selection of LLaVA-Rad's files",
    "--image-grouping": "group the questions about an image: on, off or auto",
    "--dicom-window": "window of gray DICOM images: file, full, CENTER,WIDTH or a preset such as lung",
    "--fast-jpeg": "decode large JPEG images at a lower resolution: faster, slightly other pixels",
    "--lora-target-modules": "layers to adapt, such as q_proj v_proj; default: all linear layers",
    "--modules-to-save": "modules trained in full beside the adapter: embed_tokens, lm_head",
    "--num-train-epochs": "passes over the rows",
    "--max-steps": "optimizer steps, instead of --num-train-epochs; -1: not set",
    "--per-device-train-batch-size": "rows in a forward and backward pass of one device",
    "--gradient-accumulation-steps": "such passes in an optimizer step",
    "--learning-rate": "largest learning rate",
    "--lr-scheduler-type": "linear, cosine, constant and others of transformers",
    "--warmup-steps": "steps in which the rate rises from 0; below 1: share of all steps",
    "--weight-decay": "weight decay, not of biases and norms",
    "--max-grad-norm": "largest norm of the gradient; 0: no limit",
    "--optim": "optimizer, as transformers names it",
    "--bf16": "bfloat16 where it is faster (measured), or True, False",
    "--gradient-checkpointing": "compute activations again in the backward pass: less memory, slower",
    "--max-tokens-per-row": "most tokens in a forward pass; the loss stays the same",
    "--seed": "seed of weights, row order and dropout",
    "--objective": "sft, dpo (pairs of answers), reward; grpo, rloo, ppo (rules)",
    "--pref-loss": "losses of a pair, added: sigmoid (DPO), ipo, hinge, simpo, orpo, sft ... or kto",
    "--ref-mode": "reference: cached, adapter_off, copy or none",
    "--styles": "orders of the questions, such as standard shuffled; default: the rule file's",
    "--output-dir": "folder of the model, its checkpoints, metrics and page",
    "--resume-from-checkpoint": "checkpoint to continue from; default: the newest one in --output-dir",
    "--log-lines": "log about this many times in the run; 0: by --logging-steps",
    "--logging-steps": "log every N steps, with --log-lines 0",
    "--report-to": "also log to wandb, tensorboard or trackio; several at once",
    "--run-name": "name of the run in these",
    "--save-strategy": "when to save a checkpoint: no, epoch, steps or best",
    "--save-steps": "save a checkpoint every N steps; below 1: share of all steps",
    "--save-total-limit": "keep this many checkpoints and delete older ones",
    "--eval-strategy": "when to validate on --eval-data-path: no, steps or epoch",
    "--eval-answers": "held-out questions answered at each validation; 0: loss only",
    "--save-on-signal": "on SIGTERM, save a checkpoint and stop with status 143; rerun to resume",
    "--deepspeed": "DeepSpeed configuration, a JSON file",
    "--fsdp": "shard the model over the processes with PyTorch FSDP",
    "--fsdp-config": "settings of FSDP, a JSON file",
    "--dataloader-num-workers": "processes that read rows and images; 0: none",
}
"""Texts of the short form for options whose help is long, or is that of transformers."""

METAVARS = {"int": "N", "float": "X", "bool": "BOOL", "str": "TEXT", "off": ""}

USAGE = """usage: {command} [--OPTION VALUE ...]

A new model needs --model-name-or-path LM --vision-tower TOWER --data-path ROWS; a llava checkpoint needs no tower.
A prefix of an option is enough. {note}
"""

FILE_NOTE = "FILE.yaml holds options (`learning_rate: 2e-5`); the command line wins."
"""Help text about configuration files, which only `llava train` accepts."""

PUBLISHED_NOTE = """For several processes: torchrun --nproc_per_node=8 llava/train/{name} ...

example: python llava/train/{name} {example} \\
    --image-folder images --output-dir runs/first"""
"""Text at the same place in the help of a published script."""


def help_text(command: str = "llava train", *, example: str = "", full: bool = False) -> str:
    """Return the help: the options that most runs use, or all of them with the published names.

    Args:
        command: `llava train`, or the name of a published script, which has other defaults and no launcher.
        example: options of an example of a published script.
        full: whether all options are shown.
    """
    is_today = command == "llava train"
    rows = [row for row in read_table() if is_today or row not in LAUNCHER]
    defaults = TODAY if is_today else PUBLISHED
    usage = (
        {"command": f"{command} [FILE.yaml]", "note": FILE_NOTE}
        if is_today
        else {"command": command, "note": PUBLISHED_NOTE.format(name=command, example=example)}
    )
    lines = [USAGE.format(**usage)]
    for group, names in GROUPS.items():
        members = _ordered([row for row in rows if row.group == group and (full or row.is_listed)], names)
        if not members:
            continue
        lines.append(f"{group}:")
        for row in members:
            lines += _full(row, defaults) if full else [_short(row, defaults)]
        lines.append("")
    if full:
        lines.append("every option also accepts underscores, as published commands write it")
    else:
        lines.append(f"every option of transformers' Trainer and the published names: {command} --help all")
    return "\n".join(lines) + "\n"


def _ordered(rows: Iterable[OptionRow], names: Sequence[str]) -> list[OptionRow]:
    """Return the rows in the order of the short form, then the others by name."""
    place = {f"--{name}": index for index, name in enumerate(names)}
    return sorted(rows, key=lambda row: (place.get(row.name, len(place)), row.name))


def _head(row: OptionRow) -> str:
    return f"  {row.name} {METAVARS[row.kind]}{' ...' if row.nargs in ('+', '*') else ''}".rstrip()


def _default(row: OptionRow, defaults: Defaults) -> str:
    """Return the default in parentheses, or nothing where there is none or the text names it."""
    own = {
        "--version": defaults.template or "v0",
        "--image-aspect-ratio": defaults.image_mode or "square",
        "--mm-projector-type": defaults.projector_type,
        "--calibrate-mm-projector": defaults.calibrates,
        "--image-grouping": defaults.image_grouping,
        "--bf16": defaults.bf16,
        "--log-lines": defaults.log_lines,
    }
    if row.name in NEW_MODEL:
        return f" (new model: {own[row.name]})"
    value = own.get(row.name, row.default)
    silent = value in (None, "", [], False) or "default:" in row.help or row.kind == "off"
    return "" if silent else f" (default: {value})"


def _text(row: OptionRow) -> str:
    """Return the help text, without the published default where this command has another one."""
    return row.help.split("; default: ")[0] if row.name in NEW_MODEL else row.help.rstrip(".")


def _short(row: OptionRow, defaults: Defaults) -> str:
    """Return one line: the option, its text, its default."""
    return f"{_head(row):<{COLUMN - 2}}  {BRIEF.get(row.name) or _text(row)}{_default(row, defaults)}"


def _full(row: OptionRow, defaults: Defaults) -> list[str]:
    """Return the option and its whole help text."""
    choices = f" [{', '.join(row.choices)}]" if row.choices and len(row.choices) <= 12 else ""
    alias = f" Alias of {ALIASES[row.name]}." if row.name in ALIASES and "alias" not in row.help else ""
    text = f"{_text(row) or '-'}{choices}{alias}{_default(row, defaults)}"
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"{_head(row):<{COLUMN - 2}}  ",
        subsequent_indent=" " * COLUMN,
        break_on_hyphens=False,
    )
