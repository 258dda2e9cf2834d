"""Serving compared with `transformers serve` and with a worker that answers one request at a time.

python -m benchmarks.serving                        all parts
python -m benchmarks.serving --only distinct_8,one  some parts
python -m benchmarks.serving --quick                a tiny model, one round: a check that everything runs

Servers run at the same time on the 24M model of `benchmarks.common` and are asked in turn over sockets; answers of 32
tokens are streamed. A server is started when a part first needs it. The faster peer counts. Every part prints its
ratios when it ends; one that fails leaves those of the others, and the exit status is 1. The last line has all ratios.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from benchmarks import common, decode_step
from benchmarks.serving_engine import EngineProcess
from benchmarks.serving_memory import images, memory
from benchmarks.serving_sides import NUM_NEW_TOKENS, Body, Reply, Servers, asked, question

LARGEST_DIFFERENT = 0.05
"""Share of answers that may differ from the peers': tokens after a near tie, see `eval_throughput`."""

QUESTIONS_PER_IMAGE = 8

ARRIVALS = 64
"""Requests a second that arrive at random times, in the parts with several questions about an image."""


@dataclass
class Bench:
    """Servers, and settings of a run."""

    servers: Servers
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
    peers = bench.servers.peers
    sides = {"ours": bench.servers.ours, **peers}
    rates, firsts = [], []
    taken: dict[str, list[float]] = {side: [] for side in sides}
    waited: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(bench.rounds):
        bodies, delays = make()
        replies: dict[str, list[Reply]] = {}
        seconds: dict[str, float] = {}
        for side, process in sides.items():
            replies[side], seconds[side] = asked(process, bodies, delays)
            taken[side].append(seconds[side])
        check_equal(replies)
        rates.append(min(seconds[peer] for peer in peers) / seconds["ours"])
        first = {side: p95([reply.first for reply in found]) for side, found in replies.items()}
        for side, value in first.items():
            waited[side].append(value)
        firsts.append(first["ours"] / min(first[peer] for peer in peers))
    shown = ", ".join(
        f"{side} {len(bodies) / common.median(times):.2f} ({common.median(waited[side]):.2f})"
        for side, times in taken.items()
    )
    common.say(f"{name}: requests/s (p95 of seconds to the first token): {shown}")
    return common.median(rates), common.median(firsts)


