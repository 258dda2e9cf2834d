"""Serving compared with `transformers serve` and with a worker that answers one request at a time.

python -m benchmarks.serving                        all parts
python -m benchmarks.serving --only distinct_8 one  some parts
python -m benchmarks.serving --quick                a tiny model, one round: a check that everything runs

All servers run at the same time on the 24M model of `benchmarks.common` and are asked in turn over sockets; answers of
32 tokens are streamed. The faster peer counts. The last line gives the ratios.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks import common, decode_step
from benchmarks.serving_engine import engine_seconds
from benchmarks.serving_sides import (
    NUM_NEW_TOKENS,
    Body,
    Process,
    Reply,
    asked,
    free_port,
    originals_worker,
    our_controller,
    our_worker,
    question,
    save_folders,
    transformers_server,
)

LARGEST_DIFFERENT = 0.05
"""Share of answers that may differ from the peers': tokens after a near tie, see `eval_throughput`."""

QUESTIONS_PER_IMAGE = 8


@dataclass
class Bench:
    """Servers, and settings of a run."""

    ours: Process
    through: Process
    peers: dict[str, Process]
    folder: Path
    rounds: int
    is_quick: bool
    seeds: itertools.count[int]

    def fresh(self) -> int:
        """Return a number that no request had before, so that nothing of it is cached."""
        return next(self.seeds)

    def messages(self, num: int, images: Sequence[int] | None = None) -> list[Body]:
        """Return requests, each about an image of its own or about these images."""
        about = images or [self.fresh() for _ in range(num)]
        return [{"messages": [question(image, self.fresh())]} for image in about]


def compare(bench: Bench, make: Callable[[], tuple[list[Body], list[float]]], name: str) -> tuple[float, float]:
    """Ask all sides the same in turn; return our rate and our p95 to the first token relative to the faster peer's."""
    sides = {"ours": bench.ours, **bench.peers}
    rates, firsts = [], []
    taken: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(bench.rounds):
        bodies, delays = make()
        replies: dict[str, list[Reply]] = {}
        seconds: dict[str, float] = {}
        for side, process in sides.items():
            replies[side], seconds[side] = asked(process, bodies, delays)
            taken[side].append(seconds[side])
        check_equal(replies)
        rates.append(min(seconds[peer] for peer in bench.peers) / seconds["ours"])
        first = {side: p95([reply.first for reply in found]) for side, found in replies.items()}
        firsts.append(first["ours"] / min(first[peer] for peer in bench.peers))
    shown = ", ".join(f"{side} {len(bodies) / common.median(times):.2f}" for side, times in taken.items())
    common.say(f"{name}: requests/s: {shown}")
    return common.median(rates), common.median(firsts)


def check_equal(replies: Mapping[str, Sequence[Reply]]) -> None:
    """Check that the sides gave the same greedy answers.

    Raises:
        RuntimeError: more answers differ than near ties explain.
    """
    texts = {side: [reply.text.strip() for reply in found] for side, found in replies.items()}
    expected = texts["ours"]
    for peer, found in texts.items():
        num = sum(ours != theirs for ours, theirs in zip(expected, found, strict=True))
        if num > max(1, LARGEST_DIFFERENT * len(expected)):
            raise RuntimeError(f"{num} of {len(expected)} answers differ from those of {peer}")


def p95(values: Sequence[float]) -> float:
    """Return the 95th percentile."""
    return sorted(values)[min(len(values) - 1, round(0.95 * len(values)))]


def distinct(num: int) -> Callable[[Bench], dict[str, float]]:
    """Return the part in which all requests come at once, each about its own image."""

    def run(bench: Bench) -> dict[str, float]:
        rate, first = compare(bench, lambda: (bench.messages(num), [0.0] * num), f"distinct_{num}")
        return {f"distinct_{num}": rate, f"ttft_{num}": first}

    return run


