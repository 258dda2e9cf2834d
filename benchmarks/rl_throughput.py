"""Benchmark of reinforcement learning: rollout and update against TRL, and with sharing off.

    python -m benchmarks.rl_throughput [--quick] [--turns 1 5] [--sides NAME ...] [--rounds N] [--threads N]
        [--no-time] [--no-memory]

One step samples 8 dialogues of each of 4 prompts (256 image tokens, answers of 24 tokens) with the 24M-parameter model
in fp32, rewards them, and takes one optimizer step; dapo (mean over tokens), no KL term, advantages scaled by group.
The workloads have one turn, and five turns with questions of 20 tokens. TRL is `GRPOTrainer` with transformers'
LlavaProcessor; its five turns read the history again in each turn, as a `rollout_func` does. TRL updates with the whole
step or a quarter of it in a forward pass; the faster one counts. Steps of all sides alternate; rollout and update are
also timed apart. The learning rate is 0, so that all sides keep the same weights. Memory is the peak of a whole step
above what it starts with, each side in a process of its own.
"""

from __future__ import annotations

import os
import warnings
from argparse import BooleanOptionalAction
from collections.abc import Sequence
from dataclasses import dataclass

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import transformers

from benchmarks.common import alternate, machine, median, quiet, say, say_ratios
from benchmarks.rl_memory import measured
from benchmarks.rl_sides import FULL, QUICK, SIDES, Shape
from llava.utils.cli import Parser


@dataclass(frozen=True, slots=True)
class Times:
    """Median seconds of a step, and of its two parts."""

    step: float
    rollout: float
    update: float


def compare(shape: Shape, turns: int, num_rounds: int, names: Sequence[str]) -> dict[str, float]:
    """Print the table of a workload; return its ratios."""
    sides = {name: SIDES[name](shape, turns) for name in names}
    for side in sides.values():  # caches, pools of threads
        side.step(1)
    rounds: list[dict[str, float]] = []
    parts: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(num_rounds):
        rounds.append(alternate({name: [side.step] for name, side in sides.items()}))
        for name, side in sides.items():
            parts[name].append((side.rollout_seconds, side.update_seconds))
    times = {
        name: Times(
            median([seconds[name] for seconds in rounds]),
            median([rollout for rollout, _ in parts[name]]),
            median([update for _, update in parts[name]]),
        )
        for name in sides
    }
    samples = shape.prompts * shape.group
    say(f"\n{turns} turn{'s' if turns > 1 else ''}: {shape.prompts} prompts x {shape.group}; {num_rounds} rounds")
    say("| side | samples/s | s rollout | s update | slower than ours (median of pairs) |")
    say("| --- | --- | --- | --- | --- |")
    pairs = {name: median([seconds[name] / seconds["ours"] for seconds in rounds]) for name in sides}
    for name, found in times.items():
        say(f"| {name} | {samples / found.step:.2f} | {found.rollout:.2f} | {found.update:.2f} | {pairs[name]:.2f} |")
    peers = [pairs[name] for name in pairs if name.startswith("trl")]
    ratios = {f"rl_{turns}turn_trl": min(peers)} if peers else {}
    return ratios | ({f"rl_{turns}turn_sharing": pairs["sharing off"]} if "sharing off" in pairs else {})


def compare_memory(turns: int) -> dict[str, float]:
    """Print the peak memory of a step of each side; return its ratio to the side of TRL that needs least."""
    found = {name: measured(name, turns) for name in SIDES}
    say(f"\n{turns} turn{'s' if turns > 1 else ''}, peak memory of a step above weights and optimizer, MiB")
    say("| side | MiB |\n| --- | --- |")
    for name, mib in found.items():
        say(f"| {name} | {mib:,.0f} |")
    peer = min(mib for name, mib in found.items() if name.startswith("trl"))
    return {
        f"rl_{turns}turn_memory": found["ours"] / peer,
        f"rl_{turns}turn_memory_whole": found["ours"] / found["trl"],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the workloads."""
    parser = Parser(prog="python -m benchmarks.rl_throughput", description=__doc__)
    parser.add_switch("--quick", help="tiny steps, one round, as a test that all sides run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, nargs="+", default=[1, 5], help="workloads, by their number of turns")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES), help="sides that are timed")
    parser.add_argument("--time", action=BooleanOptionalAction, default=True, help="measure time")
    parser.add_argument("--memory", action=BooleanOptionalAction, default=True, help="measure memory")
    args = parser.parse_args(argv)
    names = list(dict.fromkeys(["ours", *args.sides]))
    shape, num_rounds = (QUICK, 1) if args.quick else (FULL, args.rounds)
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    say(machine())
    ratios: dict[str, float] = {}
    with quiet():
        for turns in args.turns:
            if args.time:
                ratios |= compare(shape, turns, num_rounds, names)
            if args.memory and not args.quick:
                ratios |= compare_memory(turns)
    say("")
    say_ratios(ratios)


if __name__ == "__main__":
    main()
