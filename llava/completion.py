"""Completion of `llava` in the shell: `eval "$(register-python-argcomplete llava)"` once, then Tab.

The shell calls the command with `_ARGCOMPLETE` set. Options of training come from its table, and those of the other
commands from their parsers, of which only the wanted one is imported.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping

from llava.errors import LlavaError
from llava.utils.cli import WATCHER, Parser, run_target

VARIABLE = "_ARGCOMPLETE"
"""Environment variable with which the shell asks for completion."""


WITH_TRAINING: dict[str, tuple[str, ...]] = {"train": (), "preferences score": ("--out",)}
"""Commands that take the options of training, and further options of each."""


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
    if name in WITH_TRAINING:
        from llava.train.option_table import read_table

        return dict.fromkeys(WITH_TRAINING[name]) | {row.name: row.choices for row in read_table()}
    parser = own_parser(target)
    if parser is None:
        return {}
    return {
        name: None if action.choices is None else tuple(map(str, action.choices))
        for action in parser._actions
        if action.dest != "help"
        for name in action.option_strings
    }


class _ParserFound(BaseException):  # not an error that a command may handle
    """Signal with the parser that a command began to parse its line with."""

    def __init__(self, parser: Parser) -> None:
        super().__init__()
        self.parser = parser


def own_parser(target: str) -> Parser | None:
    """Return the parser of a command, which is started and stopped where it would parse its line."""

    def stop(parser: Parser) -> None:
        if parser.add_help:  # one without help reads a single option, from which the others follow
            raise _ParserFound(parser)

    token = WATCHER.set(stop)
    try:
        run_target(target, [])
    except _ParserFound as found:
        return found.parser
    except (LlavaError, SystemExit, ImportError):  # an extra that the command needs is not installed
        return None
    finally:
        WATCHER.reset(token)
    return None
