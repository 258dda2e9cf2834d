"""Reading and writing checkpoints: apply_delta against loading both models, our loading against from_pretrained.

python -m benchmarks.checkpoint_io [--quick] [--rounds 3] [--folder DIR]

Random models of one billion parameters, float16, in shards of at most 500 MB, as safetensors and as `.bin`. Every run
is a process of its own; its time and its peak of resident anonymous memory (`RssAnon`, read from outside) begin after
its imports. Sides take turns, and the files are in the page cache before the first. Results must be equal: of
apply_delta every bit, of loading the sum of the bits of all weights.

Both sides of loading make model, tokenizer and processor, and return while weights still lie in the mapped files. A
complete load counts (`load_...`): until every weight was read once. Beside it stands the same with the model alone on
the other side (`load_model_...`), which is no use without its processor.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.checkpoint_files import FULL, QUICK, Sizes, write_models, write_pair
from llava.model.checkpoint.files.shards import list_tensors, open_tensors
from llava.utils.cli import Parser

FORMS = ("safetensors", "bin")
INTERVAL_S = 0.002
LOADS_A_ROUND = 3
"""Loading takes less than a second, and so little is easily disturbed."""
WANTED = {"delta_memory": 0.35, "delta_time": 1.0, "load": 1.2}
Measured = dict[str, float]


def anonymous_mib(process: int) -> float | None:
    """Resident anonymous memory of a process in MiB; None when it has ended."""
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if found is None else int(found.group(1)) / 1024


def run_side(name: str, *words: object) -> Measured:
    """One side in a process of its own: its measurements and its peak of anonymous memory above its imports.

    Raises:
        RuntimeError: the process failed; with its last words.
    """
    command = [sys.executable, "-m", "benchmarks.checkpoint_sides", name, *map(str, words)]
    with ExitStack() as stack:
        errors = stack.enter_context(tempfile.TemporaryFile("w+"))
        child = stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
        )
        assert child.stdin is not None and child.stdout is not None
        lines = [child.stdout.readline()]
        before = anonymous_mib(child.pid) or 0.0
        ends = threading.Event()
        watch = threading.Thread(target=lambda: peaks.append(_watch(child.pid, ends)))
        peaks: list[float] = []
        watch.start()
        if lines[0].strip() == "ready":
            child.stdin.write("go\n")
            child.stdin.flush()
            lines += child.stdout.readlines()
        child.wait()
        ends.set()
        watch.join()
        if child.returncode:
            errors.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{errors.read()[-2000:]}")
    measured: Measured = json.loads(lines[-1])
    return {**measured, "mib": peaks[0] - before}


def _watch(process: int, ends: threading.Event) -> float:
    largest = 0.0
    while not ends.wait(INTERVAL_S):
        largest = max(largest, anonymous_mib(process) or 0.0)
    return largest


def warm(*folders: Path) -> None:
    """Read all files once, so that the first side finds them in the page cache as the others do; write back others."""
    for folder in folders:
        for file in folder.iterdir():
            if file.is_file():
                with file.open("rb") as stream:
                    while stream.read(1 << 24):
                        pass
    os.sync()


def measure_delta(folder: Path, sizes: Sizes, form: str, rounds: int) -> dict[str, list[Measured]]:
    """apply_delta and the load-both-models way, in turns."""
    base, delta = write_pair(folder, sizes, safe=form == "safetensors")
    shutil.rmtree(folder / "target")
    taken: dict[str, list[Measured]] = {"delta_ours": [], "delta_both_models": []}
    for number in range(rounds):
        for side in _in_turn(taken, number):
            warm(base, delta)
            taken[side].append(run_side(side, base, delta, folder / side, sizes.max_shard_bytes, form))
        if number == 0:
            assert_equal(folder / "delta_ours", folder / "delta_both_models")
        for side in taken:
            shutil.rmtree(folder / side)
    return taken


def measure_load(folder: Path, sizes: Sizes, form: str, rounds: int) -> dict[str, list[Measured]]:
    """Our loading of shards in the originals' layout, and from_pretrained of shards in transformers' own, in turns."""
    legacy, hf = write_models(folder, sizes, safe=form == "safetensors")
    places = {"load_ours": legacy, "load_plain": hf}
    taken: dict[str, list[Measured]] = {side: [] for side in places}
    for number in range(rounds):
        for side in _in_turn(taken, number):
            warm(*places.values())
            taken[side].append(run_side(side, places[side]))
        sums = [taken[side][number]["sum"] for side in places]
        if sums[0] != sums[1]:
            raise RuntimeError(f"the two sides loaded different weights: the sums of their bits are {sums}")
    return taken


def _in_turn(sides: Mapping[str, object], number: int) -> list[str]:
    """Every second round in the other order."""
    return list(sides) if number % 2 == 0 else list(reversed(list(sides)))


def assert_equal(one: Path, other: Path) -> None:
    """Both sides wrote the same model.

    Raises:
        RuntimeError: a tensor differs.
    """
    with open_tensors(one) as first, open_tensors(other) as second:
        if set(first.names) != set(second.names):
            raise RuntimeError(f"{one} and {other} have different tensors")
        for name, tensor in first:
            if not torch.equal(tensor, second.read(name)):
                raise RuntimeError(f"{name} differs between {one} and {other}")


def report(form: str, part: str, taken: Mapping[str, Sequence[Measured]], ratios: dict[str, float]) -> None:
    """A table of medians, and the medians of each round's ratios."""
    ours, peer = taken.values()
    columns = ["seconds", "mib"] if part == "delta" else ["loaded", "read", "mib"]
    common.say(f"\n{part}, {form}\n| side | {' | '.join(columns)} |\n| --- |{' --- |' * len(columns)}")
    for side, runs in taken.items():
        cells = [f"{common.median([run[column] for run in runs]):.2f}" for column in columns]
        common.say(f"| {side} | {' | '.join(cells)} |")
    pairs: list[tuple[Any, Any]] = list(zip(ours, peer, strict=True))
    if part == "delta":
        ratios[f"delta_memory_{form}"] = common.median([one["mib"] / other["mib"] for one, other in pairs])
        ratios[f"delta_time_{form}"] = common.median([one["seconds"] / other["seconds"] for one, other in pairs])
    else:
        complete = [[run["loaded"] + run["read"] for run in pair] for pair in pairs]
        processors = [other["processor"] for _, other in pairs]
        ratios[f"load_{form}"] = common.median([one / other for one, other in complete])
        ratios[f"load_model_{form}"] = common.median(
            [one / (other - processor) for (one, other), processor in zip(complete, processors, strict=True)]
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both parts in both formats and report."""
    parser = Parser(
        description="read and write checkpoints of random models",
        epilog="example: python -m benchmarks.checkpoint_io --folder /large/disk",
    )
    parser.add_switch("--quick", help="0.12 billion parameters, to see that it runs")
    parser.add_argument("--rounds", type=int, default=3, help="runs of every side; medians count")
    parser.add_argument("--folder", type=Path, help="where to put the files (10 GB); a temporary folder by default")
    args = parser.parse_args(argv)
    sizes = QUICK if args.quick else FULL
    torch.set_num_threads(2)
    common.say(common.machine())
    ratios: dict[str, float] = {}
    for form in FORMS:
        for part, measure, times in (("delta", measure_delta, 1), ("load", measure_load, LOADS_A_ROUND)):
            with tempfile.TemporaryDirectory(dir=args.folder, prefix="checkpoint-io-") as name:
                taken = measure(Path(name), sizes, form, times * args.rounds)
                if part == "delta" and form == FORMS[0]:
                    values = sum(entry.num_bytes for entry in list_tensors(Path(name) / "base").values()) // 2
                    common.say(f"{values / 1e9:.2f} billion parameters, float16")
            report(form, part, taken, ratios)
    common.say("wanted at most: " + ", ".join(f"{name} {limit}" for name, limit in WANTED.items()))
    common.say_ratios(ratios)


if __name__ == "__main__":
    main()
