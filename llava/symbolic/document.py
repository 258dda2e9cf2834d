"""Reader of untrusted YAML: a tree of texts, lists and maps with line numbers, also for every error.

bytes --size, UTF-8--> text --events of the parser--> Item(text | list | map, line)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llava.errors import DataError
from llava.utils.file_kinds import utf8_text

MAX_BYTES = 1_000_000
"""Maximum size of a file in bytes."""

MAX_DEPTH = 12
"""Maximum nesting depth of lists and maps."""

MAX_ITEMS = 100_000
"""Maximum number of texts, lists and maps of a file."""

AMBIGUOUS = frozenset({"yes", "no", "on", "off"})
"""Plain words that some YAML versions read as true or false."""

LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Parser of libyaml, many times faster, or Python's own."""


@dataclass(frozen=True, slots=True)
class Item:
    """Part of a file.

    Attributes:
        value: a text, a list of items, or a map from texts to items; None for an empty value.
        line: line of the file, from 1.
        plain: whether a text is written without quotes.
        key_lines: line of each key of a map.
    """

    value: str | list[Item] | dict[str, Item] | None
    line: int
    plain: bool = False
    key_lines: dict[str, int] = field(default_factory=dict)


def located(path: Path, line: int, message: str) -> str:
    """Return a message that begins with file and line."""
    return f"{path}, line {line}: {message}"


def read_document(path: Path) -> Item:
    """Return the content of a YAML file.

    Raises:
        DataError: the file cannot be read, is larger than `MAX_BYTES`, or is not plain YAML: aliases, tags, duplicate
            keys and unquoted yes or no are refused; the message names file and line.
    """
    try:
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        with open(path, "rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read ({error})") from error
    if len(content) > MAX_BYTES:
        raise DataError(f"{path}: larger than {MAX_BYTES:,} bytes")
    try:
        text = utf8_text(content)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    try:
        return _Builder(path, yaml.parse(text, Loader=LOADER)).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise DataError(located(path, mark.line + 1 if mark else 1, f"not YAML: {error.problem}")) from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise DataError(located(path, line, f"character U+{_code(error):04X} is not allowed")) from None
    except yaml.YAMLError as error:
        raise DataError(located(path, 1, f"not YAML: {' '.join(str(error).split())}")) from None


def _code(error: yaml.reader.ReaderError) -> int:
    character = error.character
    return ord(character) if isinstance(character, str) and len(character) == 1 else int(character)


class _Builder:
    """Builder of a tree from the events of a parser."""

    def __init__(self, path: Path, events: Iterator[Any]) -> None:
        self.path = path
        self.events = events
        self.num_items = 0

    def document(self) -> Item:
        """Return the only document of the file."""
        root: Item | None = None
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                if root is not None:
                    raise self.error(event, "a second document; expected one")
                root = self.item(next(self.events), 0)
        if root is None:
            raise DataError(located(self.path, 1, "the file is empty"))
        return root

    def error(self, event: Any, message: str) -> DataError:
        """Return an error at the line of an event."""
        return DataError(located(self.path, event.start_mark.line + 1, message))

    def item(self, event: Any, depth: int) -> Item:
        """Return the part that begins with an event."""
        self.num_items += 1
        if self.num_items > MAX_ITEMS:
            raise self.error(event, f"more than {MAX_ITEMS:,} values")
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise self.error(event, "YAML anchors and aliases are not allowed; repeat the value")
        if event.tag is not None and event.tag != "!":
            raise self.error(event, f"YAML tags are not allowed, got {event.tag}")
        line = event.start_mark.line + 1
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event, line)
        if depth >= MAX_DEPTH:
            raise self.error(event, f"nested more than {MAX_DEPTH} levels deep")
        if isinstance(event, yaml.SequenceStartEvent):
            items: list[Item] = []
            while not isinstance(inner := next(self.events), yaml.SequenceEndEvent):
                items.append(self.item(inner, depth + 1))
            return Item(items, line)
        return self.map(line, depth)

    def scalar(self, event: Any, line: int) -> Item:
        """Return a text."""
        plain = not event.style  # None or "", depending on the parser
        if plain and event.value.lower() in AMBIGUOUS:
            raise self.error(event, f"unquoted {event.value}; write it with quotes: '{event.value}'")
        if plain and event.value in ("", "~", "null", "Null", "NULL"):
            return Item(None, line, plain)
        return Item(event.value, line, plain)

    def map(self, line: int, depth: int) -> Item:
        """Return a map, after its start event."""
        values: dict[str, Item] = {}
        lines: dict[str, int] = {}
        while not isinstance(inner := next(self.events), yaml.MappingEndEvent):
            key = self.item(inner, depth + 1)
            if not isinstance(key.value, str):
                raise self.error(inner, "a key must be a text")
            if key.value in values:
                raise self.error(inner, f"duplicate key {key.value!r}; first in line {lines[key.value]}")
            values[key.value], lines[key.value] = self.item(next(self.events), depth + 1), key.line
        return Item(values, line, key_lines=lines)
