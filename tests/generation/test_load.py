"""Many clients at once, a third of which leave, with and without faults: each gets an end, and nothing stays behind."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from llava.generation.engine import LocalEngine
from llava.generation.protocol import Prompt, Sampling
from llava.samples import Conversation, Turn
from tests.support.generation_tools import ask, engine_of
from tests.support.tiny import tiny_llava

FAULTS = {"prompt": RuntimeError("fault"), "memory": MemoryError("out of memory"), "model": RuntimeError("dead")}


def failing(original: Callable[..., Any], faults: dict[int, str]) -> Callable[..., Any]:
    """Return a function that fails at these calls."""
    calls = iter(range(1 << 30))

    def call(*args: Any) -> Any:
        name = faults.get(next(calls))
        if name is not None:
            raise FAULTS[name]
        return original(*args)

    return call


def client(engine: LocalEngine, seed: int, ends: list[str]) -> None:
    """Ask a few questions; leave a third of the answers."""
    draw = random.Random(seed)
    for _ in range(3):
        images = [draw.randrange(3)] if draw.random() < 0.8 else []
        prompt = ask("q" * draw.randrange(40) + f"{draw.randrange(5)}?", *images)
        if draw.random() < 0.1:
            prompt = Prompt(Conversation((Turn("human", "\ud800"),)))
        sampling = Sampling(
            draw.randrange(1, 12), temperature=draw.choice([0.0, 1.0]), n=draw.choice([1, 1, 3]), seed=1
        )
        handle = engine.submit(prompt, sampling, key=draw.choice("ab"))
        if draw.random() < 0.33:
            time.sleep(draw.random() * 0.05)
            handle.cancel()
            ends.append("left")
            continue
        assert sum(event.finish is not None for event in handle) == sampling.n
        ends.append(str(handle.completions()[0].error).partition(":")[0])


@pytest.mark.parametrize("faults", [False, True])
def test_every_request_ends_and_nothing_stays_behind(faults: bool) -> None:
    engine = engine_of(tiny_llava(seed=3), prefill_chunk=64, prefix_cache_mb=1, max_slots=6, kv_cache_mb=1)
    runner, cache = engine.scheduler.runner, engine.scheduler.cache
    if faults:
        runner.read = failing(runner.read, {3: "prompt", 4: "prompt", 11: "memory", 20: "prompt"})
        runner.decode = failing(runner.decode, {20: "model", 28: "model", 36: "model"})
    ends: list[str] = []
    threads = [threading.Thread(target=client, args=(engine, seed, ends)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    counts = Counter(ends)
    assert sum(counts.values()) == 48 and counts["left"] > 5 and counts["turn 0 is not Unicode"] > 0
    assert (counts["the model failed"] > 0) == faults and counts["None"] > 5
    engine.driver.cancel([])  # returns after what clients that left had asked for is gone
    assert not engine.scheduler.has_work and engine.driver.num_unfinished == engine.driver.num_running == 0
    assert not any(node.num_users for node in cache._recent) and not runner.cache.stems
    assert cache.num_bytes == sum(node.states.num_bytes for node in cache._recent) <= cache.max_bytes
