"""Benchmark of training: speed and memory against padded batches of transformers and of TRL.

    python -m benchmarks.train_throughput [--quick] [--rounds N] [--batches N] [--threads N]

Every side trains the same 24M-parameter model in fp32 with AdamW on the same sequences, 16 per batch; collating is part
of every step. Batches of all sides alternate. Peers read the data in random and in length-grouped order; the faster one
counts. Our batches hold all questions of an image (8q) or are in random order (1q). The learning rate is 0, so the
losses of all sides must be equal, which is asserted.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import transformers

from benchmarks.common import IMAGE_TOKEN_ID, alternate, machine, median, quiet, say, say_ratios
from benchmarks.sides import SIDES, num_trained
from benchmarks.workloads import PEER_ORDERS, WORKLOADS, batches, shuffled
from llava.data.encode import Encoded
from llava.data.flat_batch import Layout, flatten

PEERS = ("transformers", "trl")
RELATIVE_LOSS_ERROR = 1e-5


class Runs:
    """Steps of all sides on one workload, with their times and losses."""

    def __init__(self, name: str, num_batches: int) -> None:
        workload = WORKLOADS[name]
        self.questions = workload.questions(num_batches)
        self.sides: dict[str, Any] = {side: make() for side, make in SIDES.items()}
        sequences = self.questions.sequences
        own = batches(sequences) if workload.questions_per_image > 1 else shuffled(sequences)
        self.plans: dict[str, tuple[str, list[list[Encoded]]]] = {"ours": ("ours", own)}
        for peer in PEERS:
            for order, arrange in PEER_ORDERS.items():
                self.plans[f"{peer}, {order}"] = (peer, arrange(sequences))
        self.losses: dict[str, float] = {}

    def warm_up(self) -> None:
        """Run one small step of each side."""
        for side in self.sides.values():
            side.step(self.questions.sequences[:2], self.questions.images)

    def round(self, names: Sequence[str]) -> dict[str, float]:
        """Train once with each of these plans; assert equal losses and return seconds by plan."""
        self.losses = dict.fromkeys(names, 0.0)
        steps: dict[str, list[Callable[[], None]]] = {
            name: [partial(self._step, name, batch) for batch in self.plans[name][1]] for name in names
        }
        seconds = alternate(steps)
        own = self.losses["ours"]
        for name, loss in self.losses.items():
            if abs(loss - own) > RELATIVE_LOSS_ERROR * abs(own):
                raise AssertionError(f"loss of {name} is {loss}, ours is {own}; expected equal losses")
        return seconds

    def _step(self, name: str, batch: list[Encoded]) -> None:
        side, _ = self.plans[name]
        self.losses[name] += self.sides[side].step(batch, self.questions.images)

    def tokens(self, name: str) -> int:
        """Return the number of tokens that the model computes in a plan, including padding."""
        side, plan = self.plans[name]
        layout: Layout = "tree" if side == "ours" else "padded"
        lay_out = partial(flatten, images=self.questions.images, image_token_id=IMAGE_TOKEN_ID, layout=layout)
        return sum(lay_out(batch).num_tokens for batch in plan)


def compare(name: str, num_batches: int, num_rounds: int) -> dict[str, float]:
    """Print the table of a workload; return its ratios."""
    runs = Runs(name, num_batches)
    runs.warm_up()
    first = runs.round(list(runs.plans))
    best = {peer: min((plan for plan in first if plan.startswith(peer)), key=first.__getitem__) for peer in PEERS}
    kept = ["ours", *best.values()]
    rounds = [first, *(runs.round(kept) for _ in range(num_rounds - 1))]
    ratios = {peer: median([times[plan] / times["ours"] for times in rounds]) for peer, plan in best.items()}
    count = len(runs.questions.sequences)
    say(f"\n{name}: {WORKLOADS[name].about}; {count} sequences, "
        f"{num_trained(runs.questions.sequences)} trained tokens; {num_rounds} rounds")  # fmt: skip
    say("| side | tokens computed | s per 16 sequences (median) | slower than ours (median of pairs) |")
    say("| --- | --- | --- | --- |")
    for plan in runs.plans:
        times = [seconds[plan] for seconds in rounds if plan in seconds]
        pairs = [seconds[plan] / seconds["ours"] for seconds in rounds if plan in seconds]
        say(f"| {plan} | {runs.tokens(plan)} | {median(times) / num_batches:.2f} | {median(pairs):.2f} |")
    return {f"train_{name}": ratios["transformers"], f"train_{name}_trl": ratios["trl"]}


def memory_ratio() -> float:
    """Return the ratio of peak memory of our step to the padded one, on a batch of workload 8q."""
    needed = {}
    for side in ("ours", "transformers"):
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.step_memory", side]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"measuring the memory of {side} failed:\n{done.stderr}")
        needed[side] = float(done.stdout.split()[-1])
    say("\nPeak anonymous memory of a step (8q, 16 sequences) above weights, gradients and optimizer state")
    say("| side | MiB |")
    say("| --- | --- |")
    for side, mib in needed.items():
        say(f"| {side} | {mib:.0f} |")
    return needed["ours"] / needed["transformers"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run both workloads and the memory measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one batch and one round, as a test of equal losses")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=3, help="batches of 16 sequences per round")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    num_batches, num_rounds = (1, 1) if args.quick else (args.batches, args.rounds)
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    say(machine())
    ratios: dict[str, float] = {}
    with quiet():
        for name in WORKLOADS:
            ratios |= compare(name, num_batches, num_rounds)
        ratios["memory_8q"] = memory_ratio()
    say("")
    say_ratios(ratios)


if __name__ == "__main__":
    main()
