"""Corruptions of recorded numbers: every quantity of every oracle folder, changed, made NaN, or removed.

    python -m tests.support.corruptions --oracles DIR [--folder NAME] [--file NAME] [--per-kind N]

Recorded contents are changed in memory, so our side is computed once. Each change must give a failed line. The command
tries `--per-kind` values of every kind; `tests/parity/test_corruptions.py` tries one of each on the quick files.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import quiet, say
from benchmarks.fidelity import floors
from benchmarks.fidelity.__main__ import CHECKS, safely
from benchmarks.fidelity.folder import Line, Oracle

SOURCES: Mapping[str, Sequence[str]] = {
    "forward.npz": ("forward.npz", "forward_meta.json"),
    "questions.jsonl": ("out/answers.jsonl",),
    "dpo.json": (),
}
"""Files whose contents a check compares, other than the file it is named after, which is then an input."""

READERS: Mapping[str, Sequence[str]] = {"dpo.npz": ("dpo.json",)}
"""Other checks that compare the contents of a file too."""

INPUTS = {
    "seed": "seed of draws, which the compared rows follow",
    "stop": "string at which the original stopped; the recorded ids end there",
    "repetition_penalty": "option that our generation follows; it shows only where a token repeats",
    "argv": "options of the recorded run, which our run follows",
    "order": "rows of the recorded run, which our run follows",
    "tokenizer_model_max_length": "setting of the original, which shows only where it cut a row",
    "answer_id": "random",
    "model_id": "name",
    "metadata": "empty",
    "names": "images that our tower gets",
    "cfg": "sizes of the projector",
    "x": "input of the projector",
    "w": "weights of the projector",
    "note": "words about the record",
    "logits/chosen": "a mean over padding too, which this package does not compute",
    "logits/rejected": "a mean over padding too, which this package does not compute",
}
"""Recorded entries that are inputs of our side or of no calculation, by name."""

OPTIONAL = {
    "num_beams": "the mode states it too, and has to agree",
}
"""Recorded entries that may be absent: their removal leaves the same run; other values of them are noticed."""

BOUNDED = {"min_top2_margin": "of a beam search it is also over dropped beams, so our first margin only bounds it"}
"""Recorded values of a beam search that are compared with a bound, by name."""


@dataclass(frozen=True, slots=True)
class Corruption:
    """Change of a recorded content.

    Attributes:
        file: the file.
        kind: quantity and way of the change.
        where: the place in the file.
        apply: function that returns a changed copy of the content.
    """

    file: str
    kind: str
    where: str
    apply: Callable[[Any], Any]


def corruptions(oracle: Oracle, check: str, *, per_kind: int, seed: int = 0) -> list[Corruption]:
    """Return changes of each kind of quantity that a check compares, `per_kind` of each, drawn by `seed`."""
    draw = random.Random(seed)
    chosen: list[Corruption] = []
    for name in SOURCES.get(check, (check,)):
        kinds: dict[str, list[Corruption]] = {}
        for found in _of_arrays(oracle, name) if name.endswith(".npz") else _of_json(oracle, name):
            kinds.setdefault(found.kind, []).append(found)
        for members in kinds.values():
            chosen += draw.sample(members, min(per_kind, len(members)))
    return chosen


def lines_after(oracle: Oracle, check: str, corruption: Corruption) -> list[Line]:
    """Return the lines of a check on a changed content, and those of the floors of its file."""
    changed = Oracle(oracle.path, oracle.compat, dict(oracle.contents))
    changed.contents[corruption.file] = corruption.apply(_content(oracle, corruption.file))
    names = (check, *READERS.get(corruption.file, ()))
    lines = {name: list(safely(CHECKS[name], changed, name)) for name in names}
    recording = floors.known(oracle)
    assert recording is not None, "corruptions are tried on known folders"
    alone = floors.Recording(recording.commit, {name: recording.floors[name] for name in names})
    return [*(line for found in lines.values() for line in found), *floors.missing(alone, lines)]


def _content(oracle: Oracle, name: str) -> Any:
    if name.endswith(".npz"):
        return oracle.arrays(name)
    return oracle.lines(name) if name.endswith(".jsonl") else oracle.json(name)


def _of_arrays(oracle: Oracle, name: str) -> Iterator[Corruption]:
    """Yield changes of one value of each array, and removals of arrays."""
    arrays = oracle.arrays(name)
    for key, array in arrays.items():
        parts = [part for part in key.split("/") if "." not in part or part.startswith("grad")]
        kind = next((part for part in reversed(parts) if not part.startswith("batch")), key)
        if any(part in INPUTS for part in key.split("/")):
            continue
        yield Corruption(name, f"{kind} removed", key, lambda content, key=key: _without(content, key))
        places = _compared(arrays, key)
        for what, change in _array_changes(array):
            if not len(places):
                continue
            place = tuple(places[len(places) // 2])
            yield Corruption(
                name,
                f"{kind} {what}",
                f"{key}{list(map(int, place))}",
                lambda content, key=key, place=place, change=change: _set(content, key, place, change),
            )


def _compared(arrays: Mapping[str, np.ndarray], key: str) -> np.ndarray:
    """Return the places of an array that are compared: those of its batch's rows, without padding."""
    array, batch = arrays[key], key.rpartition("/")[0]
    mask = arrays.get(f"{batch}/spliced_mask", arrays.get(f"{batch}/attention_mask"))
    name = key.rpartition("/")[2]
    if mask is None or not name.startswith(("logits", "spliced_embeds")):
        return np.argwhere(np.ones(array.shape, dtype=bool))
    stride = int(name.rpartition("stride")[2]) if "stride" in name else 1
    rows = [[row, place // stride] for row, place in np.argwhere(mask) if place % stride == 0]
    # A mask that is longer than its row holds padding at the end, so the middle is taken.
    ends = [0] * (array.ndim - 2)
    return np.array([[*row, *ends] for row in rows[len(rows) // 4 : len(rows) // 3]])


def _array_changes(array: np.ndarray) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    if array.dtype.kind == "f":
        yield "changed", lambda value: value + 0.05
        yield "NaN", lambda _: np.nan
    elif array.dtype.kind == "b":
        yield "flipped", lambda value: not value
    elif array.dtype.kind in "iu":
        yield "changed", lambda value: value + 1


def _set(content: dict[str, np.ndarray], key: str, place: tuple[int, ...], change: Callable[[Any], Any]) -> Any:
    array = content[key].copy()
    array[place] = change(array[place])
    return {**content, key: array}


def _without(content: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name != key}


def _of_json(oracle: Oracle, name: str) -> Iterator[Corruption]:
    """Yield changes of every leaf of a JSON content, and removals of every member."""
    whole = _content(oracle, name)
    for path, value in _walk(whole):
        field = _field(path, name)
        if any(step in INPUTS for step in path):
            continue
        level = f"member at depth {len(path)}" if isinstance(value, dict) else field
        where = "/".join(map(str, path))
        if path and path[-1] not in OPTIONAL:
            yield Corruption(name, f"{level} removed", where, lambda content, path=path: _edited(content, path, None))
        is_bounded = path and path[-1] in BOUNDED and "beam" in whole[path[0]].get("mode", "")
        for what, change in _beyond_bounds() if is_bounded else _value_changes(value):
            if change(value) == value:
                continue
            yield Corruption(
                name,
                f"{level} {what}",
                where,
                lambda content, path=path, change=change: _edited(content, path, change),
            )


def _field(path: Sequence[Any], file: str) -> str:
    """Return the name of the quantity at a place: its last key that names no row, image or weight."""
    names = [step for step in path if isinstance(step, str) and "." not in step]
    return names[-1] if names else str(path[0]).partition("/")[0] if path and isinstance(path[0], str) else file


def _walk(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield all members and leaves; of a list of numbers the middle one only."""
    if path:
        yield path, value
    if isinstance(value, dict):
        for key, member in value.items():
            yield from _walk(member, (*path, key))
    elif isinstance(value, list) and value:
        plain = not isinstance(value[0], (dict, list))
        for index in [len(value) // 2] if plain else range(len(value)):
            yield from _walk(value[index], (*path, index))


def _value_changes(value: Any) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    if isinstance(value, bool):
        yield "flipped", lambda old: not old
    elif isinstance(value, int):
        yield "changed", lambda old: old + 1
    elif isinstance(value, float):
        yield "changed", lambda old: old * 1.01 + 0.01
        yield "NaN", lambda _: float("nan")
    elif isinstance(value, str):
        yield "changed", lambda old: old[: len(old) // 2] + "x" + old[len(old) // 2 :]
    elif isinstance(value, list) and value and all(isinstance(each, int) for each in value):
        yield "ignored", lambda old: [-100] * len(old)
        yield "shortened", lambda old: old[:-1]
    elif isinstance(value, dict) and "input_ids" in value:
        yield "turned into an error", lambda _: {"error": "AssertionError"}


def _beyond_bounds() -> Iterator[tuple[str, Callable[[Any], Any]]]:
    yield "above its bound", lambda old: old + 100.0
    yield "negative", lambda old: -old
    yield "NaN", lambda _: float("nan")


def _edited(content: Any, path: Sequence[Any], change: Callable[[Any], Any] | None) -> Any:
    """Return a copy of a content with one member changed, or removed."""
    root = copy.copy(content)
    parent = root
    for step in path[:-1]:
        parent[step] = copy.copy(parent[step])
        parent = parent[step]
    if change is None:
        del parent[path[-1]]
    else:
        parent[path[-1]] = change(parent[path[-1]])
    return root


def main(argv: Sequence[str] | None = None) -> None:
    """Try all kinds of changes; exit with 1 if one is not noticed."""
    parser = argparse.ArgumentParser(description="Corrupt recorded numbers and see whether the comparison fails.")
    parser.add_argument("--oracles", type=Path, required=True)
    parser.add_argument("--folder", default="", help="name of one folder")
    parser.add_argument("--file", default="", help="name of one file")
    parser.add_argument("--per-kind", type=int, default=3)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    tried = missed = 0
    with quiet():
        for folder in sorted(path for path in args.oracles.iterdir() if args.folder in ("", path.name)):
            oracle = Oracle(folder)
            for check in (name for name in CHECKS if oracle.has(name) and args.file in ("", name)):
                for corruption in corruptions(oracle, check, per_kind=args.per_kind):
                    is_seen = any(line.status == "FAIL" for line in lines_after(oracle, check, corruption))
                    tried, missed = tried + 1, missed + (not is_seen)
                    if not is_seen:
                        say(f"NOT SEEN {folder.name} {corruption.file} {corruption.kind}: {corruption.where}")
    say(f"{tried} corruptions, {missed} not noticed")
    sys.exit(int(bool(missed)))


if __name__ == "__main__":
    main()
