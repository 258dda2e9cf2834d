"""Comparison of this package with recorded results of the original projects, one line per quantity.

    python -m benchmarks.fidelity --oracles DIR [--compat LIST]

Each kind of file in a folder has its check. A line states folder, quantity, largest difference, and `ok`, `FAIL` or
`skipped` with the reason. The exit status is 1 if a line fails, or is skipped without a reason. Of known folders, each
file must give as many values as were recorded (`floors`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.common import machine, quiet, say
from benchmarks.fidelity import answers, floors, forward, images, numbers, preferences, prompts, runs, texts
from benchmarks.fidelity.folder import Line, MissingWeightsError, Oracle
from llava.compat import COMPAT, compat_table, parse_compat
from llava.errors import ConfigError
from llava.utils.cli import Parser, run_program

Check = Callable[[Oracle], Iterator[Line]]

CHECKS: Mapping[str, Check] = {
    "forward.npz": forward.forward,
    "lora_forward.npz": numbers.adapter,
    "grads.json": numbers.gradients,
    "prompts.json": prompts.prompts,
    "preprocess.json": texts.preprocessing,
    "image_preprocess.npz": images.preprocessing,
    "anyres.json": images.tile_grids,
    "image_keep_shapes.json": images.kept_shapes,
    "generate.json": answers.generation,
    "questions.jsonl": answers.answer_file,
    "tower.npz": images.tower,
    "cluster_projector.npz": images.cluster_projector,
    "dpo.json": preferences.rows,
    "dpo.npz": preferences.log_probabilities,
    "dpo_metrics.json": preferences.step,
    "train_log.json": runs.trajectories,
    "vit_lora_note.json": runs.tower_adapter,
    "expected_metrics.json": runs.scores,
}
"""Checks of the recorded numbers, by name of their file."""

INPUTS = ("data.json", "train.json", "pretrain.json", "forward_meta.json")
"""Files that the checks read in addition; those named in a configuration are found by it."""

NUMBERS = (".npz", ".json")


def checked(folder: Path, compat: frozenset[str]) -> Iterator[Line]:
    """Compare all recorded numbers of a folder; names of `compat` may explain a number."""
    oracle = Oracle(folder, compat)
    compared: dict[str, list[Line]] = {}
    for name in sorted(path.name for path in folder.iterdir() if path.suffix in NUMBERS or path.name in CHECKS):
        if name in CHECKS:
            compared[name] = []
            for line in safely(CHECKS[name], oracle, name):
                compared[name].append(line)
                yield line
        elif name not in INPUTS and not oracle.is_input(name):
            yield Line(name, None, "skipped")
    yield from floors.missing(floors.known(oracle), compared)


def safely(check: Check, oracle: Oracle, name: str) -> Iterator[Line]:
    """Yield the lines of a check, and a failed or skipped line for an error that stops it."""
    try:
        yield from check(oracle)
    except MissingWeightsError as error:
        yield Line(name, None, "skipped", str(error), lacks_weights=True)
    except Exception as error:  # an error in one check must not hide the others
        first = (str(error).splitlines() or [""])[0]
        yield Line(name, None, "FAIL", f"{type(error).__name__}: {first}")


def report(root: Path, compat: frozenset[str] = frozenset(COMPAT)) -> int:
    """Print every line of every folder below `root`, or of `root` itself; return the exit status.

    Raises:
        ConfigError: no folder holds recorded numbers.
    """
    folders = [path for path in [root, *sorted(root.iterdir())] if path.is_dir() and _is_oracle(path)]
    if not folders:
        raise ConfigError(f"{root} holds no folder of recorded numbers; expected files such as {', '.join(CHECKS)}")
    counts = {"ok": 0, "FAIL": 0, "skipped": 0}
    unexplained = 0
    for folder in folders:
        for line in checked(folder, compat):
            counts[line.status] += 1
            unexplained += line.status == "skipped" and not line.note
            figure = "-" if line.difference is None else f"{line.difference:.1e}"
            say(f"{folder.name:24} {line.quantity:44} {figure:>8} {line.status:8} {line.note}".rstrip())
    say(f"{counts['ok']} ok, {counts['FAIL']} FAIL, {counts['skipped']} skipped ({unexplained} without a reason)")
    return int(bool(counts["FAIL"] or unexplained))


def _is_oracle(folder: Path) -> bool:
    return any((folder / name).is_file() for name in CHECKS)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = Parser(description="Compare this package with recorded numbers of the original projects.")
    parser.add_argument("--oracles", type=Path, required=True, help="folder of folders of recorded numbers")
    parser.add_argument(
        "--compat", default="all", help="defects that may explain a number: names, `all`, `none`, or `list`"
    )
    args = parser.parse_args(argv)
    if args.compat == "list":
        say(compat_table())
        return
    if not args.oracles.is_dir():
        raise ConfigError(f"--oracles {args.oracles} is not a folder")
    torch.set_num_threads(1)
    say(machine())
    with quiet():
        sys.exit(report(args.oracles, parse_compat(args.compat)))


if __name__ == "__main__":
    run_program(main)
