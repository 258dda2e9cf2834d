"""Table of the options of `llava train`: names, kinds, defaults, help and groups, read without torch.

    option classes --write_option_table--> option_table.json --read_table--> help, early checks, completion

The table is generated, since the option classes extend those of transformers, whose import takes seconds. A test
compares it with the classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from llava.utils.cli import Parser, parse_bool

TABLE_FILE = "option_table.json"
"""The table, next to this module; `python -m llava.train.write_option_table` writes it."""

GROUPS: dict[str, tuple[str, ...]] = {
    "model": (
        "model-name-or-path", "vision-tower", "version", "system-file", "mm-projector-type", "calibrate-mm-projector",
        "pretrain-mm-mlp-adapter", "tune-mm-mlp-adapter", "freeze-mm-mlp-adapter", "freeze-backbone",
        "unfreeze-mm-vision-tower", "bits", "plugin",
    ),
    "data": ("data-path", "eval-data-path", "model-max-length", "loader", "skip-bad", "dry-run"),
    "images": (
        "image-folder", "eval-image-folder", "image-aspect-ratio", "image-size", "image-grouping", "dicom-window",
        "fast-jpeg", "feature-cache-dir",
    ),
    "LoRA": (
        "lora-enable", "lora-r", "lora-alpha", "lora-dropout", "lora-target-modules", "use-rslora", "use-dora",
        "init-lora-weights", "modules-to-save", "vit-lora-enable",
    ),
    "optimization": (
        "num-train-epochs", "max-steps", "per-device-train-batch-size", "gradient-accumulation-steps", "learning-rate",
        "mm-projector-lr", "mm-vision-tower-lr", "lr-scheduler-type", "warmup-steps", "weight-decay", "max-grad-norm",
        "optim", "bf16", "gradient-checkpointing", "max-tokens-per-row", "seed",
    ),
    "preferences": ("objective", "pref-loss", "beta", "ref-mode"),
    "reinforcement learning": (
        "rules", "num-generations", "rollout-batch-size", "response-len", "styles", "kl-coef", "value-model",
    ),
    "logging": (
        "output-dir", "overwrite-output-dir", "resume-from-checkpoint", "log-lines", "logging-steps", "report-to",
        "run-name", "save-strategy", "save-steps", "save-total-limit", "eval-strategy", "eval-answers",
        "early-stopping-patience", "save-on-signal",
    ),
    "distributed": (
        "nproc", "nnodes", "node-rank", "master-addr", "master-port", "deepspeed", "fsdp", "fsdp-config",
        "dataloader-num-workers",
    ),
    "published names": (),
}  # fmt: skip
"""Groups of the help, each with the options of the short form in their order."""

ALIASES = {
    "--evaluation-strategy": "--eval-strategy",
    "--vision-tower-lr": "--mm-vision-tower-lr",
    "--warmup-ratio": "--warmup-steps",
}
"""Published names of options, and the names that they stand for."""


@dataclass(frozen=True, slots=True)
class OptionRow:
    """Option of the table.

    Attributes:
        name: option with dashes, `--learning-rate`.
        group: key of `GROUPS`.
        kind: `int`, `float`, `str`, `bool`, or `off` for an option without value that sets another one to false.
        nargs: number of values as argparse writes it: None for one, `?`, `+` or `*`.
        default: default of the published commands.
        choices: allowed values, or None.
        help: help text.
    """

    name: str
    group: str
    kind: str
    nargs: str | None
    default: Any
    choices: tuple[str, ...] | None
    help: str

    @property
    def is_listed(self) -> bool:
        """Whether the short form of the help shows the option."""
        return self.name.removeprefix("--") in GROUPS[self.group]


LAUNCHER = (
    OptionRow("--config", "data", "str", None, None, None, "YAML file with options; `llava train FILE` is the same"),
    OptionRow("--nproc", "distributed", "int", None, None, None, "processes on this machine, started with torchrun"),
    OptionRow("--nnodes", "distributed", "int", None, None, None, "machines of the run, with --nproc processes each"),
    OptionRow("--node-rank", "distributed", "int", None, None, None, "number of this machine, from 0"),
    OptionRow("--master-addr", "distributed", "str", None, None, None, "address of the first machine"),
    OptionRow("--master-port", "distributed", "int", None, None, None, "free port of the first machine"),
)
"""Options of the command itself, which are not passed to the trainer."""


@cache
def read_table() -> tuple[OptionRow, ...]:
    """Return the options of the launcher, then those of training in the order of their classes."""
    text = (files("llava.train") / TABLE_FILE).read_text(encoding="utf-8")
    return (*LAUNCHER, *(row_from_json(row) for row in json.loads(text)))


def row_from_json(row: Mapping[str, Any]) -> OptionRow:
    """Return a row of the file."""
    choices = row["choices"]
    return OptionRow(**{**row, "choices": None if choices is None else tuple(choices)})


KINDS: dict[str, Any] = {"int": int, "float": float, "str": str}


def bool_or_auto(text: str) -> bool | str:
    """Return the value of a switch that also takes `auto`."""
    return text if text == "auto" else parse_bool(text)


def make_parser(rows: Sequence[OptionRow], defaults: Mapping[str, Any] | None = None) -> Parser:
    """Return a parser of the options in `rows`; options that are not given are absent from the result.

    Args:
        rows: the options.
        defaults: default of options by name with underscores, instead of none.
    """
    parser = Parser(prog="llava train", add_help=False)
    for row in rows:
        if row.kind == "off":
            parser.add_argument(row.name, action="store_false", default=_absent(row, defaults))
            continue
        kind = bool_or_auto if row.name == "--bf16" else parse_bool if row.kind == "bool" else KINDS[row.kind]
        keywords: dict[str, Any] = {"type": kind, "nargs": row.nargs, "default": _absent(row, defaults)}
        if row.nargs == "?":
            keywords["const"] = True
        if row.choices is not None:
            keywords["choices"] = list(row.choices)
        parser.add_argument(row.name, **keywords)
    return parser


def _absent(row: OptionRow, defaults: Mapping[str, Any] | None) -> Any:
    import argparse

    return (defaults or {}).get(row.name.removeprefix("--").replace("-", "_"), argparse.SUPPRESS)
