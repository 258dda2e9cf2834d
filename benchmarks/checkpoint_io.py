"""Benchmark of checkpoints: apply_delta against loading both models, loading against from_pretrained.

python -m benchmarks.checkpoint_io [--quick] [--rounds 3] [--folder DIR]

Random models of one billion parameters, float16, in shards of at most 500 MB, as safetensors and as `.bin`. Every run
is a separate process; its time and its peak of resident anonymous memory (`RssAnon`, read from outside) are counted
after its imports. Sides alternate, with the files in the page cache. Results must be equal: every bit of apply_delta,
and the sum of the bits of all weights for loading.

Both sides of loading make model, tokenizer and processor, and return while weights are still in mapped files. Ratio
`load_...` counts until every weight was read once; `load_model_...` leaves out the processor of the other side.
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
"""Loads per round, because a load takes less than a second and varies."""
WANTED = {"delta_memory": 0.35, "delta_time": 1.0, "load": 1.2}
Measured = dict[str, float]


def anonymous_mib(process: int) -> float | None:
    """Return the resident anonymous memory of a process in MiB; None if it has ended."""
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if found is None else int(found.group(1)) / 1024


def run_side(name: str, *words: object) -> Measured:
    """Run one side in a process; return its measurements and its peak memory above its imports.

    Raises:
        RuntimeError: the process failed; the message ends with its error output.
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
    """Read all files into the page cache, and flush pending writes."""
    for folder in folders:
        for file in folder.iterdir():
            if file.is_file():
                with file.open("rb") as stream:
                    while stream.read(1 << 24):
                        pass
    os.sync()


def measure_delta(folder: Path, sizes: Sizes, form: str, rounds: int) -> dict[str, list[Measured]]:
    """Return measurements of apply_delta and of loading both models, alternated."""
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
    """Return measurements of our loading and of from_pretrained, each of its own format, alternated."""
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
    """Return the sides, in reverse order every second round."""
    return list(sides) if number % 2 == 0 else list(reversed(list(sides)))


def assert_equal(one: Path, other: Path) -> None:
    """Check that both sides wrote the same model.

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
    """Print a table of medians, and add the medians of each round's ratios to `ratios`."""
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
    parser.add_switch("--quick", help="0.12 billion parameters, as a test")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds; medians are reported")
    parser.add_argument("--folder", type=Path, help="folder for the files (10 GB); default: a temporary folder")
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
