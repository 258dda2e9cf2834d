"""Help of `llava train`, from the table of options: a short form by groups, and every option in full."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from llava.train.defaults import TODAY
from llava.train.option_table import ALIASES, GROUPS, OptionRow, read_table

WIDTH = 118
COLUMN = 38
"""Width of a line, and of the column of options."""

TODAYS = {
    "--version": TODAY.template,
    "--image-aspect-ratio": TODAY.image_mode,
    "--mm-projector-type": TODAY.projector_type,
    "--calibrate-mm-projector": TODAY.calibrates,
    "--image-grouping": TODAY.image_grouping,
    "--bf16": TODAY.bf16,
    "--log-lines": TODAY.log_lines,
}
"""Defaults of this command that differ from those of the option classes."""

NEW_MODEL = ("--version", "--image-aspect-ratio", "--mm-projector-type", "--calibrate-mm-projector")
"""Options whose default here applies to a new model; a checkpoint keeps its own values."""

METAVARS = {"int": "N", "float": "X", "bool": "BOOL", "str": "TEXT", "off": ""}

USAGE = """usage: llava train [FILE.yaml] [--OPTION VALUE ...]

A new model needs --model-name-or-path LM --vision-tower TOWER --data-path ROWS; a llava checkpoint needs no tower.
FILE.yaml holds options (`learning_rate: 2e-5`); the command line wins. A prefix of an option is enough.
"""


def help_text(*, full: bool = False) -> str:
    """Return the help: the options that most runs use, or all of them with the published names."""
    rows = read_table()
    lines = [USAGE]
    for group, names in GROUPS.items():
        members = _ordered([row for row in rows if row.group == group and (full or row.is_listed)], names)
        if not members:
            continue
        lines.append(f"{group}:")
        for row in members:
            lines += _full(row) if full else [_short(row)]
        lines.append("")
    lines.append("every option of transformers' Trainer and the published names: llava train --help all" if not full
                 else "every option also accepts underscores, as published commands write it")  # fmt: skip
    return "\n".join(lines) + "\n"


def _ordered(rows: Iterable[OptionRow], names: Sequence[str]) -> list[OptionRow]:
    """Return the rows in the order of the short form, then the others by name."""
    place = {f"--{name}": index for index, name in enumerate(names)}
    return sorted(rows, key=lambda row: (place.get(row.name, len(place)), row.name))


def _head(row: OptionRow) -> str:
    return f"  {row.name} {METAVARS[row.kind]}{' ...' if row.nargs in ('+', '*') else ''}".rstrip()


def _default(row: OptionRow) -> str:
    if row.name in NEW_MODEL:
        return f" (new model: {TODAYS[row.name]})"
    value = TODAYS.get(row.name, row.default)
    silent = value in (None, "", [], False) or "default:" in row.help or row.kind == "off"
    return "" if silent else f" (default: {value})"


def _text(row: OptionRow) -> str:
    """Return the help text, without the published default where this command has another one."""
    return row.help.split("; default: ")[0] if row.name in NEW_MODEL else row.help.rstrip(".")


def _short(row: OptionRow) -> str:
    """Return one line: the option, the start of its help text, its default."""
    default = _default(row)
    head = _head(row)
    room = WIDTH - max(COLUMN, len(head) + 2) - len(default)
    return f"{head:<{COLUMN - 2}}  {textwrap.shorten(_text(row), room, placeholder=' ...')}{default}"


def _full(row: OptionRow) -> list[str]:
    """Return the option and its whole help text."""
    choices = f" [{', '.join(row.choices)}]" if row.choices and len(row.choices) <= 12 else ""
    alias = f" Alias of {ALIASES[row.name]}." if row.name in ALIASES and "alias" not in row.help else ""
    text = f"{_text(row) or '-'}{choices}{alias}{_default(row)}"
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"{_head(row):<{COLUMN - 2}}  ",
        subsequent_indent=" " * COLUMN,
        break_on_hyphens=False,
    )
