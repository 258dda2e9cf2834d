"""Completion of `llava` in the shell: `eval "$(register-python-argcomplete llava)"` once, then Tab.

The shell calls the command with `_ARGCOMPLETE` set. Options of training come from its table, and those of the other
commands from their parsers, of which only the wanted one is imported.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
from collections.abc import Mapping

VARIABLE = "_ARGCOMPLETE"
"""Environment variable with which the shell asks for completion."""


def complete(targets: Mapping[str, str]) -> None:
    """Answer the shell's completion request from the file descriptor that it passes, then exit.

    Args:
        targets: `module:function` of each command.
    """
    import argcomplete

    argcomplete.autocomplete(parser_of(os.environ.get("COMP_LINE", ""), targets))


def parser_of(line: str, targets: Mapping[str, str]) -> argparse.ArgumentParser:
    """Return a parser with every command, and the options of the one that a command line names."""
    root = argparse.ArgumentParser(prog="llava")
    groups = root.add_subparsers()
    made: dict[str, argparse._SubParsersAction[argparse.ArgumentParser]] = {}
    words = line.split()[1:]
    for name, target in targets.items():
        first, _, second = name.partition(" ")
        if not second:
            parser = groups.add_parser(first)
        else:
            if first not in made:
                made[first] = groups.add_parser(first).add_subparsers()
            parser = made[first].add_parser(second)
        if words[: len(name.split())] == name.split():
            add_options(parser, name, target)
    return root


def add_options(parser: argparse.ArgumentParser, name: str, target: str) -> None:
    """Add the options of a command, where they are known without running it."""
    for option, choices in options_of(name, target).items():
        parser.add_argument(option, choices=choices)


def options_of(name: str, target: str) -> dict[str, tuple[str, ...] | None]:
    """Return the options of a command, and the choices of options that have a fixed list."""
    if name == "train":
        from llava.train.option_table import read_table

        return {row.name: row.choices for row in read_table()}
    make = getattr(importlib.import_module(target.partition(":")[0]), "make_parser", None)
    if make is None or any(part.default is part.empty for part in inspect.signature(make).parameters.values()):
        return {}
    actions = [action for action in make()._actions if action.dest != "help"]
    return {
        name: None if action.choices is None else tuple(map(str, action.choices))
        for action in actions
        for name in action.option_strings
    }
