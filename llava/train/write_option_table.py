"""Generator of the option table: `python -m llava.train.write_option_table` after changing an option."""

from __future__ import annotations

import json
from argparse import SUPPRESS, Action
from dataclasses import asdict, fields
from enum import Enum
from pathlib import Path
from typing import Any

from llava.train.args import DataArguments, ModelArguments
from llava.train.legacy_flags import UNSUPPORTED
from llava.train.option_parser import make_parser
from llava.train.option_table import ALIASES, GROUPS, TABLE_FILE, OptionRow
from llava.train.preference_args import PreferenceArguments
from llava.train.rollout_args import RolloutArguments
from llava.utils.cli import run_program, with_dashes
from llava.utils.jsonl import write_atomic

NAME_GROUPS = {
    "lora": "LoRA", "vit_lora": "LoRA", "image": "images", "dicom": "images", "log": "logging", "save": "logging",
    "eval": "logging", "report": "logging", "hub": "logging", "push": "logging", "trackio": "logging",
    "disable_tqdm": "logging", "ddp": "distributed", "fsdp": "distributed", "deepspeed": "distributed",
    "local_rank": "distributed", "parallelism": "distributed", "accelerator": "distributed", "dataloader": "data",
}  # fmt: skip
"""Beginnings of names that decide the group of an option outside the short form."""


def group_of(field: str) -> str:
    """Return the group of an option, by its place in the short form, else by its name, else by its class."""
    name = field.replace("_", "-")
    if f"--{name}" in ALIASES or field in UNSUPPORTED:
        return "published names"
    for group, listed in GROUPS.items():
        if name in listed:
            return group
    for start, group in NAME_GROUPS.items():
        if field.startswith(start):
            return group
    for kind, group in ((ModelArguments, "model"), (DataArguments, "data"), (PreferenceArguments, "preferences"),
                        (RolloutArguments, "reinforcement learning")):  # fmt: skip
        if field in {item.name for item in fields(kind)}:
            return group
    return "optimization"


def row_of(action: Action) -> OptionRow:
    """Return the row of an option of the training parser."""
    kind = getattr(action.type, "__name__", "str")
    kind = {"string_to_bool": "bool", "_bool_or_auto": "bool"}.get(kind, kind)
    if action.nargs == 0:
        kind = "off"
    default = action.default.value if isinstance(action.default, Enum) else action.default
    choices = None if action.choices is None else tuple(_text(choice) for choice in action.choices)
    return OptionRow(
        name=with_dashes(action.option_strings)[0],
        group=group_of(action.dest),
        kind=kind if kind in ("int", "float", "bool", "off") else "str",
        nargs=None if action.nargs in (None, 0) else str(action.nargs),
        default=default if _is_json(default) else str(default),
        choices=choices,
        help=" ".join((action.help or "").replace("%%", "%").split()),
    )


def _text(choice: Any) -> str:
    return str(choice.value if isinstance(choice, Enum) else choice)


def _is_json(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | list)


def option_rows() -> list[OptionRow]:
    """Return the rows of all options that the training classes define."""
    actions = [action for action in make_parser(bf16=False)._actions if action.dest != "help"]
    return [row_of(action) for action in actions if action.default is not SUPPRESS]


def table_text(rows: list[OptionRow]) -> str:
    """Return the content of the file: one option a line, so that changes of several options merge."""
    return "[\n" + ",\n".join(json.dumps(asdict(row), ensure_ascii=False) for row in rows) + "\n]\n"


def main() -> None:
    """Write the table."""
    write_atomic(Path(__file__).with_name(TABLE_FILE), table_text(option_rows()))


if __name__ == "__main__":
    run_program(main)
