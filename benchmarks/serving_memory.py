"""Memory of our worker: after many mixed requests, and while it reads large images.

memory: anonymous memory after 2,000 mixed requests over that after 200; caches within their limits
images: growth of anonymous memory while a request of 16 images of 81 megapixels is answered
"""

from __future__ import annotations

import base64
import io
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from benchmarks import common
from benchmarks.serving_sides import KV_CACHE_MB, SMALL_CACHE_MB, Body, Process, asked, question

if TYPE_CHECKING:
    from benchmarks.serving import Bench

NUM_IMAGES, SIDE = 16, 9000
SAMPLE_SECONDS = 0.01
SHOWN_BEFORE = 1 << 29
"""Seed of the first of a few images that many requests have."""

LIMITS = {"llava_kv_cache_bytes": KV_CACHE_MB << 20, "llava_prefix_cache_bytes": SMALL_CACHE_MB << 20}


def memory(bench: Bench) -> dict[str, float]:
    """Compare the worker's anonymous memory after many mixed requests with that after a tenth of them.

    Raises:
        RuntimeError: a cache was larger than its limit.
    """
    total, size = (200, 20) if bench.is_quick else (2000, 50)
    ours, early, peaks = bench.servers.small_cache, 0, dict.fromkeys(LIMITS, 0.0)
    for done in range(0, total, size):
        asked(ours, [_mixed(bench, random.Random(done + number)) for number in range(size)])
        for name, peak in peaks.items():
            peaks[name] = max(peak, ours.metric(name))
        if done + size == total // 10:
            early = ours.anonymous_bytes()
    late = ours.anonymous_bytes()
    found = ", ".join(f"{name} at most {value / 2**20:.0f} MiB" for name, value in peaks.items())
    common.say(
        f"memory: {early / 2**20:.0f} MiB after {total // 10} requests, {late / 2**20:.0f} after {total}; {found}"
    )
    above = [name for name, limit in LIMITS.items() if peaks[name] > limit]
    if above:
        raise RuntimeError(f"{', '.join(above)} above the limit")
    return {"memory": late / early}


def _mixed(bench: Bench, draw: random.Random) -> Body:
    """Return a request with a new image, one that was shown before, or none, and an answer of a few tokens."""
    shown = draw.random()
    image = bench.fresh() if shown < 0.4 else SHOWN_BEFORE + draw.randrange(8) if shown < 0.7 else None
    return {"messages": [question(image, draw.randrange(10**6))], "max_tokens": draw.choice((1, 3, 12))}


def images(bench: Bench) -> dict[str, float]:
    """Return the gigabytes by which the worker's anonymous memory grows while it reads large images."""
    num, side = (4, 2000) if bench.is_quick else (NUM_IMAGES, SIDE)
    parts = [_large_image(side, bench.fresh()) for _ in range(num)]
    body: Body = {
        "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "which"}]}],
        "max_tokens": 2,
    }
    ours = bench.servers.ours
    before = ours.anonymous_bytes()
    with _largest(ours) as peak:
        _, seconds = asked(ours, [body])
    grown = max(peak) - before
    megapixels = side * side / 1e6
    common.say(f"images: {num} of {megapixels:.0f} megapixels in {seconds:.1f} s: {grown / 1e6:.0f} MB more at most")
    return {"images": grown / 1e9}


def _large_image(side: int, seed: int) -> Body:
    """Return a gray JPEG of smooth noise as a part of a message."""
    noise = np.random.default_rng(seed).integers(0, 256, (9, 9), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).resize((side, side), Image.Resampling.BILINEAR).save(stream, "JPEG", quality=60)
    uri = "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": uri}}


@contextmanager
def _largest(process: Process) -> Iterator[list[int]]:
    """Yield a list that gets the anonymous memory of a process at short intervals."""
    samples, over = [process.anonymous_bytes()], threading.Event()

    def sample() -> None:
        while not over.wait(SAMPLE_SECONDS):
            samples.append(process.anonymous_bytes())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()