def check_equal(replies: Mapping[str, Sequence[Reply]]) -> None:
    """Check that the sides gave the same greedy answers.

    Raises:
        RuntimeError: more answers differ than near ties explain.
    """
    texts = {side: [reply.text.strip() for reply in found] for side, found in replies.items()}
    expected = texts["ours"]
    for peer, found in texts.items():
        different = [pair for pair in zip(expected, found, strict=True) if pair[0] != pair[1]]
        if len(different) > max(1, LARGEST_DIFFERENT * len(expected)):
            shown = " instead of ".join(map(repr, different[0]))
            raise RuntimeError(f"{len(different)} of {len(expected)} answers differ from those of {peer}: {shown}")


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
    """Return the part with eight questions an image, which arrive at random times."""

    def run(bench: Bench) -> dict[str, float]:
        def make() -> tuple[list[Body], list[float]]:
            images = [bench.fresh() for _ in range(num // QUESTIONS_PER_IMAGE)] * QUESTIONS_PER_IMAGE
            draw = random.Random(bench.fresh())
            draw.shuffle(images)
            return bench.messages(num, images), [draw.random() * num / ARRIVALS for _ in range(num)]

        return {f"shared_{num}": compare(bench, make, f"shared_{num}")[0]}

    return run


def one(bench: Bench) -> dict[str, float]:
    """Ask one request after another."""
    peers = bench.servers.peers
    sides = {"ours": bench.servers.ours, **peers}
    taken: dict[str, list[float]] = {side: [] for side in sides}
    replies: dict[str, list[Reply]] = {side: [] for side in sides}
    for _ in range(2 if bench.is_quick else 5 * bench.rounds):
        bodies = bench.messages(1)
        for side, process in sides.items():
            found, seconds = asked(process, bodies)
            replies[side] += found
            taken[side].append(seconds)
    check_equal(replies)
    common.say("one: seconds: " + ", ".join(f"{side} {common.median(times):.3f}" for side, times in taken.items()))
    ratios = [min(others) / ours for ours, *others in zip(*taken.values(), strict=True)]
    return {"one": common.median(ratios)}


def turns(bench: Bench) -> dict[str, float]:
    """Compare the first token of later turns, and of another question after a pause, with that of turn 1."""
    ours, later, again = bench.servers.ours, [], []

    def ask(messages: list[Body]) -> Reply:
        return asked(ours, [{"messages": messages, "stream_options": {"include_usage": True}}])[0][0]

    for _ in range(bench.rounds):
        image = bench.fresh()
        messages = [question(image, bench.fresh())]
        first = reply = ask(messages)
        for _ in range(3):
            messages = [*messages, {"role": "assistant", "content": reply.text}, question(None, bench.fresh())]
            reply = ask(messages)
            later.append(reply.first / first.first)
        length = f"{reply.cached} of {reply.prompt}"
        time.sleep(2 if bench.is_quick else 30)
        reply = ask([question(image, bench.fresh())])
        again.append(reply.first / first.first)
        kept = f"{length} tokens of turn 4 and {reply.cached} of {reply.prompt} of the later question were kept"
        common.say(f"turns: {1e3 * first.first:.0f} ms to the first token of turn 1; {kept}")
    return {"turn2": common.median(later), "later_question": common.median(again)}


def gap(bench: Bench) -> dict[str, float]:
    """Compare the gaps of a running stream while eight new images come in with its own median."""
    ours, ratios, num = bench.servers.ours, [], 8
    for _ in range(bench.rounds):
        [alone, busy] = ([{**one, "max_tokens": 300}] for one in bench.messages(2))
        undisturbed = gaps(asked(ours, alone)[0][0])
        delays = [0.0, *(0.1 + sum(undisturbed) * number / 20 for number in range(num))]
        disturbed = sorted(gaps(asked(ours, [*busy, *bench.messages(num)], delays)[0][0]))
        p50, p99 = statistics.median(undisturbed), disturbed[round(0.99 * (len(disturbed) - 1))]
        ratios.append(p99 / p50)
        common.say(
            f"gap: {1e3 * p50:.1f} ms alone; p99 {1e3 * p99:.1f} ms with others, largest {1e3 * disturbed[-1]:.1f}"
        )
    return {"gap": common.median(ratios)}


def gaps(reply: Reply) -> list[float]:
    """Return the times between the pieces of an answer."""
    return [after - before for before, after in itertools.pairwise(reply.pieces)]


def http(bench: Bench) -> dict[str, float]:
    """Compare the rate of 32 clients with that of the engine alone, and with that through a controller."""
    num = 8 if bench.is_quick else 32
    through, inside = [], []
    ours, controller = bench.servers.ours, bench.servers.through
    with EngineProcess(bench.servers.folders[0], NUM_NEW_TOKENS) as engine:
        for _ in range(bench.rounds):
            bodies = bench.messages(num)
            _, seconds = asked(ours, bodies)
            alone = engine.seconds(bodies)
            _, behind = asked(controller, bench.messages(num))
            through.append(seconds / behind)
            inside.append(min(alone.values()) / seconds)
            shown = ", ".join(f"{name} {value:.2f}" for name, value in alone.items())
            common.say(
                f"http: {num} answers: {seconds:.2f} s, through the controller {behind:.2f}; engine alone: {shown}"
            )
    return {"http": common.median(inside), "controller": common.median(through)}


SERVED: dict[str, Callable[[Bench], dict[str, float]]] = {
    "one": one,
    "distinct_8": distinct(8),
    "distinct_32": distinct(32),
    "shared_8": shared(8),
    "shared_32": shared(32),
    "turns": turns,
    "gap": gap,
    "http": http,
    "images": images,
    "memory": memory,
}
"""Parts that ask servers; `decode` is the only one that does not."""


def parts_of(words: Sequence[str]) -> list[str]:
    """Return the names of parts in words that may hold several, joined by commas.

    Raises:
        argparse.ArgumentTypeError: there is no such part.
    """
    names = [name for word in words for name in word.split(",") if name]
    for name in names:
        if name not in (*SERVED, "decode"):
            raise argparse.ArgumentTypeError(f"unknown part {name}; known: {', '.join((*SERVED, 'decode'))}")
    return names


def measured(names: Sequence[str], bench: Bench) -> tuple[dict[str, float], list[str]]:
    """Run parts; return the ratios, and the names of those that failed."""
    ratios: dict[str, float] = {}
    failed = []
    for name in names:
        start = time.monotonic()
        try:
            found = decode_step.ratios(bench.rounds) if name == "decode" else SERVED[name](bench)
        except Exception as error:
            traceback.print_exc()
            common.say(f"{name}: FAILED: {error}")
            failed.append(name)
            continue
        common.say(f"{name}: {time.monotonic() - start:.0f} s")
        common.say_ratios(found)
        ratios |= found
    return ratios, failed


def main() -> int:
    """Run the parts and print their ratios; return the exit status."""
    parser = argparse.ArgumentParser(description="Serving compared with peers.")
    known = ["decode", *SERVED]
    parser.add_argument("--only", nargs="+", default=known, metavar="PART", help=f"parts: {', '.join(known)}")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each part")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round, fewer requests")
    args = parser.parse_args()
    try:
        names = parts_of(args.only)
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    common.say(common.machine())
    with ExitStack() as stack:
        bench = Bench(
            Servers("tiny" if args.quick else "24m", stack),
            1 if args.quick else args.rounds,
            args.quick,
            itertools.count(),
        )
        ratios, failed = measured(names, bench)
    common.say_ratios(ratios)
    if failed:
        common.say(f"FAILED {' '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
