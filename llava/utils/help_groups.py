"""Help of commands with many options: the basic ones by topic, all of them with `--help all`."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Mapping, Sequence
from itertools import pairwise

WIDTH = 118
"""Largest width of a help text."""

COLUMN = 34
"""Column in which the texts of options begin."""

ALL = "all"
"""Word after `--help` that shows every option."""

OTHER = "other options"

HelpGroups = Mapping[str, Sequence[str]]
"""Options by topic, in the order of the help."""


def help_width() -> int:
    """Return the width of help texts: the terminal's up to `WIDTH`, also without a terminal."""
    columns = int(os.environ.get("COLUMNS") or 0) or shutil.get_terminal_size((WIDTH, 24)).columns
    return max(60, min(columns, WIDTH))


def asks_for_all(words: Sequence[str]) -> bool:
    """Return whether a command line asks for the full help: `--help all`, `--help=all`, `--help-all`."""
    if any(word in ("--help=all", "--help-all") for word in words):
        return True
    return any(word in ("-h", "--help") and following == ALL for word, following in pairwise(words))


def brief_usage(parser: argparse.ArgumentParser) -> str:
    """Return a usage of one line: what is required, and that there are options."""
    formatter = parser._get_formatter()
    words = ["%(prog)s"]
    for action in parser._actions:
        if not action.option_strings:
            default = formatter._get_default_metavar_for_positional(action)
            words.append(formatter._format_args(action, default).replace("%", "%%"))
        elif action.required:
            default = formatter._get_default_metavar_for_optional(action)
            value = formatter._format_args(action, default).replace("%", "%%")
            words.append(f"{action.option_strings[0]} {value}".strip())
    has_more = any(action.option_strings and not action.required for action in parser._actions)
    return " ".join([*words, *(["[--OPTION ...]"] if has_more else [])])


def grouped_help(
    parser: argparse.ArgumentParser, groups: HelpGroups, *, note: str = "", first_names: bool = False
) -> str:
    """Return the help with these options by topic, and a note at its end.

    Args:
        parser: the parser.
        groups: options by topic.
        note: last line.
        first_names: show only the first name of an option.

    Raises:
        KeyError: the parser has no such option.
    """
    formatter = parser._get_formatter()
    formatter.first_names = first_names  # type: ignore[attr-defined]
    formatter.add_usage(parser.usage or brief_usage(parser), parser._actions, [])
    formatter.add_text(parser.description)
    known = parser._option_string_actions
    positionals = [action for action in parser._actions if not action.option_strings]
    for title, actions in {
        "arguments": positionals,
        **{t: [known[n] for n in names] for t, names in groups.items()},
    }.items():
        formatter.start_section(title)
        formatter.add_arguments(actions)
        formatter.end_section()
    formatter.add_text(note)
    formatter.add_text(parser.epilog)
    return formatter.format_help()


def with_others(parser: argparse.ArgumentParser, groups: HelpGroups) -> dict[str, list[str]]:
    """Return the groups, and at last the options that no group has."""
    named = {id(parser._option_string_actions[name]) for names in groups.values() for name in names}
    rest = [
        one.option_strings[0]
        for one in parser._actions
        if one.option_strings and one.dest != "help" and id(one) not in named
    ]
    shown = {title: list(names) for title, names in groups.items()}
    return {**shown, OTHER: rest} if rest else shown