def shared(num: int) -> Callable[[Bench], dict[str, float]]:
    """Return the part with eight questions an image, at random times within half a second."""

    def run(bench: Bench) -> dict[str, float]:
        def make() -> tuple[list[Body], list[float]]:
            images = [bench.fresh() for _ in range(num // QUESTIONS_PER_IMAGE)] * QUESTIONS_PER_IMAGE
            draw = random.Random(bench.fresh())
            draw.shuffle(images)
            return bench.messages(num, images), [draw.random() * 0.5 for _ in range(num)]

        return {f"shared_{num}": compare(bench, make, f"shared_{num}")[0]}

    return run


def one(bench: Bench) -> dict[str, float]:
    """Ask one request after another."""
    sides = {"ours": bench.ours, **bench.peers}
    ratios = []
    for _ in range(2 if bench.is_quick else 5 * bench.rounds):
        bodies = bench.messages(1)
        seconds = {side: asked(process, bodies)[1] for side, process in sides.items()}
        ratios.append(min(seconds[peer] for peer in bench.peers) / seconds["ours"])
    return {"one": common.median(ratios)}


def turns(bench: Bench) -> dict[str, float]:
    """Compare the first token of later turns, and of another question after a pause, with that of turn 1."""
    later, again = [], []
    for _ in range(bench.rounds):
        image = bench.fresh()
        messages = [question(image, bench.fresh())]
        usage = {"stream_options": {"include_usage": True}}
        [reply], _ = asked(bench.ours, [{"messages": messages, **usage}])
        first, length = reply.first, 0
        for _ in range(3):
            messages = [*messages, {"role": "assistant", "content": reply.text}, question(None, bench.fresh())]
            [reply], _ = asked(bench.ours, [{"messages": messages, **usage}])
            later.append(reply.first / first)
            length = reply.cached
        time.sleep(2 if bench.is_quick else 30)
        [reply], _ = asked(bench.ours, [{"messages": [question(image, bench.fresh())], **usage}])
        again.append(reply.first / first)
        common.say(f"turns: {length} tokens of turn 4 and {reply.cached} of the later question were not computed again")
    return {"turn2": common.median(later), "later_question": common.median(again)}


def gap(bench: Bench) -> dict[str, float]:
    """Compare the gaps of a running stream while eight new images come in with its own median."""
    ratios = []
    for _ in range(bench.rounds):
        long = {"messages": [question(bench.fresh(), bench.fresh())], "max_tokens": 300}
        alone = gaps(asked(bench.ours, [long])[0][0])
        bodies = [{"messages": [question(bench.fresh(), bench.fresh())], "max_tokens": 300}, *bench.messages(8)]
        seconds = sum(alone)
        disturbed = gaps(asked(bench.ours, bodies, [0.0, *(0.1 + seconds * number / 20 for number in range(8))])[0][0])
        p99 = sorted(disturbed)[round(0.99 * (len(disturbed) - 1))]
        ratios.append(p99 / statistics.median(alone))
    return {"gap": common.median(ratios)}


def gaps(reply: Reply) -> list[float]:
    """Return the times between the pieces of an answer."""
    return [after - before for before, after in itertools.pairwise(reply.pieces)]


def http(bench: Bench) -> dict[str, float]:
    """Compare the rate of 32 clients with that of the engine alone, and with that through a controller."""
    num = 8 if bench.is_quick else 32
    through, inside = [], []
    for _ in range(bench.rounds):
        _, seconds = asked(bench.ours, bench.messages(num))
        _, behind = asked(bench.through, bench.messages(num))
        through.append(seconds / behind)
        inside.append(engine_seconds(bench.folder, [bench.messages(num)], NUM_NEW_TOKENS)[0] / seconds)
    return {"http": common.median(inside), "controller": common.median(through)}


def memory(bench: Bench) -> dict[str, float]:
    """Compare the worker's anonymous memory after many mixed requests with that after a tenth of them."""
    total, size = (200, 20) if bench.is_quick else (2000, 50)
    early, peaks = 0, {"llava_kv_cache_bytes": 0.0, "llava_prefix_cache_bytes": 0.0}
    for done in range(0, total, size):
        draw = random.Random(done)
        bodies = [
            {
                "messages": [question(bench.fresh() if draw.random() < 0.5 else None, draw.randrange(99))],
                "max_tokens": 3,
            }
            for _ in range(size)
        ]
        asked(bench.ours, bodies)
        for name, peak in peaks.items():
            peaks[name] = max(peak, bench.ours.metric(name))
        if done + size == total // 10:
            early = bench.ours.anonymous_bytes()
    late = bench.ours.anonymous_bytes()
    found = ", ".join(f"{name} at most {value / 2**20:.0f} MiB" for name, value in peaks.items())
    common.say(
        f"memory: {early / 2**20:.0f} MiB after {total // 10} requests, {late / 2**20:.0f} after {total}; {found}"
    )
    return {"memory": late / early}


SERVED: dict[str, Callable[[Bench], dict[str, float]]] = {
    "one": one,
    "distinct_8": distinct(8),
    "distinct_32": distinct(32),
    "shared_8": shared(8),
    "shared_32": shared(32),
    "turns": turns,
    "gap": gap,
    "http": http,
    "memory": memory,
}
"""Parts that ask servers; `decode` is the only one that does not."""

WITH_PEERS = ("one", "distinct_8", "distinct_32", "shared_8", "shared_32")


def main() -> None:
    """Run the parts and print their ratios."""
    parser = argparse.ArgumentParser(description="Serving compared with peers.")
    parser.add_argument("--only", nargs="+", choices=[*SERVED, "decode"], default=[*SERVED, "decode"], help="parts")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each part")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round, fewer requests")
    args = parser.parse_args()
    rounds = 1 if args.quick else args.rounds
    common.say(common.machine())
    ratios = decode_step.ratios(rounds) if "decode" in args.only else {}
    parts = [name for name in SERVED if name in args.only]
    if parts:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            ours, export = save_folders(Path(folder), "tiny" if args.quick else "24m")
            port = free_port()
            through = our_controller(port)
            through.model = ours.name
            worker = our_worker(ours, "--controller-address", through.url)
            peers: dict[str, Process] = {}
            if set(parts) & set(WITH_PEERS):
                peers = {"transformers": transformers_server(export), "one at a time": originals_worker(export)}
            for process in (through, worker, *peers.values()):  # started already, so that they load at the same time
                stack.enter_context(process)
            bench = Bench(worker, through, peers, ours, rounds, args.quick, itertools.count())
            for side in (worker, *peers.values()):
                asked(side, bench.messages(1))  # first requests load code
            for name in parts:
                found = SERVED[name](bench)
                common.say_ratios(found)
                ratios |= found
    common.say_ratios(ratios)


if __name__ == "__main__":
    main()
