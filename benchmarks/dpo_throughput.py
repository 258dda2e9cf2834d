"""Benchmark of preference training: speed against TRL and against padded rows, with equal losses and gradients.

    python -m benchmarks.dpo_throughput [--quick] [--rounds N] [--threads N] [--workload NAME ...]

Every side trains a LoRA adapter (rank 8) of the same 24M-parameter model with DPO on the same pairs; collating is part
of every step, and steps of all sides alternate. TRL and the padded peer compute the reference in the step, with the
adapter off; ours does so too, and is also run with a cached reference. The learning rate is 0, so losses are equal,
which is asserted: against TRL at answers of 30 tokens (it sums in float32), against padded rows in float64 always.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import transformers
from torch import Tensor

from benchmarks.common import alternate, machine, median, quiet, say, say_ratios
from benchmarks.pair_sides import TRL, WORKLOADS, Ours, Padded, PairBatch, Side, Workload, gradients_of, random_pairs

TRL_LOSS, TRL_GRADIENTS = 1e-5, 3e-5
"""Largest differences to TRL: of the loss, and of a gradient relative to its norm."""

EXACT = 1e-9
"""Largest difference to padded rows in float64, of both."""

MEMORY = "memory"
"""Name of the measurement of memory among the workloads."""

SHORT_ANSWERS = 30
"""Longest answers at which float32 sums allow a comparison with TRL."""


def gradient_error(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Return the largest difference of a gradient, relative to the norm of all.

    Raises:
        AssertionError: the sides train different weights.
    """
    if ours.keys() != theirs.keys():
        raise AssertionError(f"the sides train {len(ours)} and {len(theirs)} weights; expected the same")
    total = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
    return float(torch.stack([(ours[name] - theirs[name]).norm() for name in ours]).norm() / total)


def assert_equal(first: Side, second: Side, batch: PairBatch, *, loss: float, gradients: float) -> tuple[float, float]:
    """Assert that two sides have equal losses and gradients; return both differences.

    Raises:
        AssertionError: they differ by more.
    """
    values, found = [], []
    for side in (first, second):
        side.optimizer.zero_grad()
        values.append(side.backward(batch))
        found.append(gradients_of(side.model))
        side.optimizer.zero_grad()
    errors = abs(values[0] - values[1]), gradient_error(*found)
    if errors[0] > loss or errors[1] > gradients:
        raise AssertionError(
            f"losses differ by {errors[0]:.1e}, gradients by {errors[1]:.1e}; allowed {loss}, {gradients}"
        )
    return errors


def exact_errors(work: Workload, shape: str) -> tuple[float, float]:
    """Assert that our trees equal padded rows in float64; return the differences."""
    few = random_pairs(Workload(min(work.num_images, 2), work.pairs_per_image, work.answer_tokens))
    wide: dict[str, Any] = {"shape": shape, "dtype": torch.float64}
    return assert_equal(Ours(**wide), Padded(**wide), few, loss=EXACT, gradients=EXACT)


def compare(name: str, num_rounds: int, *, shape: str = "24m") -> dict[str, float]:
    """Print the table of a workload and return its ratios, peer over ours."""
    work = WORKLOADS[name]
    batch = random_pairs(work)
    ours, cached = Ours(shape=shape), Ours(cached=True, shape=shape)
    padded, padded_cached, trl = Padded(shape=shape), Padded(cached=True, shape=shape), TRL(shape=shape)
    ready = cached.with_reference(batch)
    sides: dict[str, tuple[Side, PairBatch]] = {
        "ours": (ours, batch),
        "ours, cached": (cached, ready),
        "padded": (padded, batch),
        "padded, cached": (padded_cached, ready),
        "TRL": (trl, batch),
    }
    wide = exact_errors(work, shape)
    about = f"{work.pairs_per_image} pairs a picture, {len(batch.units)} pairs"
    say(f"\n{name}: {about}, answers of {work.answer_tokens} tokens")
    say(f"equal to padded rows in float64: loss within {wide[0]:.1e}, gradients within {wide[1]:.1e}")
    if work.answer_tokens <= SHORT_ANSWERS:
        errors = assert_equal(ours, trl, batch, loss=TRL_LOSS, gradients=TRL_GRADIENTS)
        say(f"equal to TRL in float32: loss within {errors[0]:.1e}, gradients within {errors[1]:.1e}")
    for side, rows in sides.values():
        side.step(rows)  # the first step allocates library buffers
    steps = {title: [partial(_step, side, rows)] for title, (side, rows) in sides.items()}
    times = [alternate(steps) for _ in range(num_rounds)]
    tree, rows_of_pairs = ours.lay_out(batch).num_tokens, sum(len(s.input_ids) for s in batch.sequences)
    say(f"tokens, padded / tree: {rows_of_pairs / tree:.2f}")
    say("| side | s per step (median) | slower than ours with the same reference |")
    say("| --- | --- | --- |")
    peers = {"padded": "ours", "TRL": "ours", "padded, cached": "ours, cached"}
    for title in sides:
        own = peers.get(title, title)
        ratio = median([seconds[title] / seconds[own] for seconds in times])
        say(f"| {title} | {median([seconds[title] for seconds in times]):.3f} | {ratio:.2f} |")
    pairs = {
        "trl": ("TRL", "ours"),
        "padded": ("padded", "ours"),
        # As in a run: the peer computes the reference in the step, ours reads it.
        "cached": ("padded", "ours, cached"),
    }
    return {
        f"dpo_{name}_{key}": median([seconds[peer] / seconds[own] for seconds in times])
        for key, (peer, own) in pairs.items()
    }


def _step(side: Side, batch: PairBatch) -> None:
    side.step(batch)


def memory_ratios() -> dict[str, float]:
    """Return our peak memory of a step over that of each peer, at 30 tokens; each side in a process of its own."""
    needed = {}
    for side in ("ours", "padded", "trl"):
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.pair_memory", side]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"measuring the memory of {side} failed:\n{done.stderr}")
        needed[side] = float(done.stdout.split()[-1])
    say("\nPeak anonymous memory of a step (1p30, reference in the step) above weights and optimizer state")
    say("| side | MiB |\n| --- | --- |\n" + "\n".join(f"| {side} | {mib:.0f} |" for side, mib in needed.items()))
    return {f"dpo_memory_{side}": needed["ours"] / needed[side] for side in ("padded", "trl")}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the workloads and the memory measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round without memory, as a test of equal losses")
    parser.add_argument("--shape", default="24m", help="size of the model, see benchmarks.common.SHAPES")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workload", nargs="+", choices=[*WORKLOADS, MEMORY], default=[*WORKLOADS, MEMORY])
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    say(machine())
    ratios: dict[str, float] = {}
    with quiet():
        for name in args.workload:
            if name != MEMORY:
                ratios |= compare(name, 1 if args.quick else args.rounds, shape=args.shape)
            elif not args.quick:
                ratios |= memory_ratios()
    say("")
    say_ratios(ratios)


if __name__ == "__main__":
    main()
