"""Training speed and memory against transformers' padded batches and TRL's SFTTrainer, as ratios.

    python -m benchmarks.train_throughput [--quick] [--rounds N] [--batches N] [--threads N]

Every side trains the same 24M-parameter model in fp32 with AdamW on the same sequences, 16 a batch; collating is part
of every step. Batches of all sides alternate. Peers read the data in random and in length-grouped order; whichever
is faster counts. Our batches hold all questions of an image (8q) or are in random order (1q). The learning rate is 0,
so that all sides must get the same loss, which is asserted.
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
    """Steps of all sides over one workload, their times and losses."""

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
        """One small step of each side."""
        for side in self.sides.values():
            side.step(self.questions.sequences[:2], self.questions.images)

    def round(self, names: Sequence[str]) -> dict[str, float]:
        """Train on everything once with each of these plans; seconds of each. Equal losses are asserted."""
        self.losses = dict.fromkeys(names, 0.0)
        steps: dict[str, list[Callable[[], None]]] = {
            name: [partial(self._step, name, batch) for batch in self.plans[name][1]] for name in names
        }
        seconds = alternate(steps)
        own = self.losses["ours"]
        for name, loss in self.losses.items():
            if abs(loss - own) > RELATIVE_LOSS_ERROR * abs(own):
                raise AssertionError(f"loss of {name}: {loss}, of ours: {own}; the sides do not compute the same")
        return seconds

    def _step(self, name: str, batch: list[Encoded]) -> None:
        side, _ = self.plans[name]
        self.losses[name] += self.sides[side].step(batch, self.questions.images)

    def tokens(self, name: str) -> int:
        """Tokens that a plan makes the model compute, padding included."""
        side, plan = self.plans[name]
        layout: Layout = "tree" if side == "ours" else "padded"
        lay_out = partial(flatten, images=self.questions.images, image_token_id=IMAGE_TOKEN_ID, layout=layout)
        return sum(lay_out(batch).num_tokens for batch in plan)


def compare(name: str, num_batches: int, num_rounds: int) -> dict[str, float]:
    """Ratios of one workload; prints its table."""
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
    """Peak memory of a step of ours over the padded one's, on one batch of the 8-question workload."""
    needed = {}
    for side in ("ours", "transformers"):
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.step_memory", side]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the memory of {side} could not be measured:\n{done.stderr}")
        needed[side] = float(done.stdout.split()[-1])
    say("\nPeak anonymous memory of a step (8q, 16 sequences) above weights, gradients and optimiser state")
    say("| side | MiB |")
    say("| --- | --- |")
    for side, mib in needed.items():
        say(f"| {side} | {mib:.0f} |")
    return needed["ours"] / needed["transformers"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run both workloads and the memory measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one batch, one round: does it run, are the losses equal")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=3, help="batches of 16 sequences a round")
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
