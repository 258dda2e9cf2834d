"""Options of a command in a YAML file: `llava train run.yaml`, `llava eval --config eval.yaml`.

    file --read_config--> {option: value} --expand--> words, before those of the command line, which win

A key is the name of an option, with dashes or underscores. A list gives several values where the option takes them,
and JSON text elsewhere, as does a table.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from llava.errors import ConfigError
from llava.utils.cli import Parser, flag, near_options, prefix_of, with_dashes
from llava.utils.jsonl import read_text
from llava.utils.plugins import FLAG, check_recorded, recorded_names
from llava.utils.yaml_files import parse_yaml

CONFIG_SUFFIXES = (".yaml", ".yml")
CONFIG_FLAG = "--config"


class _Loader(yaml.SafeLoader):
    """Loader that refuses repeated keys and reads `1e-5` as a number."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in found:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is repeated", key_node.start_mark)
        found[key] = loader.construct_object(value_node, deep=True)
    return found


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_config(path: str | Path) -> dict[str, Any]:
    """Return the options of a file by their names with dashes.

    Raises:
        ConfigError: the file is missing, not YAML, or not a table of options.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such file; expected a YAML file with options")
    try:
        content = parse_yaml(read_text(path), _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or type(error).__name__
        raise ConfigError(f"{path}{line}: not YAML ({problem}); expected lines such as `learning_rate: 2e-5`") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{path}: expected a table of options, lines such as `learning_rate: 2e-5`")
    named = {_option(key): value for key, value in content.items()}
    if len(named) < len(content):
        raise ConfigError(f"{path}: an option has two spellings in the file; keep one of them")
    return named


def _option(key: str) -> str:
    return with_dashes([f"--{key.removeprefix('--')}"])[0]


def config_of(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the configuration file of a command line, or None, and the other words.

    Raises:
        ConfigError: two files are given, or `--config` has no value.
    """
    files: list[str] = []
    rest: list[str] = []
    given = list(words)
    while given:
        word = given.pop(0)
        name, equals, value = word.partition("=")
        if name == CONFIG_FLAG:
            if not equals and not given:
                raise ConfigError("--config has no value; expected a YAML file with options")
            files.append(value if equals else given.pop(0))
        elif not rest and not word.startswith("-") and Path(word).suffix.lower() in CONFIG_SUFFIXES:
            files.append(word)
        else:
            rest.append(word)
    if len(files) > 1:
        raise ConfigError(f"{len(files)} configuration files are given, {', '.join(files)}; expected one")
    return (files[0] if files else None), rest


def expand(
    words: Sequence[str],
    *,
    lists: Collection[str],
    known: Collection[str],
    aliases: Mapping[str, str] | None = None,
) -> list[str]:
    """Return a command line with its configuration file's options in front, except those given again.

    Args:
        words: command line, which may name a file.
        lists: options that take several values.
        known: all options.
        aliases: second names of options.

    Raises:
        ConfigError: the file cannot be read, or has an unknown key; the message suggests the nearest option.
    """
    path, rest = config_of(words)
    if path is None:
        return rest
    options = read_config(path)
    if FLAG in known:
        check_recorded(options, rest, source=path, several=FLAG in lists)
    if unknown := [name for name in options if name not in known]:
        shown = ", ".join(name.removeprefix("--").replace("-", "_") for name in unknown)
        raise ConfigError(f"{path}: unknown option {shown}{near_options(unknown, known)}")
    second = dict(aliases or {})
    given = {second.get(name, name) for name in _named(rest, known)}
    found: list[str] = []
    for name, value in options.items():
        if value is not None and second.get(name, name) not in given:
            found += _words(name, value, is_list=name in lists, path=str(path))
    return [*found, *rest]


def with_config(parser: Parser, argv: Sequence[str] | None) -> list[str]:
    """Return the command line for a parser with its configuration file's options; raises as `expand`."""
    actions = {name: action for name, action in parser._option_string_actions.items() if name.startswith("--")}
    lists = {name for name, action in actions.items() if action.nargs in ("+", "*")}
    aliases = {name: action.option_strings[0] for name, action in actions.items() if name != action.option_strings[0]}
    return expand(sys.argv[1:] if argv is None else argv, lists=lists, known=set(actions), aliases=aliases)


def resolved_options(parser: Parser, args: Namespace) -> dict[str, Any]:
    """Return the options that differ from their defaults, by name, as a configuration file holds them."""
    found: dict[str, Any] = {}
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if action.option_strings and action.dest != "help" and value is not None and value != action.default:
            name = action.option_strings[0].removeprefix("--").replace("-", "_")
            found[name] = value if isinstance(value, bool | int | float | list) else str(value)
            if action.option_strings[0] == FLAG:
                found[name] = recorded_names(value)
    return found


def _named(words: Sequence[str], known: Collection[str]) -> set[str]:
    """Return the options that a command line names, by prefix too."""
    names = {word.partition("=")[0] for word in with_dashes(words) if word.startswith("--")}
    return {prefix_of(name, known) or name for name in names}


def _words(name: str, value: Any, *, is_list: bool, path: str) -> list[str]:
    if isinstance(value, list) and is_list:
        return [name, *map(_text, value)] if value else []
    if isinstance(value, list | dict):
        return [f"{name}={json.dumps(value)}"]
    if not isinstance(value, str | bool | int | float):
        raise ConfigError(f"{path}: {flag(name.removeprefix('--'))} is {value!r}; expected a text, a number or a list")
    return [f"{name}={_text(value)}"] if not isinstance(value, bool) else [name, str(value)]


def _text(value: Any) -> str:
    return str(value)


def config_text(options: Mapping[str, Any], *, comment: str) -> str:
    """Return the content of a configuration file with these options, by names with underscores."""
    body = yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True, default_flow_style=False, width=1000)
    return f"# {comment}\n{body if options else ''}"
