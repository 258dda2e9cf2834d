"""`llava checkpoint diff A B`: what two checkpoints differ in, tensor by tensor under our names, and in settings."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.model.layout import Layout, sniff
from llava.model.names import is_buffer
from llava.model.our_names import our_name
from llava.model.shards import TensorReader
from llava.utils.cli import Parser

IGNORED_KEYS = frozenset({"transformers_version", "_name_or_path"})


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that differs: a tensor's or a setting's name, and how."""

    name: str
    how: str


def by_our_names(layout: Layout) -> dict[str, str]:
    """A checkpoint's names by ours; tables that are computed are left out.

    A tower's adapter in a folder of its own counts as part of the adapter around it, as in our layout; copies of it
    beside the language model's (specification stllava-med 3.2) step back.
    """
    names = (*layout.tensors, *layout.extra)
    found = {our_name(layout, name) or name: name for name in names if not is_buffer(name)}
    if layout.tower_adapter is not None:
        found |= by_our_names(sniff(layout.tower_adapter))
    return found


def open_all(layout: Layout) -> TensorReader:
    """The tensors of every file of a checkpoint."""
    tower = {} if layout.tower_adapter is None else sniff(layout.tower_adapter).tensors
    return TensorReader({**tower, **layout.extra, **layout.tensors})


def differences(first: Layout, second: Layout) -> Iterator[Difference]:
    """Tensors that only one has, of another shape or dtype, or with other values; then settings."""
    ours, theirs = by_our_names(first), by_our_names(second)
    readers = open_all(first), open_all(second)
    for name in sorted(set(ours) | set(theirs)):
        if name not in theirs:
            yield Difference(name, "only in the first")
        elif name not in ours:
            yield Difference(name, "only in the second")
        elif how := _compare(readers, ours[name], theirs[name]):
            yield Difference(name, how)
    yield from _settings(first.config, second.config)


def _compare(readers: tuple[TensorReader, TensorReader], ours: str, theirs: str) -> str | None:
    import torch

    entries = readers[0].entries[ours], readers[1].entries[theirs]
    if entries[0].shape != entries[1].shape:
        return f"shape {entries[0].shape} and {entries[1].shape}"
    first, second = readers[0].read(ours), readers[1].read(theirs)
    note = "" if first.dtype == second.dtype else f"{entries[0].dtype} and {entries[1].dtype}"
    if torch.equal(first.to(second.dtype), second) and torch.equal(second.to(first.dtype), first):
        return f"{note}, equal values" if note else None
    gap = (first.double() - second.double()).abs()
    return f"{note + ', ' if note else ''}largest difference {float(gap.max()):.3g}, mean {float(gap.mean()):.3g}"


def _settings(first: dict[str, Any], second: dict[str, Any]) -> Iterator[Difference]:
    for key in sorted((set(first) | set(second)) - IGNORED_KEYS):
        if first.get(key) != second.get(key):
            yield Difference(f"config.json: {key}", f"{_short(first.get(key))} and {_short(second.get(key))}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def main(argv: Sequence[str] | None = None) -> None:
    """Run `llava checkpoint diff`; the exit status is 1 when tensors differ."""
    parser = Parser(prog="llava checkpoint diff", description="what two checkpoints differ in; status 1 if in a tensor")
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    args = parser.parse_args(argv)
    first, second = sniff(args.first), sniff(args.second)
    found = list(differences(first, second))
    tensors = [difference for difference in found if not difference.name.startswith("config.json:")]
    for difference in found:
        sys.stdout.write(f"{difference.name}: {difference.how}\n")
    total = len(set(by_our_names(first)) | set(by_our_names(second)))
    sys.stdout.write(f"{total - len(tensors)} of {total} tensors are equal\n")
    if tensors:
        raise SystemExit(1)
