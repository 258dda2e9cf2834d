"""Converters of plug-ins: `llava data NAME SOURCE --out ROWS.json` writes the rows a function yields.

SOURCE --function of the plug-in--> rows --from_row (each is checked)--> ROWS.json
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.errors import DataError, LlavaError
from llava.samples import from_row
from llava.utils.cli import Parser
from llava.utils.files import refuse_overwriting
from llava.utils.jsonl import write_json
from llava.utils.lookup import lookup
from llava.utils.plugins import add_plugin_option, failure_text
from llava.utils.terminal import write_out

CONVERTERS: dict[str, Callable[[Path], Iterable[Mapping[str, Any]]]] = {}
"""Functions of plug-ins by name: source to rows in LLaVA format."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a converter; the first word is its name.

    Raises:
        DataError: the source does not exist, or a row cannot be used.
    """
    name, *words = sys.argv[1:] if argv is None else argv
    parser = Parser(prog=f"llava data {name}", description=f"Convert {name} to rows, with a plug-in.")
    parser.add_argument("source", type=Path, help="file or folder to convert")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    add_plugin_option(parser)
    args = parser.parse_args(words)
    convert = lookup(CONVERTERS, name, "converter")
    if not args.source.exists():
        raise DataError(f"{args.source}: no such file or folder")
    refuse_overwriting([args.source], {"out": args.out})
    rows = checked_rows(_called(convert, args.source), name)
    write_json(args.out, rows)
    write_out(f"{len(rows)} rows -> {args.out}\n")


def _called(convert: Callable[[Path], Iterable[Mapping[str, Any]]], source: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a source; the converter is called when the first is drawn."""
    yield from convert(source)


def _drawn(rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[Mapping[str, Any]]:
    """Yield rows; turn an error of the plug-in into one line."""
    try:
        yield from rows
    except LlavaError:
        raise
    except Exception as error:  # LLAVA_TRACEBACK shows where
        raise DataError(f"converter {name} failed: {failure_text(error)}") from error


def checked_rows(rows: Iterable[Mapping[str, Any]], name: str) -> list[dict[str, Any]]:
    """Return rows that `llava train` can read.

    Raises:
        DataError: there are none, or one cannot be used; names its number.
    """
    found: list[dict[str, Any]] = []
    for number, row in enumerate(_drawn(rows, name)):
        try:
            from_row(row, default_id=str(number))
        except DataError as error:
            raise DataError(f"converter {name}, row {number}: {error}") from error
        found.append(dict(row))
    if not found:
        raise DataError(f"converter {name}: the source gave no rows")
    return found
